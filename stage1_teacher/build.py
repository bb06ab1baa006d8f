"""Build a logit cache: request, resume and identity around the capture of its shards."""

import contextlib
import datetime
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.decontaminate import RULE, Index, load_index
from data.load import Source, fingerprint, open_documents
from data.records import DocumentSet
from shared import tracking
from shared.cache.directory import has_leftovers, is_finished, plain_errors
from shared.cache.format import BUILD, MANIFEST
from shared.cache.identity import require_same_labels
from shared.cache.manifest import read_manifest, read_record, written_text
from shared.cache.reader import Cache
from shared.cache.writer import CacheWriter, check_folder
from shared.checkpoints import ModelFiles, head_and_positions, identify_model
from shared.errors import ConfigError, DistillError, ResumeError, require
from shared.files import output_path, read_json, sha256_file, sha256_json, write_json
from shared.lock import LOCK, Lock
from shared.machine import versions
from shared.process import is_main_process, log, rank, world_size
from shared.records import to_dict
from shared.tokenizer import (
    Tokenizer,
    document_ends,
    load_tokenizer,
    record_ends,
    save_tokenizer,
    special_ids,
    tokenizer_digest,
)
from stage1_teacher.config import TeacherConfig
from stage1_teacher.disk import least_bytes_per_token, require_space
from stage1_teacher.documents import Limits, describe_loss, plan_shards
from stage1_teacher.engine import HiddenStates
from stage1_teacher.store import TokenStore, find_store, make_store, store_folder

if TYPE_CHECKING:
    from shared.logits import LogitSource

LABELLING = datetime.timedelta(days=30)  # ranks may work that long before they meet again
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
            **_origin(data, facts.digest),
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


def _origin(data: DocumentSet, digest: str) -> dict[str, Any]:
    """What tells a data set from every other: of one of the Hub also its configuration."""
    configuration = {"configuration": data.config} if data.config else {}
    return {"name": data.name, "split": data.split, "revision": data.revision, **configuration, "digest": digest}


def build_cache(
    config: TeacherConfig,
    out: Path,
    *,
    skip_in: Sequence[Path] = (),
    part: tuple[int, int] | None = None,
    hidden_states: Path | None = None,
    delete_hidden_states: bool = False,
) -> None:
    """Label a data set with a teacher and write the cache. Run again, it resumes, or reports the cache up to date.

    Args:
        config: teacher, data and options.
        out: the cache's directory.
        skip_in: finished caches of the same label identity; a document that one of them holds is skipped.
        part: i and N, 1 ≤ i ≤ N: only the i-th of N runs of the build's shards, as a cache of its own. `merge_caches`
            makes of all parts the shards of the whole build.
        hidden_states: a folder of an engine's hidden states (see `HiddenStates`); the teacher's layers are not run.
        delete_hidden_states: remove those that were used once the cache is finished.

    Raises:
        ConfigError: options, teacher or documents that cannot be used, a disk that cannot hold the cache, no document
            that is not skipped, or a part without a shard.
        ResumeError: `out` was begun with other options, teacher, documents or skipped caches, or holds something else.
        CacheFormatError: labels that may not be written, such as NaN logits; or `skip_in` names no finished cache.
        CacheMismatchError: `skip_in` names a cache of another label identity.
    """
    files = find_teacher(config)
    out = output_path(out)
    hidden = HiddenStates(hidden_states) if hidden_states else None
    both = hidden and config.load_in
    require(not both, "--load-in with --hidden-states", fix="leave --load-in out: no layer is loaded")
    task = Task(config=config, out=out, files=files, skip_in=tuple(map(Cache, skip_in)), part=part, hidden=hidden)
    if world_size() == 1 and _is_done(task):  # answered without loading torch
        log(f"{out} is up to date")
        return
    from shared.distributed import agree, joined

    with joined(LABELLING):
        if agree([world_size() > 1 and is_main_process() and _is_done(task)]) == [1]:
            log(f"{out} is up to date")
        else:
            _build(task, delete_hidden_states)


def find_teacher(config: TeacherConfig) -> ModelFiles:
    """The files of the teacher that a configuration names.

    Raises:
        ConfigError: teacher or data set are not named, or the teacher cannot be used.
    """
    for name in ("teacher", "dataset"):
        fix = f"pass --{name}, or set it in the configuration file"
        require(getattr(config, name), f"--{name} is missing", fix=fix)
    return identify_model(config.teacher, config.revision)


