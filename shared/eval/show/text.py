"""Tokens as text that is safe to show: split characters joined, white space and invisible characters made visible."""

import functools
import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shared.tokenizer import Tokenizer

MAX_CHARACTERS = 200  # of one token; a tokenizer may hold longer ones
MAX_SPLIT = 8  # tokens that may spell one character
_BROKEN = "\ufffd"
_SYMBOLS = {" ": "␣", "\t": "→", "\n": "↵"}
_KINDS = {" ": "space", "\t": "tab", "\n": "newline"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one token spells."""

    text: str  # of a split character's first token the whole character, of its others nothing; at most 200 characters
    num_cut: int = 0  # characters that `text` lacks
    place: int = 1  # which of `parts` tokens it is that together spell `text`
    parts: int = 1
    raw: str = ""  # the token's own bytes in hexadecimal where it does not spell whole characters


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Piece]:
    """The piece of each token of a document; together they spell its text, special tokens included."""
    pieces: list[Piece] = []
    context: list[int] = []  # a decoder may drop a text's first space, so each piece is what it adds to the one before
    while len(pieces) < len(ids):
        start = len(pieces)
        before = _decode(tokenizer, context)
        for parts in range(1, min(MAX_SPLIT, len(ids) - start) + 1):
            text = _decode(tokenizer, [*context, *ids[start : start + parts]])[len(before) :]
            if _BROKEN not in text:
                break
        else:  # bytes that are no UTF-8
            parts, text = 1, _decode(tokenizer, [*context, ids[start]])[len(before) :]
        context = list(ids[start : start + parts])
        for place, id in enumerate(context, start=1):
            shown = text if place == 1 else ""
            raw = raw_bytes(tokenizer, id) if parts > 1 or _BROKEN in text else ""
            num_cut = max(len(shown) - MAX_CHARACTERS, 0)
            pieces.append(Piece(text=shown[:MAX_CHARACTERS], num_cut=num_cut, place=place, parts=parts, raw=raw))
    return pieces


def label(tokenizer: Tokenizer, id: int, limit: int = 40) -> str:
    """One token on a line of its own: its text with visible white space, or its bytes where it is part of one."""
    anchor = tokenizer.convert_tokens_to_ids("a")
    context = [] if anchor in (None, tokenizer.unk_token_id) else [anchor]
    text = _decode(tokenizer, [*context, id])[len(_decode(tokenizer, context)) :]
    raw = raw_bytes(tokenizer, id) if _BROKEN in text else ""
    return f"bytes {raw}" if raw else visible(text, limit)


def visible(text: str, limit: int = MAX_CHARACTERS) -> str:
    """Text on one line, safe on a terminal: white space as ␣ → ↵, control and invisible characters as <U+202E>."""
    parts = (
        f"<{run}>" if kind == "hidden" else "".join(_SYMBOLS.get(character, character) for character in run)
        for kind, run in runs(text[:limit])
    )
    return "".join(parts) + ("…" if len(text) > limit else "")


def runs(text: str) -> Iterator[tuple[str, str]]:
    """Cut text into runs of one kind: `plain`, `space`, `tab`, `newline`, and `hidden`, named as U+202E each."""
    for kind, characters in itertools.groupby(text, _kind):
        if kind == "hidden":
            yield from ((kind, f"U+{ord(character):04X}") for character in characters)
        else:
            yield kind, "".join(characters)


def _kind(character: str) -> str:
    """Control, format, private and unassigned characters are hidden, and every space but the plain one."""
    category = unicodedata.category(character)
    hidden = category[0] == "C" or category in ("Zl", "Zp", "Zs")
    return _KINDS.get(character, "hidden" if hidden else "plain")


def raw_bytes(tokenizer: Tokenizer, id: int) -> str:
    """A token's bytes in hexadecimal, as byte-level and byte-fallback vocabularies name them; empty for others."""
    token = tokenizer.convert_ids_to_tokens(id) or ""
    if token.startswith("<0x") and token.endswith(">"):
        return str(token[3:-1])
    known = [_byte_alphabet().get(character) for character in token]
    return "" if None in known else " ".join(f"{byte:02X}" for byte in known[:16])


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    text: str = tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
    return text
