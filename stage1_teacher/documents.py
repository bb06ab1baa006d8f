"""Documents → token segments within the length limit → shards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.records import Document
from shared.cache.format import Array
from shared.chat import encode_chat
from shared.errors import ConfigError, require
from shared.tokenizer import (
    Encoded,
    Tokenizer,
    count_target_bytes,
    decode,
    document_ends,
    encode_documents,
    encode_text,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """The tokens of a document, or of a part of a long one.

    Attributes:
        ids: u32 `[n]`, token ids.
        is_target: bool `[n]`, for each id whether it is a training target; never the first, which nothing predicts.
        meta: the cache's JSON object of the document.
    """

    ids: Array
    is_target: Array
    meta: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What documents are cut to.

    Attributes:
        max_length: most tokens of a segment; None for no limit.
        on_long: `split` into segments that overlap by one token, so that every token is predicted exactly once;
            `truncate` to the first segment; `drop`.
        head_width: rows of the teacher's head.
    """

    max_length: int | None
    on_long: str
    head_width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CutDocument:
    """A document's segments, and what happened to it.

    Attributes:
        is_long: it is longer than the limit.
        is_lossy: the tokenizer does not restore it.
        lacks_targets: it has targets, all of which lie beyond the limit.
    """

    document: Document
    segments: list[Segment]
    is_long: bool
    is_lossy: bool
    lacks_targets: bool


def cut_documents(
    documents: Sequence[tuple[Document, str]],
    tokenizer: Tokenizer,
    limits: Limits,
    encodings: Sequence[Any] | None = None,
) -> list[CutDocument]:
    """Tokenise documents, each given with its digest, on all processors and bring each within the limit.

    Args:
        documents: texts with prompt and completion, or chats.
        tokenizer: the teacher's.
        limits: of the segments.
        encodings: of the documents that are no chats; see `shared.tokenizer.encode_documents`.

    Raises:
        ConfigError: a chat that the template refuses, or an id that the head cannot predict; the document is named.
    """
    parts = [(document.prompt, document.completion) for document, _ in documents if document.messages is None]
    encoded = iter(encode_documents(tokenizer, parts, encodings))
    return [
        _cut(
            document,
            digest,
            next(encoded) if document.messages is None else _encode_chat(document, tokenizer),
            tokenizer,
            limits,
        )
        for document, digest in documents
    ]


def _cut(document: Document, digest: str, encoded: Encoded, tokenizer: Tokenizer, limits: Limits) -> CutDocument:
    """Bring one tokenised document within the limit; one that was cut off is not closed."""
    closing = len(document_ends(tokenizer).closing) if document.is_cut else 0
    if closing:
        encoded = replace(encoded, ids=encoded.ids[:-closing], is_target=encoded.is_target[:-closing])
    length, max_length = len(encoded.ids), limits.max_length
    require(
        encoded.ids and max(encoded.ids) < limits.head_width,
        "a document that the teacher cannot label",
        where=f"{document.source} {document.id}",
        expected=f"token ids below {limits.head_width}, at least one",
        got=max(encoded.ids, default="none"),
    )
    starts, is_long = [0], max_length is not None and length > max_length
    if is_long:
        assert max_length is not None
        starts = {"split": list(range(0, length - 1, max_length - 1)), "truncate": [0], "drop": []}[limits.on_long]
    meta = {"id": document.id, "source": document.source, "origin": document.origin, "digest": digest}
    segments = []
    for part, start in enumerate(starts):
        stop = length if max_length is None else min(start + max_length, length)
        place = {"part": part, "parts": len(starts)} if len(starts) > 1 else {}
        segments.append(_segment(encoded, start, stop, tokenizer, meta | place))
    has_targets = any(segment.is_target.any() for segment in segments)
    return CutDocument(
        document=document,
        segments=segments,
        is_long=is_long,
        is_lossy=not encoded.lossless,
        lacks_targets=bool(starts) and any(encoded.is_target[1:]) and not has_targets,
    )


def describe_loss(document: Document, tokenizer: Tokenizer) -> str:
    """A document's id, and where its text first differs from what the tokenizer makes of its ids."""
    if document.messages is not None:
        return f"{document.id}, a chat"
    text = document.prompt + document.completion
    restored = decode(tokenizer, encode_text(tokenizer, text))
    at = next(
        (i for i, (a, b) in enumerate(zip(text, restored, strict=False)) if a != b), min(len(text), len(restored))
    )
    part = slice(max(at - 10, 0), at + 20)
    return f"{document.id}, where {text[part]!r} becomes {restored[part]!r}"


def _encode_chat(document: Document, tokenizer: Tokenizer) -> Encoded:
    try:
        return encode_chat(tokenizer, document.messages or ())
    except ConfigError as error:
        places = [f"{document.source} {document.id}", error.where]
        where = ", ".join(str(place) for place in places if place is not None)
        raise ConfigError(error.what, where=where, expected=error.expected, got=error.got, fix=error.fix) from error


def _segment(encoded: Encoded, start: int, stop: int, tokenizer: Tokenizer, meta: dict[str, Any]) -> Segment:
    target_bytes = encoded.target_bytes
    if stop - start < len(encoded.ids):
        target_bytes = count_target_bytes(tokenizer, encoded.ids, encoded.is_target, start, stop)
    return Segment(
        ids=np.array(encoded.ids[start:stop], np.uint32),
        is_target=np.array([False, *encoded.is_target[start + 1 : stop]], bool),
        meta=meta | {"target_bytes": target_bytes},
    )


def plan_shards(lengths: Sequence[int] | Array, shard_tokens: int) -> list[range]:
    """Cut segments, in order, into shards of at most `shard_tokens` tokens; a longer segment is a shard by itself.

    A pure function of the lengths, so that every resume and every number of processes plans the same shards.

    Args:
        lengths: tokens of each segment.
        shard_tokens: most tokens of a shard.

    Returns:
        The segment indices of each shard.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    shards: list[range] = []
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, before + shard_tokens, side="right")), start + 1)
        shards.append(range(start, stop))
        start = stop
    return shards