def _is_done(task: Task) -> bool:
    """Whether a whole, finished cache of the same request is there."""
    if not is_finished(task.out) or has_leftovers(task.out):
        return False
    options = read_json(task.out / BUILD)["options"]
    if any(options.get(key) != value for key, value in ({"part": None, "engine": None} | task.options()).items()):
        return False
    now = fingerprint(task.origin)
    before = [source.get("fingerprint") for source in read_manifest(task.out).sources]
    # Documents are read only where their fingerprint leaves open whether they are the same: parsing takes seconds.
    return (now is not None and before == [now]) or options.get("sources") == [_origin(task.data, task.data.digest)]


def _refuse_moved(task: Task) -> None:
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


def _build(task: Task, delete_hidden_states: bool) -> None:
    """Tokenise the documents, unless that is done; label them and write the cache."""
    from shared.distributed import wait

    config, out, tokenizer = task.config, task.out, task.tokenizer
    task.require_skipped_labels()
    is_new = is_main_process() and _tokenise(task)
    wait()
    store = TokenStore(store_folder(out))
    with contextlib.ExitStack() as stack:
        try:
            _report(store, config)
            shards = _own_shards(plan_shards(store.lengths, config.shard_tokens), task.part)
            used = []
            if task.hidden and is_main_process():
                used = task.hidden.require_all(segment for places in shards for segment in store.segments(places))
            num_tokens = int(store.lengths[shards[0].start : shards[-1].stop].sum())
            present_bytes = sum(file.stat().st_size for file in out.glob("shard-*.h5"))
            least = least_bytes_per_token(config, len(tokenizer))
            require_space(out, num_tokens, least, present_bytes=present_bytes)
            options = task.options() | {
                "sources": [_origin(store.data, store.facts.digest)],
                "tokenizer_digest": tokenizer_digest(tokenizer),
                "tokenizer_size": len(tokenizer),
                **{end: list(tokens) for end, tokens in document_ends(tokenizer)._asdict().items()},
                "head_width": task.limits.head_width,
                "num_shards": len(shards),
            }
            writer = stack.enter_context(_opened(out, options))
        except DistillError:
            if is_new:  # a build that is refused leaves nothing behind
                store.remove()
            raise
        if writer is not None:
            run = stack.enter_context(_tracked(writer, config))
            _label(task, writer, shards, store, run)
            if is_main_process():
                _finish(task, writer, store, run)
    if task.hidden and delete_hidden_states:
        task.hidden.delete(used)
    if is_main_process():
        store.remove()


