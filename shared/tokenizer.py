"""One way to turn text into token ids, for the teacher, the student and evaluation alike."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shared.errors import DistillError, require
from shared.files import fsync_directory, read_json, settle_file, sha256_json, write_json

# Keys of a tokenizer_config.json that say how it was loaded, or name code that is not beside it.
_NOT_KEPT = ("backend", "is_local", "local_files_only", "auto_map")
Tokenizer = Any  # a transformers tokenizer with the `tokenizers` backend
_OPENING, _CLOSING = "document_opening", "document_closing"  # keys of tokenizer_config.json that `record_ends` writes


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A tokenised document."""

    ids: list[int]  # opening, text, closing (see `document_ends`); of a chat, what its template gives
    is_target: list[bool]  # of each id; the opening, the prompt and a chat's other turns are none
    target_bytes: int  # UTF-8 bytes of the text that the targets spell; special tokens have none
    lossless: bool  # whether decoding the ids gives the text again

    @property
    def num_prompt_tokens(self) -> int:
        """Leading ids that are not targets: the opening and the tokens that lie wholly in the prompt."""
        return self.is_target.index(True) if any(self.is_target) else len(self.ids)


def load_tokenizer(path_or_id: str | Path, revision: str = "main") -> Tokenizer:
    """Load a tokenizer from a directory or the Hub; code that comes with it is never run.

    `tokenizer.json` is read as it is. `AutoTokenizer` rebuilds some classes (`GPT2Tokenizer`, which StarCoder2 names)
    only from vocabulary and merges, and loses the pre-tokenizer that the model was trained with.

    Raises:
        DistillError: it cannot be loaded, or has no `tokenizers` backend (character offsets are needed).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path_or_id), revision=revision)
        except ValueError:  # no tokenizer.json
            tokenizer = AutoTokenizer.from_pretrained(str(path_or_id), revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types here
        got = f"{type(error).__name__}: {error}"
        fix = "save it beside the weights with tokenizer.save_pretrained"
        raise DistillError("cannot load the tokenizer", where=path_or_id, got=got, fix=fix) from error
    if not tokenizer.is_fast:
        expected = "a tokenizer with a `tokenizers` backend (tokenizer.json)"
        raise DistillError("unusable tokenizer", where=path_or_id, expected=expected, got=type(tokenizer).__name__)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the tokenizer's files; `load_tokenizer(directory)` gives the same digest.

    `AutoTokenizer` of transformers 4 and 5 reads them too, and gives the same ids.

    Raises:
        OSError: the system refuses, as on a full disk.
    """
    try:
        written = tokenizer.save_pretrained(str(directory))
    except Exception as error:  # the tokenizers library raises no narrower one for what the system refuses
        refusal = re.search(r"\(os error (\d+)\)", str(error))
        if refusal is None:
            raise
        raise OSError(int(refusal[1]), os.strerror(int(refusal[1])), str(directory)) from error
    config = directory / "tokenizer_config.json"
    write_json(config, _for_any_reader(read_json(config)))
    for name in written:
        settle_file(Path(name))
    fsync_directory(directory)


