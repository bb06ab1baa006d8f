"""The token store: a corpus tokenised once, in flat files beside the cache that is built from it.

All processes of a build map the same files, and a resume maps them again. Only what a shard needs is in memory. The
store's JSON is written last and holds every file's SHA-256, so a store is whole or it is made again.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data.decontaminate import Index
from data.records import Document, DocumentSet, RunningDigest
from shared.cache.directory import check_files, plain_errors
from shared.cache.format import Array, indptr
from shared.cache.manifest import FileEntry, seal, unseal
from shared.errors import DistillError, require
from shared.files import fsync_directory, link_file, write_bytes
from shared.lock import Lock
from shared.process import log
from shared.progress import progress
from shared.records import from_dict, to_dict
from shared.tokenizer import TextEncoder, Tokenizer
from stage1_teacher.documents import CutDocument, Limits, Segment, cut_documents

SEAL = "store.json"
TOKENS, TARGETS, LENGTHS, METAS, META_LENGTHS = "tokens.u32", "targets.u8", "lengths.u32", "metas.jsonl", "metas.u32"
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 20  # tokenised at once; a longer document is a batch by itself
MAX_CHARACTERS = 1 << 26  # of one document: tokenising takes some 50 times that in bytes
BATCHES_AHEAD = 2  # that are encoded or wait for it
NAMED_IDS, LISTED_MATCHES = 5, 1_000
SAMPLE = 16

Batch = list[tuple[Document, str]]  # documents with their digests


@dataclasses.dataclass(kw_only=True, slots=True)
class Noted:
    """How many documents something happened to, and the ids of the first."""

    count: int = 0
    ids: list[str] = dataclasses.field(default_factory=list)

    def add(self, id: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.ids) < NAMED_IDS:
            self.ids.append(id)


@dataclasses.dataclass(kw_only=True, slots=True)
class Facts:
    """What one pass over a data set has found; `long`, `lossy` and `without_targets`: see `CutDocument`."""

    digest: str = ""  # of the data set
    num_documents: int = 0  # in it
    num_skipped: int = 0  # of these, documents that another cache holds
    contaminated: int = 0  # documents left out since they share text with a benchmark
    # Of the first 1,000 of these the benchmark's problem and the rule that says so (`data.decontaminate`).
    matches: dict[str, str] = dataclasses.field(default_factory=dict)
    # Documents that models wrote, and how many of them passed their tests, by who wrote them.
    written: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    num_tokens: int = 0  # of the segments
    num_targets: int = 0
    long: Noted = dataclasses.field(default_factory=Noted)
    lossy: Noted = dataclasses.field(default_factory=Noted)
    without_targets: Noted = dataclasses.field(default_factory=Noted)
    # Up to 16 documents that are no chats, the first among them, evenly spaced.
    sample: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def num_new(self) -> int:
        """Documents that are neither skipped nor left out."""
        return self.num_documents - self.num_skipped - self.contaminated

    def documents(self) -> list[Document]:
        """The sample."""
        return [Document(**fields) for fields in self.sample]


class TokenStore:
    """A finished store. Its files stay readable here after another process has removed them.

    Attributes:
        facts: of the pass that made it.
        data: the data set's origin, without its documents.
        lengths: i64 `[D]`, tokens of each segment.

    Raises:
        OSError, ValueError, DistillError: there is none, or its JSON is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sealed = unseal((folder / SEAL).read_bytes())
        self.request: dict[str, Any] = sealed["request"]
        self.files = {name: FileEntry(**entry) for name, entry in sealed["files"].items()}
        self.facts = from_dict(Facts, sealed["facts"], where=str(folder / SEAL))
        self.data = DocumentSet(**sealed["data"], documents=())
        self.lengths: Array = np.fromfile(folder / LENGTHS, np.uint32).astype(np.int64)
        self._token_ends = indptr(self.lengths)
        self._meta_ends = indptr(np.fromfile(folder / META_LENGTHS, np.uint32))
        self._open = {name: (folder / name).open("rb") for name in (TOKENS, TARGETS, METAS)}

    def __len__(self) -> int:
        return len(self.lengths)

    def segments(self, positions: range) -> list[Segment]:
        """Consecutive segments. They are views of the files, whose pages leave memory with them."""
        first, stop = positions.start, positions.stop
        ends = self._token_ends[first : stop + 1] - self._token_ends[first]
        tokens = self._map(TOKENS, np.uint32, int(self._token_ends[first]), int(ends[-1]))
        targets = self._map(TARGETS, np.bool_, int(self._token_ends[first]), int(ends[-1]))
        start, size = int(self._meta_ends[first]), int(self._meta_ends[stop] - self._meta_ends[first])
        metas = self._map(METAS, np.uint8, start, size).tobytes().splitlines()
        return [
            Segment(ids=tokens[a:b], is_target=targets[a:b], meta=json.loads(meta))
            for a, b, meta in zip(ends[:-1], ends[1:], metas, strict=True)
        ]

    def _map(self, name: str, dtype: type, start: int, count: int) -> Array:
        offset = start * np.dtype(dtype).itemsize
        mapped: Array = np.memmap(self._open[name], dtype, mode="r", offset=offset, shape=(count,))
        return mapped.view(np.ndarray)

    def remove(self) -> None:
        """Remove the store's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def store_folder(out: Path) -> Path:
    """Where the tokens lie until the cache is finished: beside it, for a cache holds nothing that is of no cache."""
    return out.parent / f".{out.name}.tokens"


def find_store(folder: Path, request: Mapping[str, Any]) -> TokenStore | None:
    """The store in a folder, if it is whole and was made for this request."""
    if not (folder / SEAL).exists():
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, DistillError):
        store = TokenStore(folder)
        if store.request != request:
            return None
        if not check_files(folder, store.files):
            return store
    log(f"{folder} is damaged; the documents are tokenised again")
    return None


def make_store(
    folder: Path,
    request: Mapping[str, Any],
    data: DocumentSet,
    tokenizer: Tokenizer,
    limits: Limits,
    *,
    skipped: Container[str] = (),
    benchmarks: Index | None = None,
) -> TokenStore:
    """Tokenise a data set into a folder, in place of what is in it. An exception leaves no folder behind.

    Where a store of the same request lies beside the folder, its files are linked instead: the parts of a build, and
    builds of several K, are tokenised once.

    Args:
        folder: made where it is missing.
        request: all that decides the store's content, as JSON values.
        data: read once, from its first to its last document.
        tokenizer: the teacher's, with its ends recorded; not used by anyone else meanwhile.
        limits: of the segments.
        skipped: digests of documents to leave out.
        benchmarks: documents that share text with one of these are left out, too.

    Raises:
        ConfigError: documents that cannot be read or labelled, or none is left.
        ResumeError: another process is at it, or the disk is full.
    """
    with plain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder, "tokenising the documents of this cache")
        try:
            with contextlib.suppress(OSError):  # the other build has ended and removed it
                if _link_store(folder, request):
                    return TokenStore(folder)
            for file in folder.iterdir():
                if file != lock.path:
                    file.unlink()
            with contextlib.ExitStack() as stack:
                writer = _Writer(folder, stack)
                _tokenise(writer, data, tokenizer, limits, skipped, benchmarks)
                writer.finish(request, data)
            return TokenStore(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            lock.release()


def _link_store(folder: Path, request: Mapping[str, Any]) -> bool:
    """Give a folder the files of a whole store beside it that was made for this request, if there is one."""
    for other in sorted(set(folder.parent.glob(store_folder(Path("*")).name)) - {folder}):
        if store := find_store(other, request):
            for name in (*store.files, SEAL):
                if not link_file(other / name, folder / name):
                    shutil.copyfile(other / name, folder / name)
            log(f"{store.facts.num_new:,} documents are tokenised already, in {other}")
            return True
    return False


def _tokenise(
    writer: "_Writer",
    data: DocumentSet,
    tokenizer: Tokenizer,
    limits: Limits,
    skipped: Container[str],
    benchmarks: Index | None,
) -> None:
    """Read, cut and write batches while others are encoded, on all processors, in a thread beside this one."""
    encoder, pending = TextEncoder(tokenizer), collections.deque[tuple[Batch, Future[list[Any]]]]()

    def write() -> None:
        batch, encodings = pending.popleft()
        writer.add(cut_documents(batch, tokenizer, limits, encodings.result()))
        num_tokens = writer.facts.num_tokens
        bar.advance(
            writer.facts.num_documents - bar.done, f"{num_tokens:,} tokens, {num_tokens / bar.seconds():,.0f} tokens/s"
        )

    with progress("tokenising", data.num_documents, "documents") as bar, ThreadPoolExecutor(1, "encoder") as pool:
        for batch in _batches(_new_documents(data.documents, writer.facts, skipped, benchmarks)):
            texts = [document.prompt + document.completion for document, _ in batch if document.messages is None]
            pending.append((batch, pool.submit(encoder.encode, texts)))
            if len(pending) > BATCHES_AHEAD:
                write()
        while pending:
            write()
    require(
        writer.facts.num_new,
        "every document is in a cache of --skip-in, or shares text with a benchmark",
        where=data.name,
        got=f"{writer.facts.num_skipped:,} in caches, {writer.facts.contaminated:,} that share text",
        fix="train on these caches",
    )
    require(
        writer.facts.num_tokens,
        "no document is left",
        expected=f"documents of at most {limits.max_length} tokens",
        got=writer.facts.long.ids[:3],
    )


def _new_documents(
    documents: Iterable[Document], facts: Facts, skipped: Container[str], benchmarks: Index | None
) -> Iterator[tuple[Document, str]]:
    """Each document that is neither skipped nor left out, with its digest; the facts get the digest of all."""
    running = RunningDigest()
    for document in documents:
        digest = document.digest
        running.add(document.id, digest)
        facts.num_documents += 1
        if digest in skipped:
            facts.num_skipped += 1
        elif benchmarks and (match := benchmarks.match(document)):
            facts.contaminated += 1
            if len(facts.matches) < LISTED_MATCHES:
                facts.matches[document.id] = f"{match.problem}, {match.rule}"
        else:
            if document.origin != "corpus":
                counts = facts.written.setdefault(document.origin, {"documents": 0, "passed": 0})
                counts["documents"] += 1
                counts["passed"] += document.verdict == "passed"
            yield document, digest
    facts.digest = running.hexdigest()


def _batches(documents: Iterable[tuple[Document, str]]) -> Iterator[Batch]:
    """Consecutive documents, no more at once than fit in little memory."""
    batch: Batch = []
    characters = 0
    for document, digest in documents:
        size = len(document.prompt) + len(document.completion)
        size += sum(len(text) for message in document.messages or () for text in message.values())
        require(
            size <= MAX_CHARACTERS,
            "a document is too large to be tokenised",
            where=f"{document.source} {document.id}",
            expected=f"at most {MAX_CHARACTERS:,} characters",
            got=f"{size:,}",
            fix="cut it into several",
        )
        if batch and (len(batch) == BATCH_DOCUMENTS or characters + size > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append((document, digest))
        characters += size
    if batch:
        yield batch


class _Writer:
    """Writes a store's files one behind the other, and hashes what it writes."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.facts = Facts()
        self._folder, self._num_plain, self._stride = folder, 0, 1
        names = (TOKENS, TARGETS, LENGTHS, METAS, META_LENGTHS)
        self._files = {name: stack.enter_context((folder / name).open("wb")) for name in names}
        self._hashes = {name: hashlib.sha256() for name in names}

    def add(self, documents: Iterable[CutDocument]) -> None:
        """Write documents."""
        facts, lengths, meta_lengths = self.facts, list[int](), list[int]()
        for each in documents:
            happened = ((facts.long, each.is_long), (facts.lossy, each.is_lossy))
            for noted, did in (*happened, (facts.without_targets, each.lacks_targets)):
                if did:
                    noted.add(each.document.id)
            if each.document.messages is None:
                self._sample(each.document)
            for segment in each.segments:
                meta = json.dumps(segment.meta).encode() + b"\n"
                self._write(TOKENS, segment.ids.tobytes())
                self._write(TARGETS, segment.is_target.tobytes())
                self._write(METAS, meta)
                lengths.append(len(segment.ids))
                meta_lengths.append(len(meta))
                facts.num_targets += int(segment.is_target.sum())
        facts.num_tokens += sum(lengths)
        self._write(LENGTHS, np.array(lengths, np.uint32).tobytes())
        self._write(META_LENGTHS, np.array(meta_lengths, np.uint32).tobytes())

    def finish(self, request: Mapping[str, Any], data: DocumentSet) -> None:
        """Make all files durable; then write the JSON that says they are whole."""
        entries = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            entries[name] = {"bytes": file.tell(), "sha256": self._hashes[name].hexdigest()}
        fsync_directory(self._folder)
        origin = {each.name: getattr(data, each.name) for each in dataclasses.fields(data) if each.name != "documents"}
        facts = to_dict(self.facts)
        sealed = {"request": dict(request), "data": origin, "facts": facts, "files": entries}
        write_bytes(self._folder / SEAL, seal(sealed))

    def _write(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self._hashes[name].update(data)

    def _sample(self, document: Document) -> None:
        """Keep every n-th document that is no chat; n doubles when there are too many."""
        sample = self.facts.sample
        if self._num_plain % self._stride == 0:
            sample.append({key: getattr(document, key) for key in ("id", "source", "prompt", "completion")})
            if len(sample) > SAMPLE:
                del sample[1::2]
                self._stride *= 2
        self._num_plain += 1
