"""What `teacher build` is asked for: identity and options, and whether a finished cache answers it."""

import contextlib
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.decontaminate import RULE, Index, load_index
from data.load import Source, fingerprint, open_documents
from data.records import DocumentSet
from shared import tracking
from shared.cache.directory import has_leftovers, is_finished
from shared.cache.format import BUILD
from shared.cache.identity import require_same_labels
from shared.cache.manifest import read_manifest
from shared.cache.reader import Cache
from shared.checkpoints import ModelFiles, head_and_positions, identify_model
from shared.errors import ConfigError, ResumeError, require
from shared.files import read_json, sha256_file
from shared.machine import versions
from shared.records import to_dict
from shared.tokenizer import (
    Tokenizer,
    document_ends,
    load_tokenizer,
    record_ends,
    special_ids,
    tokenizer_digest,
)
from stage1_teacher.config import TeacherConfig
from stage1_teacher.documents import Limits, describe_loss
from stage1_teacher.engine import HiddenStates
from stage1_teacher.store import TokenStore

NAMED = ("teacher", "revision", "dataset", "dataset_revision", "dataset_config", "split")  # recorded with the source
FREE = (*NAMED, "limit_docs", "max_lossy", "device_map", "gpus_per_teacher")  # a resume may have others


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be built.

    Raises:
        ConfigError: what cannot be used of teacher and data set, as each is first asked for.
    """

    config: TeacherConfig
    out: Path  # the cache's directory
    files: ModelFiles  # the teacher's
    skip_in: tuple[Cache, ...] = ()  # finished caches whose documents are skipped
    part: tuple[int, int] | None = None  # i and N where only the i-th of N parts is built
    hidden: HiddenStates | None = None  # where an engine has run the teacher

    @functools.cached_property
    def origin(self) -> Source:
        """What names the data set."""
        config = self.config
        return Source(
            config.dataset,
            config.split,
            limit_docs=config.limit_docs,
            columns=config.columns,
            revision=config.dataset_revision,
            config=config.dataset_config,
        )

    @functools.cached_property
    def data(self) -> DocumentSet:
        """The data set, opened."""
        return open_documents(self.origin)

    @functools.cached_property
    def benchmarks(self) -> Index:
        """What documents are compared with."""
        config, begun = self.config, self._begun_with()
        names = config.decontaminate if begun is None else ",".join(begun.get("names", [])) or "none"
        return load_index(names, config.dataset, config.dataset_revision)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The teacher's, with the documents' ends recorded."""
        tokenizer = load_tokenizer(self.files.path)
        record_ends(tokenizer, self.config.open_with, self.config.close_with)
        return tokenizer

    @functools.cached_property
    def limits(self) -> Limits:
        """What documents are cut to."""
        head_width, positions = head_and_positions(self.files.path)
        asked = self.config.max_length
        require(
            asked is None or positions is None or asked <= positions,
            "--max-length is beyond the teacher's positions",
            expected=f"at most {positions}",
            got=asked,
        )
        require(
            self.config.top_k <= head_width,
            "--top-k is beyond the teacher's vocabulary",
            expected=f"at most {head_width}",
            got=self.config.top_k,
            fix="a smaller --top-k",
        )
        return Limits(max_length=asked or positions, on_long=self.config.on_long, head_width=head_width)

    def options(self) -> dict[str, Any]:
        """What was asked for, by content, but for the documents: `build.json` holds both, and a resume must match."""
        files = self.files
        return {
            "teacher": {
                "commit": files.commit,
                "weights_digest": files.weights_digest,
                "config_digest": files.config_digest,
                "tokenizer_files_digest": files.tokenizer_files_digest,
            },
            "skip_in": self._skipped(),
            "benchmarks": self._compared(),
            **({"part": list(self.part)} if self.part else {}),
            **({"engine": self.hidden.record.label} if self.hidden else {}),
            **{key: value for key, value in to_dict(self.config).items() if key not in FREE},
        }

    def _compared(self) -> dict[str, Any]:
        """The benchmarks whose text is left out, the rule and the digest of both; empty where there are none."""
        if is_finished(self.out) and (begun := self._begun_with()) is not None:
            return begun
        names = list(self.benchmarks.problems)
        return {"names": names, "rule": RULE, "digest": self.benchmarks.digest} if names else {}

    def _begun_with(self) -> dict[str, Any] | None:
        """What `auto` meant when the cache was begun, which it means until the cache is finished and after."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            options = json.loads((self.out / BUILD).read_bytes())["options"]
            if options["decontaminate"] == self.config.decontaminate == "auto":
                return dict(options["benchmarks"])
        return None

    def _skipped(self) -> list[str]:
        return [cache.manifest.digest for cache in self.skip_in]

    def store_request(self) -> dict[str, Any]:
        """All that decides what a token store of the documents holds."""
        code = (
            (Path(__file__).parent, ("documents.py", "store.py")),
            (Path(tracking.__file__).parent, ("tokenizer.py", "chat.py")),
        )
        return {
            "fingerprint": self.data.fingerprint,
            "tokenizer": [tokenizer_digest(self.tokenizer), self.files.tokenizer_files_digest],
            "ends": [list(end) for end in document_ends(self.tokenizer)],
            "limits": to_dict(self.limits),
            "code": [sha256_file(folder / name) for folder, names in code for name in names],
            "versions": versions("tokenizers", "transformers", "jinja2"),
            "skip_in": self._skipped(),
            "benchmarks": self._compared(),
        }

    def identity(self, head: str) -> dict[str, Any]:
        """Who makes the labels; `head` is the precision of the teacher's head."""
        config, files, ends = self.config, self.files, document_ends(self.tokenizer)
        labels = {
            "temperatures": list(config.temperatures),
            "top_k": config.top_k,
            "top_p": config.top_p,
            "codec": config.codec,
            "dtype": config.dtype,
            "head": head,
            "opening": list(ends.opening),
            "closing": list(ends.closing),
        }
        if self.hidden:
            labels["engine"] = self.hidden.record.label
        if config.load_in:
            labels["load_in"] = config.load_in
        if config.samples:
            labels["samples"] = [config.samples, config.samples_from, config.samples_temperature]
        return {
            "teacher": {
                "name": files.name,
                "commit": files.commit,
                "license": files.license,
                "attribution": files.attribution,
                "weights_digest": files.weights_digest,
                "config_digest": files.config_digest,
            },
            "tokenizer": {"digest": tokenizer_digest(self.tokenizer), **special_ids(self.tokenizer)},
            "labels": labels,
        }

    def source(self, store: TokenStore) -> dict[str, Any]:
        """The manifest's record of the data set."""
        data, facts = store.data, store.facts
        return {
            **origin_record(data, facts.digest),
            "license": data.license,
            "attribution": data.attribution,
            "fingerprint": data.fingerprint,
            "num_documents": facts.num_documents,
            **({"num_skipped": facts.num_skipped} if self.skip_in else {}),
            "benchmarks": self._compared(),
            "num_contaminated": facts.contaminated,
            "contaminated": facts.matches,
            "written": facts.written,
            "num_long": facts.long.count,
            "on_long": self.config.on_long,
            "num_lossy": facts.lossy.count,
            "num_without_targets": facts.without_targets.count,
            "config": {key: value for key, value in to_dict(self.config).items() if key not in NAMED},
        }

    def require_restored(self, store: TokenStore) -> None:
        """Refuse a tokenizer that does not give enough of the documents back as they were.

        Raises:
            ConfigError: with the first such document.
        """
        lossy, num_documents, most = store.facts.lossy, store.facts.num_new, self.config.max_lossy
        if lossy.count > most * num_documents:
            first = next(document for document in self.data.documents if document.id == lossy.ids[0])
            raise ConfigError(
                "the tokenizer does not give documents back as they were",
                where=self.files.name,
                expected=f"at most {most:.0%} of {num_documents:,} documents (--max-lossy)",
                got=f"{lossy.count:,}, such as {describe_loss(first, self.tokenizer)}",
                fix="take a teacher whose tokenizer keeps code as it is: the student learns only what the tokenizer "
                "keeps",
            )

    def require_skipped_labels(self, identity: dict[str, Any] | None = None) -> None:
        """Refuse skipped documents whose labels are of another kind than this build's, as far as those are known."""
        for cache in self.skip_in:
            theirs = cache.manifest.identity
            # The head's precision is known once the teacher is loaded.
            ours = identity or self.identity(theirs["labels"].get("head", "none"))
            require_same_labels(theirs, ours, ours_name=cache.path, theirs_name="this build")


