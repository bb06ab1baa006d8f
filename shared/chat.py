"""Chats as token ids: the tokenizer's chat template renders them, and the assistant's turns are the targets."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shared.errors import ConfigError, require
from shared.tokenizer import Encoded, Tokenizer, count_target_bytes, decode, plain_backend


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a chat up to where the assistant begins to write; a message that spells a special token is text.

    Raises:
        ConfigError: there is no chat template, or it refuses these messages.
    """
    stand_ins = _stand_ins(tokenizer, messages)
    hidden = [{key: swap(text, stand_ins) for key, text in message.items()} for message in messages]
    text = _renderer(tokenizer)(hidden, add_generation_prompt=True)[0]
    return _encode(tokenizer, swap(text, stand_ins), stand_ins)[0]


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> Encoded:
    """Tokenise a chat as the tokenizer's chat template renders it; the assistant's turns are the targets.

    A turn is what the template marks with `{% generation %}`. Without marks it is what the message adds to the
    rendering of the earlier messages and the generation prompt, including the tokens that close the turn. A token that
    straddles a border belongs to the turn. Only the template's own special tokens are special: a message that spells
    one is text.

    Raises:
        ConfigError: there is no chat template, it refuses these messages, or it renders earlier messages otherwise
            once later ones follow.
    """
    stand_ins = _stand_ins(tokenizer, messages)
    hidden = [{key: swap(text, stand_ins) for key, text in message.items()} for message in messages]
    rendered, turns = _render_chat(tokenizer, hidden)
    # Swapped again, the messages read as written and the template's own special tokens are the stand-ins.
    text = swap(rendered, stand_ins)
    turns = [(len(swap(rendered[:a], stand_ins)), len(swap(rendered[:b], stand_ins))) for a, b in turns]
    ids, offsets = _encode(tokenizer, text, stand_ins)
    is_target = [any(start < b and a < end for a, b in turns) for start, end in offsets]
    return Encoded(
        ids=ids,
        is_target=is_target,
        target_bytes=count_target_bytes(tokenizer, ids, is_target, 0, len(is_target)),
        lossless=_is_lossless(tokenizer, text, ids, offsets),
    )


def _encode(tokenizer: Tokenizer, text: str, stand_ins: Mapping[str, str]) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of a rendered chat, whose special tokens are stand-ins where there are any."""
    if stand_ins:
        return encode_with_stand_ins(tokenizer, text, stand_ins)
    with plain_backend(tokenizer.backend_tokenizer, special_is_text=False) as backend:
        encoding = backend.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _is_lossless(tokenizer: Tokenizer, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> bool:
    """Whether the ids between special tokens give the text there again.

    Tokenizers such as Llama's put a space before each such stretch, which their decoder takes away at the very start
    only. Therefore each is decoded by itself, and a single space before it counts as nothing.
    """
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    run, start = list[int](), 0
    for id, (a, b) in [*zip(ids, offsets, strict=True), (None, (len(text), len(text)))]:
        if id is not None and id not in special:
            run.append(id)
            continue
        if decode(tokenizer, run).removeprefix(" ") != text[start:a].removeprefix(" "):
            return False
        run, start = [], b
    return True


def _stand_ins(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """For each special token a character that no message holds; empty where no message spells a special token."""
    written = [text for message in messages for text in message.values()]
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not any(token in text for token in special for text in written):
        return {}
    used = set().union(*written, tokenizer.get_chat_template())
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)  # private use: no text has them
    return dict(zip(special, free, strict=False))


def swap(text: str, stand_ins: Mapping[str, str]) -> str:
    """Stand-ins in place of special tokens and special tokens in place of stand-ins."""
    if not stand_ins:
        return text
    both = dict(stand_ins) | {stand_in: special for special, stand_in in stand_ins.items()}
    longest_first = "|".join(re.escape(token) for token in sorted(both, key=len, reverse=True))
    return re.sub(longest_first, lambda match: both[match[0]], text)


def encode_with_stand_ins(
    tokenizer: Tokenizer, text: str, stand_ins: Mapping[str, str]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of a text whose special tokens are written as stand-ins; what spells one is plain text.

    In a copy of the tokenizer each stand-in is an added token with its special token's own flags, so text between two
    of them becomes the ids that it has between the special tokens.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    copy = Backend.from_str(tokenizer.backend_tokenizer.to_str())
    flags = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    meant: dict[int | None, int] = {}
    for special, stand_in in stand_ins.items():
        token = flags[special]
        same = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        copy.add_tokens([AddedToken(stand_in, special=False, **same)])
        meant[copy.token_to_id(stand_in)] = tokenizer.convert_tokens_to_ids(special)
    with plain_backend(copy) as backend:
        encoding = backend.encode(text, add_special_tokens=False)
    return [meant.get(id, id) for id in encoding.ids], encoding.offsets


Render = Callable[..., tuple[str, list[tuple[int, int]]]]


def _renderer(tokenizer: Tokenizer) -> Render:
    """Renders messages to a text, and where in it the assistant's turns are, if the template marks them."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    fix = "name a teacher that was trained on chats, or data with prompt and completion"
    require(tokenizer.chat_template, "the tokenizer has no chat template", where=tokenizer.name_or_path, fix=fix)
    template = tokenizer.get_chat_template()

    def render(messages: Sequence[Mapping[str, str]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        options |= {"conversations": [[dict(message) for message in messages]], "chat_template": template}
        try:
            rendered: Any = render_jinja_template(**options, **tokenizer.special_tokens_map)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            got = f"{type(error).__name__}: {error}"
            raise ConfigError("the chat template refuses the messages", got=got) from error
        texts, turns = rendered  # of each conversation; turns only where the template marks them
        return texts[0], [(start, end) for start, end in turns[0]] if turns else []

    return render


def _render_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """A chat's text and where in it the assistant's turns are."""
    render, template = _renderer(tokenizer), tokenizer.get_chat_template()
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return render(messages, return_assistant_tokens_mask=True)
    text, turns, before = render(messages)[0], list[tuple[int, int]](), ""
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            opening = render(messages[:number], add_generation_prompt=True)[0]
            whole = render(messages[: number + 1])[0]
            require(
                opening.startswith(before) and whole.startswith(opening) and text.startswith(whole),
                "the chat template does not render a chat turn by turn",
                where=f"message {number + 1}",
                expected="each rendering to extend the one before, or a template with {% generation %}",
            )
            turns.append((len(opening), len(whole)))
            before = whole
    return text, turns
