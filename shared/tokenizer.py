"""One way to turn text into token ids, for the teacher, the student and evaluation alike."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import DistillError
from shared.runtime import sha256_json

Tokenizer = Any  # a transformers tokenizer with the `tokenizers` backend


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A tokenised document.

    Args:
        ids: BOS, text, EOS (BOS and EOS only where the tokenizer has them).
        num_prompt_tokens: leading ids that are not targets: BOS and the tokens that lie wholly in the prompt.
        target_bytes: UTF-8 bytes of the text that the targets spell; EOS has none.
        lossless: whether decoding the ids gives the text again.
    """

    ids: list[int]
    num_prompt_tokens: int
    target_bytes: int
    lossless: bool


def load_tokenizer(path_or_id: str | Path, revision: str = "main") -> Tokenizer:
    """Load a tokenizer from a directory or the Hub; code that comes with it is never run.

    `tokenizer.json` is read as it is. `AutoTokenizer` rebuilds some classes (`GPT2Tokenizer`, which StarCoder2 names)
    from vocabulary and merges alone, and loses the pre-tokenizer that the model was trained with.

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
        raise DistillError("cannot load the tokenizer", where=path_or_id, got=got) from error
    if not tokenizer.is_fast:
        expected = "a tokenizer with a `tokenizers` backend (tokenizer.json)"
        raise DistillError("unusable tokenizer", where=path_or_id, expected=expected, got=type(tokenizer).__name__)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the tokenizer's files; `load_tokenizer(directory)` gives the same digest."""
    tokenizer.save_pretrained(str(directory))


def encode_document(tokenizer: Tokenizer, prompt: str, completion: str) -> Encoded:
    """Tokenise a document as a whole; a token that straddles the border belongs to the completion.

    The text holds no special tokens: what spells one is plain text.
    """
    text = prompt + completion
    text_ids, offsets = _encode(tokenizer, text)
    opening, closing = _ends(tokenizer)
    in_prompt = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets))
    num_prompt_tokens = len(opening) + in_prompt
    first_target = max(num_prompt_tokens, 1) - len(opening)  # nothing predicts a document's very first token
    target_text = text[offsets[first_target][0] :] if first_target < len(offsets) else ""
    return Encoded(
        ids=opening + text_ids + closing,
        num_prompt_tokens=num_prompt_tokens,
        target_bytes=len(target_text.encode()),
        lossless=decode(tokenizer, text_ids) == text,
    )


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids that a document with this prompt begins with (unless a token straddles its border)."""
    return _ends(tokenizer)[0] + _encode(tokenizer, prompt)[0]


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens and with every space as it was."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids of `bos`, `eos`, `pad` and `unk`; None where the tokenizer has none."""
    return {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of everything that decides which ids a text gets and back.

    That is: vocabulary, merges, normaliser, pre-tokenizer, decoder, added tokens, BOS and EOS. Truncation, padding and
    the post-processor take no part in `encode_document`. Options that are off are left out, so that a library version
    that adds one leaves the digest as it was.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens")}
    ids = special_ids(tokenizer)
    return sha256_json(_without_off(parts) | {"bos": ids["bos"], "eos": ids["eos"]})


def _without_off(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_off(v) for k, v in value.items() if v is not None and v is not False and v != ""}
    return [_without_off(item) for item in value] if isinstance(value, list) else value


def _ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    ids = special_ids(tokenizer)
    opening, closing = ([] if id is None else [id] for id in (ids["bos"], ids["eos"]))
    return opening, closing


def _encode(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character offsets of plain text."""
    with _plain(tokenizer.backend_tokenizer) as backend:
        encoding = backend.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


@contextlib.contextmanager
def _plain(backend: Any) -> Iterator[Any]:
    """The backend with nothing cut, padded or read as special, and with exact offsets.

    A byte-level post-processor trims spaces off the offsets, which hides a token that straddles the border.
    """
    processor, special = backend.post_processor, backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor, backend.encode_special_tokens = None, True
    try:
        yield backend
    finally:
        backend.post_processor, backend.encode_special_tokens = processor, special