def origin_record(data: DocumentSet, digest: str) -> dict[str, Any]:
    """What tells a data set from every other: of one of the Hub also its configuration."""
    configuration = {"configuration": data.config} if data.config else {}
    return {"name": data.name, "split": data.split, "revision": data.revision, **configuration, "digest": digest}


def find_teacher(config: TeacherConfig) -> ModelFiles:
    """The files of the teacher that a configuration names.

    Raises:
        ConfigError: teacher or data set are not named, or the teacher cannot be used.
    """
    for name in ("teacher", "dataset"):
        fix = f"pass --{name}, or set it in the configuration file"
        require(getattr(config, name), f"--{name} is missing", fix=fix)
    return identify_model(config.teacher, config.revision)


def is_done(task: Task) -> bool:
    """Whether a whole, finished cache of the same request is there."""
    if not is_finished(task.out) or has_leftovers(task.out):
        return False
    options = read_json(task.out / BUILD)["options"]
    if any(options.get(key) != value for key, value in ({"part": None, "engine": None} | task.options()).items()):
        return False
    now = fingerprint(task.origin)
    before = [source.get("fingerprint") for source in read_manifest(task.out).sources]
    # Documents are read only where their fingerprint leaves open whether they are the same: parsing takes seconds.
    if now is not None and before == [now]:
        return True
    return bool(options.get("sources") == [origin_record(task.data, task.data.digest)])


def refuse_moved(task: Task) -> None:
    """Refuse to resume at other commits than the cache was begun at, also where the content is the same."""
    try:
        options = json.loads((task.out / BUILD).read_bytes())["options"]
        before = {"teacher": options["teacher"]["commit"], "data set": options["sources"][0]["revision"]}
    except (OSError, ValueError, LookupError, TypeError):
        return  # nothing begun, or not by us: the writer says which
    now = {"teacher": task.files.commit, "data set": task.data.revision}
    flags = {"teacher": "--revision", "data set": "--dataset-revision"}
    for what, flag in flags.items():
        commits = (before[what], now[what])
        if before[what] != now[what] and all(re.fullmatch(r"[0-9a-f]{40}", str(commit)) for commit in commits):
            raise ResumeError(
                f"the {what} has moved since the cache was begun",
                where=task.out,
                expected=before[what],
                got=now[what],
                fix=f"pass {flag} {before[what]}, or name another --out",
            )
