"""Documents → token segments within the length limit → shards."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.records import Document
from shared.chat import encode_chat
from shared.errors import ConfigError, require
from shared.tokenizer import Encoded, Tokenizer, count_target_bytes, decode, encode_document, encode_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """The tokens of a document, or of a part of a long one.

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
    """All segments in order, and the ids of the documents that something happened to.

    Attributes:
        long: documents that are longer than the limit.
        lossy: documents that the tokenizer does not restore.
        without_targets: documents that have targets, all of which lie beyond the limit.
    """

    segments: list[Segment] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    lossy: list[str] = field(default_factory=list)
    without_targets: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [len(segment.ids) for segment in self.segments]


def cut_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, *, max_length: int | None, on_long: str, head_width: int
) -> Corpus:
    """Tokenise documents and bring each within the limit.

    Args:
        documents: texts with prompt and completion.
        tokenizer: the teacher's.
        max_length: most tokens of a segment; None for no limit.
        on_long: `split` into segments that overlap by one token, so that every token is predicted exactly once;
            `truncate` to the first segment; `drop`.
        head_width: rows of the teacher's head.

    Raises:
        ConfigError: an id that the head cannot predict (the document is named), or no document is left.
    """
    corpus = Corpus()
    for document in documents:
        encoded = _encode(document, tokenizer)
        length = len(encoded.ids)
        require(
            encoded.ids and max(encoded.ids) < head_width,
            "a document that the teacher cannot label",
            where=f"{document.source} {document.id}",
            expected=f"token ids below {head_width}, at least one",
            got=max(encoded.ids, default="none"),
        )
        if not encoded.lossless:
            corpus.lossy.append(document.id)
        starts = [0]
        if max_length is not None and length > max_length:
            corpus.long.append(document.id)
            starts = {"split": list(range(0, length - 1, max_length - 1)), "truncate": [0], "drop": []}[on_long]
        meta = {"id": document.id, "source": document.source, "origin": "corpus", "digest": document.digest}
        first = len(corpus.segments)
        for part, start in enumerate(starts):
            stop = length if max_length is None else min(start + max_length, length)
            place = {"part": part, "parts": len(starts)} if len(starts) > 1 else {}
            corpus.segments.append(_segment(encoded, start, stop, tokenizer, meta | place))
        has_targets = any(any(segment.is_target) for segment in corpus.segments[first:])
        if starts and any(encoded.is_target[1:]) and not has_targets:
            corpus.without_targets.append(document.id)
    require(
        corpus.segments,
        "no document is left",
        expected=f"documents of at most {max_length} tokens",
        got=corpus.long[:3],
    )
    return corpus


def describe_loss(documents: Iterable[Document], id: str, tokenizer: Tokenizer) -> str:
    """A document's id, and where its text first differs from what the tokenizer makes of its ids."""
    document = next(document for document in documents if document.id == id)
    if document.messages is not None:
        return f"{id}, a chat"
    text = document.prompt + document.completion
    restored = decode(tokenizer, encode_text(tokenizer, text))
    at = next(
        (i for i, (a, b) in enumerate(zip(text, restored, strict=False)) if a != b), min(len(text), len(restored))
    )
    part = slice(max(at - 10, 0), at + 20)
    return f"{id}, where {text[part]!r} becomes {restored[part]!r}"


def _encode(document: Document, tokenizer: Tokenizer) -> Encoded:
    if document.messages is None:
        return encode_document(tokenizer, document.prompt, document.completion)
    try:
        return encode_chat(tokenizer, document.messages)
    except ConfigError as error:
        places = [f"{document.source} {document.id}", error.where]
        where = ", ".join(str(place) for place in places if place is not None)
        raise ConfigError(error.what, where=where, expected=error.expected, got=error.got, fix=error.fix) from error


def _segment(encoded: Encoded, start: int, stop: int, tokenizer: Tokenizer, meta: dict[str, Any]) -> Segment:
    target_bytes = encoded.target_bytes
    if stop - start < len(encoded.ids):
        target_bytes = count_target_bytes(tokenizer, encoded.ids, encoded.is_target, start, stop)
    return Segment(
        ids=encoded.ids[start:stop],
        is_target=[False, *encoded.is_target[start + 1 : stop]],
        meta=meta | {"target_bytes": target_bytes},
    )


def plan_shards(lengths: Sequence[int], shard_tokens: int) -> list[range]:
    """Cut segments, in order, into shards of at most `shard_tokens` tokens; a longer segment is a shard by itself.

    A pure function of the lengths, so that every resume and every number of processes plans the same shards.

    Args:
        lengths: tokens of each segment.
        shard_tokens: most tokens of a shard.

    Returns:
        The segment indices of each shard.
    """
    shards: list[range] = []
    start = tokens = 0
    for index, length in enumerate(lengths):
        if index > start and tokens + length > shard_tokens:
            shards.append(range(start, index))
            start, tokens = index, 0
        tokens += length
    return [*shards, range(start, len(lengths))] if lengths else []