def _own_shards(shards: list[range], part: tuple[int, int] | None) -> list[range]:
    """The consecutive shards of one part of the build; all where it has no parts."""
    if part is None:
        return shards
    number, count = part
    own = shards[(number - 1) * len(shards) // count : number * len(shards) // count]
    fix = "fewer parts, or a smaller --shard-tokens in all of them"
    require(own, "the part has no shard", where=f"--part {number}/{count}", got=f"{len(shards)} shards in all", fix=fix)
    log(f"part {number} of {count}: {len(own):,} of {len(shards):,} shards")
    return own


def _tokenise(task: Task) -> bool:
    """Make the token store, unless it is there; refuse first whatever can be refused without the tokens.

    Returns:
        Whether it was made.
    """
    out, folder = task.out, store_folder(task.out)
    _refuse_moved(task)
    check_folder(out, json.loads(json.dumps(task.options())), partly=True)
    request = task.store_request()
    store = found = find_store(folder, request)
    if store is not None:
        log(f"{store.facts.num_new:,} documents are tokenised already")
    else:
        if (out / LOCK).exists():
            Lock(out, "building this cache").release()  # refuses where another process is labelling the store's tokens
        skipped, benchmarks = _known_digests(task.skip_in), task.benchmarks
        for name, reason in benchmarks.absent.items():
            log(f"documents are not compared with {name}: {reason}")
        store = make_store(
            folder, request, task.data, task.tokenizer, task.limits, skipped=skipped, benchmarks=benchmarks
        )
    try:
        task.require_restored(store)
    except ConfigError:
        store.remove()
        raise
    return found is None


def _known_digests(caches: Sequence[Cache]) -> set[str]:
    """The digests of the documents of caches."""
    return {
        str(meta["digest"])
        for cache in caches
        for shard in range(cache.num_shards)
        for meta in cache.document_meta(shard)
        if meta.get("digest")
    }


@contextlib.contextmanager
def _opened(out: Path, options: dict[str, Any]) -> Iterator[CacheWriter | None]:
    """The cache's writer on each rank; None where the cache was finished but for a killed process's leftovers."""
    from shared.distributed import agree

    with contextlib.ExitStack() as stack:
        if is_main_process():  # the others come when it has locked the folder
            writer = stack.enter_context(CacheWriter(out, options))
        was_finished = agree([is_main_process() and writer.finished]) == [1]
        if not was_finished and not is_main_process():
            writer = stack.enter_context(CacheWriter(out, options, is_main_process=False))
        yield None if was_finished else writer


def _label(task: Task, writer: CacheWriter, shards: Sequence[range], store: TokenStore, run: tracking.Run) -> None:
    """Capture this rank's share of the shards that are not there yet; returns once all ranks are done."""
    from shared.distributed import agree, wait
    from stage1_teacher.capture import capture_shards, load_teacher
    from stage1_teacher.ends import describe_ends, weigh_ends

    missing = [shard for shard in range(len(shards)) if not writer.has_shard(shard)] if is_main_process() else []
    todo = agree(missing)
    if len(todo) < len(shards):
        log(f"{len(shards) - len(todo)} of {len(shards)} shards are done already")
    mine = {shard: shards[shard] for shard in todo[rank() :: world_size()]}
    if mine:
        if task.hidden:
            from stage1_teacher.engine_head import load_engine_head

            source: LogitSource = load_engine_head(task.config, task.files, task.hidden)
        else:
            source = load_teacher(task.config, task.files)
        if is_main_process() and len(todo) == len(shards) and not task.hidden:
            _, positions = head_and_positions(task.files.path)
            for label, text in describe_ends(weigh_ends(source, task.tokenizer, store.facts.documents(), positions)):
                log(f"{label} of documents: {text}")
        capture_shards(writer, task.config, source, mine, store, run)
    wait()


def _finish(task: Task, writer: CacheWriter, store: TokenStore, run: tracking.Run) -> None:
    """Write tokenizer and manifest."""
    out = task.out
    with plain_errors(out):
        save_tokenizer(task.tokenizer, out / "tokenizer")
    records = [read_record(out, shard) for shard in range(writer.build["num_shards"])]
    fused = all(record is not None and record.capture["fused_head"] for record in records)
    identity = task.identity("float32" if fused else task.config.dtype)
    task.require_skipped_labels(identity)
    writer.finish(identity, [task.source(store)])
    digests = {
        "label_identity": read_manifest(out).label_identity,
        "manifest_sha256": sha256_file(out / MANIFEST),
    }
    run.refer_to("logit-cache", out.name, out, digests)
    _run_file(out).unlink(missing_ok=True)


def _report(store: TokenStore, config: TeacherConfig) -> None:
    """Log what was read, and which documents were cut, dropped or skipped."""
    data, facts = store.data, store.facts
    if facts.num_skipped:
        log(f"{facts.num_skipped:,} of {facts.num_documents:,} documents are skipped: --skip-in holds them")
    if facts.contaminated:
        shown = ", ".join(f"{id} ({problem})" for id, problem in itertools.islice(facts.matches.items(), 5))
        log(f"{facts.contaminated:,} documents share text with a benchmark and are left out: {shown}")
    for text in written_text([{"written": facts.written}]):
        log(text)
    log(f"{data.name} {data.split}: {facts.num_new:,} documents, {facts.num_tokens:,} tokens")
    first = next(iter(facts.documents()), None)
    if first is not None and first.prompt:
        log(f"prompt and completion of {first.id} are joined as {first.prompt[-30:]!r} + {first.completion[:30]!r}")
    verb = {"split": "split", "truncate": "truncated", "drop": "dropped"}[config.on_long]
    happened = {
        f"too long and {verb}": facts.long,
        "left without a target, since the completion lies beyond the limit": facts.without_targets,
        "not restored by the tokenizer": facts.lossy,
    }
    for what, noted in happened.items():
        if noted.count:
            others = f" and {noted.count - len(noted.ids):,} more" if noted.count > len(noted.ids) else ""
            log(f"{noted.count:,} documents {what}: {', '.join(noted.ids)}{others}")


# --- tracking --------------------------------------------------------------------------------------------------------


def _run_file(out: Path) -> Path:
    """Holds the id of an unfinished build's W&B run, beside wandb's own files: it is no part of the cache."""
    return out.parent / "wandb" / f"{out.name}.json"


@contextlib.contextmanager
def _tracked(writer: CacheWriter, config: TeacherConfig) -> Iterator[tracking.Run]:
    """The build's W&B run: the one it had before it was stopped, if any."""
    file, build = _run_file(writer.path), sha256_json(writer.build)
    earlier = read_json(file) if file.is_file() else {"build": None}
    with tracking.start(
        "teacher-build",
        name=writer.path.name,
        config=to_dict(config),
        directory=writer.path.parent,
        run_id=earlier["id"] if earlier["build"] == build else None,
    ) as run:
        if run.id:
            with contextlib.suppress(OSError):  # tracking is an aid: where it cannot be noted, a resume is a new run
                write_json(file, {"id": run.id, "build": build})
        yield run