def _for_any_reader(config: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer_config.json` with which transformers 4 and 5 both give the ids of `tokenizer.json`.

    `PreTrainedTokenizerFast` is the class that both take `tokenizer.json` as it is for; transformers 5 names it
    differently. It also gives a list another name than transformers 4 knows, and reads the older name as well.
    """
    config = {key: value for key, value in config.items() if key not in _NOT_KEPT}
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config | {"tokenizer_class": "PreTrainedTokenizerFast"}


def encode_documents(
    tokenizer: Tokenizer, parts: Sequence[tuple[str, str]], encodings: Sequence[Any] | None = None
) -> list[Encoded]:
    """Tokenise documents, each as a whole, on all processors.

    A token that straddles the border belongs to the completion. What spells a special token is plain text.

    Args:
        parts: prompt and completion of each.
        encodings: what `TextEncoder` made of each text, prompt and completion together, if it did.
    """
    texts = [prompt + completion for prompt, completion in parts]
    if encodings is None:
        with plain_backend(tokenizer.backend_tokenizer) as backend:
            encodings = backend.encode_batch(texts, add_special_tokens=False)
    text_ids = [encoding.ids for encoding in encodings]
    restored = tokenizer.backend_tokenizer.decode_batch(text_ids, skip_special_tokens=True)  # as `decode`
    opening, closing = (tokenizer.convert_tokens_to_ids(list(end)) for end in document_ends(tokenizer))
    encoded = []
    for (prompt, _), text, encoding, ids, again in zip(parts, texts, encodings, text_ids, restored, strict=True):
        # `token_to_chars` gives one token's offsets; the list of all would take longer than what is needed of it.
        beyond = (i for i in range(len(ids)) if encoding.token_to_chars(i)[1] > len(prompt))
        in_prompt = next(beyond, len(ids))
        num_prompt_tokens = len(opening) + in_prompt
        first_target = max(num_prompt_tokens, 1) - len(opening)  # nothing predicts a document's very first token
        target_text = text[encoding.token_to_chars(first_target)[0] :] if first_target < len(ids) else ""
        num_tokens = len(opening) + len(ids) + len(closing)
        encoded.append(
            Encoded(
                ids=opening + ids + closing,
                is_target=[False] * num_prompt_tokens + [True] * (num_tokens - num_prompt_tokens),
                target_bytes=len(target_text.encode()),
                lossless=again == text,
            )
        )
    return encoded


class TextEncoder:
    """Encodes plain texts on all processors, in a thread of its own if need be: it is a copy of the tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_str(tokenizer.backend_tokenizer.to_str())

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """The encodings of texts, as `encode_documents` takes them. Python's lock is free meanwhile."""
        with plain_backend(self._backend) as backend:
            encodings: list[Any] = backend.encode_batch(list(texts), add_special_tokens=False)
        return encodings


def count_target_bytes(
    tokenizer: Tokenizer, ids: Sequence[int], is_target: Sequence[bool], start: int, stop: int
) -> int:
    """UTF-8 bytes that the targets among `ids[start + 1 : stop]` spell (nothing predicts the first id of a segment).

    Differences of prefixes, so that a character cut in two is counted once and the parts add up to the whole.
    """
    learnt = [False, *(start < i < stop and is_target[i] for i in range(len(ids))), False]
    borders = [i for i in range(len(ids) + 1) if learnt[i] != learnt[i + 1]]
    sizes = [len(decode(tokenizer, ids[:border]).encode()) for border in borders]
    return sum(sizes[1::2]) - sum(sizes[::2])


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids that a document with this prompt begins with (unless a token straddles its border)."""
    opening: list[int] = tokenizer.convert_tokens_to_ids(list(document_ends(tokenizer).opening))
    return opening + encode_text(tokenizer, prompt)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of plain text alone."""
    with plain_backend(tokenizer.backend_tokenizer) as backend:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens and with every space as it was."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class Ends(NamedTuple):
    """The special tokens that a document opens and closes with."""

    opening: tuple[str, ...]
    closing: tuple[str, ...]


def document_ends(tokenizer: Tokenizer) -> Ends:
    """What a document that is no chat opens and closes with: as `record_ends` wrote it, else by this rule.

    - It opens with what the tokenizer itself puts before a text. Where that is nothing, it opens with BOS if that is
      EOS too, which then stands between documents (GPT-2, StarCoder2). A BOS that the tokenizer names and never adds
      has another use: SmolLM2-Instruct names `<|im_start|>`, which opens the turns of its chats.
    - It closes with EOS, if there is one.
    """
    bos, eos, settings = tokenizer.bos_token, tokenizer.eos_token, tokenizer.init_kwargs
    opening = settings.get(_OPENING)
    if opening is None:
        opening = _own_opening(tokenizer) or ([bos] if bos is not None and bos == eos else [])
    closing = settings.get(_CLOSING)
    if closing is None:
        closing = [] if eos is None else [eos]
    return Ends(tuple(opening), tuple(closing))


def record_ends(tokenizer: Tokenizer, open_with: str = "auto", close_with: str = "auto") -> Ends:
    """Decide what documents open and close with; `save_tokenizer` keeps it, for whoever loads the tokenizer.

    Args:
        tokenizer: changed in place.
        open_with, close_with: `auto` (see `document_ends`), `none`, `bos`, `eos`, or a special token such as
            `<|endoftext|>`.

    Raises:
        ConfigError: the tokenizer has no such special token.
    """
    by_rule = document_ends(tokenizer)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    opening = (_OPENING, "--open-with", open_with, by_rule.opening)
    closing = (_CLOSING, "--close-with", close_with, by_rule.closing)
    for key, option, asked, rule in (opening, closing):
        token = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}.get(asked, asked)
        known = asked in ("auto", "none") or token in special
        expected = f"auto, none, bos, eos or one of {', '.join(special[:12])}{', …' if len(special) > 12 else ''}"
        require(known, "the tokenizer has no such special token", where=option, expected=expected, got=asked)
        tokenizer.init_kwargs[key] = {"auto": list(rule), "none": []}.get(asked, [token])
    return document_ends(tokenizer)


def recorded_ends(directory: Path) -> dict[str, list[str]] | None:
    """The `Ends` that `record_ends` wrote into a tokenizer's directory, such as a cache's; None where it did not.

    Reads one JSON file, without transformers.
    """
    config = read_json(directory / "tokenizer_config.json")
    known = isinstance(config, dict) and {_OPENING, _CLOSING} <= config.keys()
    return {"opening": config[_OPENING], "closing": config[_CLOSING]} if known else None


def adopt_ends(tokenizer: Tokenizer, ends: Mapping[str, list[str]] | None) -> None:
    """Let documents open and close as `recorded_ends` says, unless the tokenizer itself has a record."""
    if ends is not None:
        tokenizer.init_kwargs.setdefault(_OPENING, ends["opening"])
        tokenizer.init_kwargs.setdefault(_CLOSING, ends["closing"])


def _own_opening(tokenizer: Tokenizer) -> list[str]:
    """The special tokens that the tokenizer itself puts before a text."""
    encoding = tokenizer.backend_tokenizer.encode("a")
    tokens = zip(encoding.tokens, encoding.special_tokens_mask, encoding.attention_mask, strict=True)
    real = [(token, is_special) for token, is_special, is_real in tokens if is_real]  # no padding
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1], real)]


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids of `bos` and `eos`, which documents open and close with, and of `pad` and `unk`; None for none."""
    ends = document_ends(tokenizer)
    ids = {"bos": ends.opening, "eos": ends.closing, "pad": [tokenizer.pad_token], "unk": [tokenizer.unk_token]}
    return {
        name: tokenizer.convert_tokens_to_ids(tokens[0]) if len(tokens) == 1 and tokens[0] is not None else None
        for name, tokens in ids.items()
    }


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of everything that decides which ids a text gets and back.

    That is: vocabulary, merges, normaliser, pre-tokenizer, decoder, added tokens, BOS and EOS as named. Truncation and
    padding take no part in `encode_documents`; what a document opens and closes with is recorded beside the digest
    (`document_ends`). Options that are off are left out, so that a library version that adds one leaves the digest as
    it was.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens")}
    return sha256_json(_without_off(parts) | {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id})


def _without_off(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_off(v) for k, v in value.items() if v is not None and v is not False and v != ""}
    return [_without_off(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def plain_backend(backend: Any, *, special_is_text: bool = True) -> Iterator[Any]:
    """The backend with nothing cut or padded, and with exact offsets.

    A byte-level post-processor trims spaces off the offsets, which hides a token that straddles the border.
    """
    processor, special = backend.post_processor, backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor, backend.encode_special_tokens = None, special_is_text
    try:
        yield backend
    finally:
        backend.post_processor, backend.encode_special_tokens = processor, special
