"""Build a logit cache: tokenise, label and finish, around the capture of its shards."""

import contextlib
import datetime
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared import tracking
from shared.cache.directory import plain_errors
from shared.cache.format import MANIFEST
from shared.cache.manifest import read_manifest, read_record, written_text
from shared.cache.reader import Cache
from shared.cache.writer import CacheWriter, check_folder
from shared.checkpoints import head_and_positions
from shared.errors import ConfigError, DistillError, require
from shared.files import output_path, read_json, sha256_file, sha256_json, write_json
from shared.lock import LOCK, Lock
from shared.process import is_main_process, log, rank, world_size
from shared.records import to_dict
from shared.tokenizer import document_ends, save_tokenizer, tokenizer_digest
from stage1_teacher.config import TeacherConfig
from stage1_teacher.disk import least_bytes_per_token, require_space
from stage1_teacher.documents import plan_shards
from stage1_teacher.engine import HiddenStates
from stage1_teacher.request import Task, find_teacher, is_done, origin_record, refuse_moved
from stage1_teacher.store import TokenStore, find_store, make_store, store_folder

if TYPE_CHECKING:
    from shared.logits import LogitSource

LABELLING = datetime.timedelta(days=30)  # ranks may work that long before they meet again


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
    if world_size() == 1 and is_done(task):  # answered without loading torch
        log(f"{out} is up to date")
        return
    from shared.distributed import agree, joined

    with joined(LABELLING):
        if agree([world_size() > 1 and is_main_process() and is_done(task)]) == [1]:
            log(f"{out} is up to date")
        else:
            _build(task, delete_hidden_states)


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
                "sources": [origin_record(store.data, store.facts.digest)],
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
    refuse_moved(task)
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
