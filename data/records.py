"""What the pipeline reads: documents to distil on, problems to evaluate on."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shared.files import sha256_json

ORIGINS = ("teacher", "student")  # of documents that a model has written


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """Text with a prompt part and a completion part (or a chat); line ends are LF.

    Args:
        id: unique within its set.
        source: where it comes from, such as `mbpp`.
        prompt: what a model is given; never ends in white space.
        completion: the text to learn; it follows the prompt directly and ends in one newline.
        messages: a chat (`role`, `content`) in place of prompt and completion; the targets are the assistant's turns.
        origin: who wrote the completion: `corpus`, or the `teacher` or a `student` (see `codedistill generate`).
        verdict: what the prompt's own tests said of a completion that a model wrote; None where it was not run.
        is_cut: the model was stopped by its limit of tokens, so the text neither ends in a newline nor is closed.
    """

    id: str
    source: str
    prompt: str = ""
    completion: str = ""
    messages: tuple[Mapping[str, str], ...] | None = None
    origin: str = "corpus"
    verdict: str | None = None
    is_cut: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of the text, without id and source."""
        messages = None if self.messages is None else [dict(message) for message in self.messages]
        return sha256_json({"prompt": self.prompt, "completion": self.completion, "messages": messages})


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One executable benchmark problem.

    With `same_process` the test uses other names of the program than the entry point. It then runs in the program's own
    process, where a verdict can be forged.
    """

    task_id: str  # unique within its benchmark
    prompt: str  # what a completion continues: a function's head, or a description that a whole program answers
    test: str  # defines `check(candidate)`, which is called with what the program calls `entry_point`
    entry_point: str  # an identifier
    canonical_solution: str | None = None  # the published completion; None where there is none
    same_process: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentSet:
    """The documents of one split, in order, and their origin; None where that is unknown."""

    name: str  # the data set's; a local file's without its folder
    split: str
    revision: str | None  # the Hub commit, or the Python version for `stdlib`; None for local files
    config: str | None  # of a Hub data set
    license: str | None  # SPDX identifier
    attribution: str | None  # whom to credit, and where it is published
    fingerprint: str  # of what they were read from (`data.load.fingerprint`)
    documents: Iterable[Document]  # of `open_documents` read at each iteration, of `load_documents` in memory
    num_documents: int | None = None  # at most so many; None where only reading tells

    @property
    def digest(self) -> str:
        """SHA-256 over every document's id and digest, in order."""
        running = RunningDigest()
        for document in self.documents:
            running.add(document.id, document.digest)
        return running.hexdigest()


class RunningDigest:
    """The digest of a `DocumentSet`, document by document: SHA-256 of the JSON list of pairs (id, digest)."""

    def __init__(self) -> None:
        self._hash, self._separator = hashlib.sha256(b"["), b""

    def add(self, id: str, digest: str) -> None:
        """Take one more document in."""
        self._hash.update(self._separator + json.dumps([id, digest], separators=(",", ":")).encode())
        self._separator = b","

    def hexdigest(self) -> str:
        """SHA-256 (hex) of the documents so far."""
        ended = self._hash.copy()
        ended.update(b"]")
        return ended.hexdigest()
