"""Documents → pieces: token ids within the length limit, with their targets; counts what did not fit."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data.records import Document
from shared.errors import ConfigError
from shared.tokenizer import Encoded, Tokenizer, count_target_bytes, encode_chat, encode_document


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A document, or a part of a long one.

    Attributes:
        ids: token ids.
        is_target: for each id whether it is a training target; never the first, which nothing predicts.
        meta: the cache's JSON object of the document.
    """

    ids: list[int]
    is_target: list[bool]
    meta: dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Corpus:
    """All pieces in order, and the ids of the documents that something happened to."""

    pieces: list[Piece] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    lossy: list[str] = field(default_factory=list)


def cut_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, *, max_length: int | None, on_long: str, head_width: int
) -> Corpus:
    """Tokenise documents and bring each within the limit.

    Args:
        documents: texts with prompt and completion.
        tokenizer: the teacher's.
        max_length: most tokens of a piece; None for no limit.
        on_long: `split` into parts that overlap by one token, so that every token is predicted exactly once;
            `truncate` to the first part; `drop`.
        head_width: rows of the teacher's head.

    Raises:
        ConfigError: an id the head cannot predict (the document is named), or nothing is left.
    """
    corpus = Corpus()
    for document in documents:
        encoded = _encode(document, tokenizer)
        if not encoded.ids or max(encoded.ids) >= head_width:
            raise ConfigError(
                "a document that the teacher cannot label",
                where=f"{document.source} {document.id}",
                expected=f"token ids below {head_width}, at least one",
                got=max(encoded.ids, default="none"),
            )
        if not encoded.lossless:
            corpus.lossy.append(document.id)
        meta = {"id": document.id, "source": document.source, "origin": "corpus", "digest": document.digest}
        length = len(encoded.ids)
        if max_length is None or length <= max_length:
            starts = [0]
        else:
            corpus.long.append(document.id)
            starts = {"split": list(range(0, length - 1, max_length - 1)), "truncate": [0], "drop": []}[on_long]
        for part, start in enumerate(starts):
            stop = length if max_length is None else min(start + max_length, length)
            more = {"part": part, "parts": len(starts)} if len(starts) > 1 else {}
            corpus.pieces.append(_piece(encoded, start, stop, tokenizer, meta | more))
    if not corpus.pieces:
        raise ConfigError(
            "no document is left", expected=f"documents of at most {max_length} tokens", got=corpus.long[:3]
        )
    return corpus


def _encode(document: Document, tokenizer: Tokenizer) -> Encoded:
    if document.messages is None:
        return encode_document(tokenizer, document.prompt, document.completion)
    try:
        return encode_chat(tokenizer, document.messages)
    except ConfigError as error:
        places = [f"{document.source} {document.id}", error.where]
        where = ", ".join(str(place) for place in places if place is not None)
        raise ConfigError(error.what, where=where, expected=error.expected, got=error.got, fix=error.fix) from error


def _piece(encoded: Encoded, start: int, stop: int, tokenizer: Tokenizer, meta: dict[str, Any]) -> Piece:
    target_bytes = encoded.target_bytes
    if stop - start < len(encoded.ids):
        target_bytes = count_target_bytes(tokenizer, encoded.ids, encoded.is_target, start, stop)
    return Piece(
        ids=encoded.ids[start:stop],
        is_target=[False, *encoded.is_target[start + 1 : stop]],
        meta=meta | {"target_bytes": target_bytes},
    )
