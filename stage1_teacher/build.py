"""Build a logit cache: documents → pieces → shards, each labelled by the frozen teacher and written once."""

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.load import load_documents
from data.records import Document, DocumentSet
from shared.cache.assemble import extensions
from shared.cache.derive import Input
from shared.cache.directory import has_leftovers, is_finished, plain_errors
from shared.cache.extend import CacheExtender
from shared.cache.format import BUILD, MANIFEST, shard_name
from shared.cache.identity import require_same_labels
from shared.cache.manifest import read_manifest
from shared.cache.writer import CacheWriter
from shared.checkpoints import ModelFiles, head_and_positions, identify_model
from shared.config import to_dict
from shared.errors import ConfigError, ResumeError
from shared.files import read_json, sha256_file
from shared.process import log
from stage1_teacher.batching import plan_shards
from stage1_teacher.config import TeacherConfig
from stage1_teacher.disk import least_bytes_per_token, require_room
from stage1_teacher.ranks import Ranks, joined

if TYPE_CHECKING:  # torch and transformers load only where there is something to label
    from stage1_teacher.documents import Corpus

NAMED = ("teacher", "revision", "dataset", "dataset_revision", "split")  # recorded by commit and digest instead
OPTIONS = (
    "columns",
    "codec",
    "filter",
    "temperatures",
    "top_k",
    "top_p",
    "dtype",
    "shard_tokens",
    "batch_tokens",
    "head_rows",
    "max_length",
    "on_long",
    "load_in",
    "samples",
    "samples_from",
    "samples_temperature",
)


def build_cache(config: TeacherConfig, out: Path, *, extend: bool = False) -> None:
    """Label a data set with a teacher and write the cache; run again it continues, or finds all done.

    Args:
        config: teacher, data and options.
        out: the cache's directory.
        extend: add the data set's documents to a finished cache, those that it does not hold yet. It stays valid
            throughout; its teacher, tokenizer and label options must be these.

    Raises:
        ConfigError: options, teacher or documents that cannot be used, or a disk that cannot hold the cache.
        ResumeError: `out` was begun with other options, teacher or documents, or holds something else.
        CacheFormatError: labels that may not be written, such as NaN logits; with `extend`, no finished cache.
        CacheMismatchError: with `extend`, a cache of other labels.
    """
    files, documents = find_inputs(config)
    request = _request(config, files, documents)
    with joined() as ranks:
        if ranks.agree([ranks.leads and _is_done(out, request, extend)]) == [1]:
            log(f"{out} is up to date")
        elif not extend:
            _refuse_moved(out, request)
            _build(config, out, files, documents, documents.documents, request, ranks)
        elif new := _new_documents(documents, out):
            _build(config, out, files, documents, new, request, ranks, extends=read_manifest(out))


def find_inputs(config: TeacherConfig) -> tuple[ModelFiles, DocumentSet]:
    """The teacher's files and the documents that a configuration names.

    Raises:
        ConfigError: either is not named, or cannot be used.
    """
    for name in ("teacher", "dataset"):
        if not getattr(config, name):
            raise ConfigError(f"no {name} is named", fix=f"pass --{name}, or set it in the configuration file")
    files = identify_model(config.teacher, config.revision)
    documents = load_documents(
        config.dataset,
        config.split,
        limit_docs=config.limit_docs,
        columns=config.columns,
        revision=config.dataset_revision,
    )
    return files, documents


def _request(config: TeacherConfig, files: ModelFiles, documents: DocumentSet) -> dict[str, Any]:
    """What was asked for, by content: `build.json` holds it, and a resume must match it."""
    return {
        "teacher": {
            "commit": files.commit,
            "weights_digest": files.weights_digest,
            "config_digest": files.config_digest,
            "tokenizer_files_digest": files.tokenizer_files_digest,
        },
        "sources": [
            {
                "name": documents.name,
                "split": documents.split,
                "revision": documents.revision,
                "digest": documents.digest,
            }
        ],
        **{key: value for key, value in to_dict(config).items() if key in OPTIONS},
    }


def _is_done(out: Path, request: dict[str, Any], extend: bool) -> bool:
    """Whether a whole, finished cache of the same request is there; loads neither torch nor transformers."""
    if not is_finished(out) or has_leftovers(out):
        return False
    done = [read_json(out / BUILD)["options"]]
    if extend:
        listed = read_manifest(out)["files"]
        done += [part.options for part in extensions(out) if part.name in listed]
    return any(all(options.get(key) == value for key, value in request.items()) for options in done)


def _new_documents(documents: DocumentSet, out: Path) -> tuple[Document, ...]:
    """The documents that a finished cache does not hold, by digest of their text."""
    cache = Input.open(out)
    shards = range(cache.manifest["num_shards"])
    held = {meta.get("digest") for shard in shards for meta in cache.documents(shard)}
    new = tuple(document for document in documents.documents if document.digest not in held)
    log(f"{out}: {len(documents.documents) - len(new):,} of {len(documents.documents):,} documents are there already")
    return new


def _refuse_moved(out: Path, request: dict[str, Any]) -> None:
    """Refuse to continue at other commits than the cache was begun at, also where the content is the same."""
    try:
        options = json.loads((out / BUILD).read_bytes())["options"]
        before = {"teacher": options["teacher"]["commit"], "data set": options["sources"][0]["revision"]}
    except (OSError, ValueError, LookupError, TypeError):
        return  # nothing begun, or not by us: the writer tells
    now = {"teacher": request["teacher"]["commit"], "data set": request["sources"][0]["revision"]}
    flags = {"teacher": "--revision", "data set": "--dataset-revision"}
    for what, flag in flags.items():
        commits = (before[what], now[what])
        if before[what] != now[what] and all(re.fullmatch(r"[0-9a-f]{40}", str(commit)) for commit in commits):
            raise ResumeError(
                f"the {what} has moved since the cache was begun",
                where=out,
                expected=before[what],
                got=now[what],
                fix=f"pass {flag} {before[what]}, or name another --out",
            )


def _build(
    config: TeacherConfig,
    out: Path,
    files: ModelFiles,
    data: DocumentSet,
    documents: Sequence[Document],
    request: dict[str, Any],
    ranks: Ranks,
    extends: dict[str, Any] | None = None,
) -> None:
    """Label documents of a data set; `extends` is the manifest of the finished cache that they are added to."""
    from shared.tokenizer import load_tokenizer, save_tokenizer, special_ids, tokenizer_digest
    from stage1_teacher.documents import cut_documents

    tokenizer = load_tokenizer(files.path)
    head_width, limit = head_and_positions(files.path)
    corpus = cut_documents(
        documents,
        tokenizer,
        max_length=max_length(config.max_length, limit),
        on_long=config.on_long,
        head_width=head_width,
    )
    _report(corpus, data, len(documents), config)
    lengths = [len(piece.ids) for piece in corpus.pieces]
    shards = plan_shards(lengths, config.shard_tokens)
    digest = tokenizer_digest(tokenizer)
    derived = {
        "tokenizer_digest": digest,
        "tokenizer_size": len(tokenizer),
        "head_width": head_width,
        "num_shards": len(shards),
    }
    source = {
        "name": data.name,
        "split": data.split,
        "revision": data.revision,
        "licence": data.licence,
        "attribution": data.attribution,
        "digest": data.digest,
        "num_documents": len(data.documents),
        **({"num_new_documents": len(documents)} if extends else {}),
        "num_long": len(corpus.long),
        "on_long": config.on_long,
        "num_lossy": len(corpus.lossy),
        "config": {key: value for key, value in to_dict(config).items() if key not in NAMED},
    }

    def identity(head: str) -> dict[str, Any]:
        return {
            "teacher": {
                "name": files.name,
                "commit": files.commit,
                "licence": files.licence,
                "attribution": files.attribution,
                "weights_digest": files.weights_digest,
                "config_digest": files.config_digest,
            },
            "tokenizer": {"digest": digest, **special_ids(tokenizer)},
            "labels": {
                "temperatures": list(config.temperatures),
                "top_k": config.top_k,
                "top_p": config.top_p,
                "codec": config.codec,
                "dtype": config.dtype,
                "head": head,
                **({"load_in": config.load_in} if config.load_in else {}),
                **({"samples": [config.samples, *config.sampled()]} if config.samples else {}),
            },
        }

    if extends:  # all but the head's precision is known before anything is labelled
        wanted = identity(extends["identity"]["labels"].get("head", "none"))
        require_same_labels(extends["identity"], wanted, ours_name=out, theirs_name="the extension")
    present = 0 if extends else sum(file.stat().st_size for file in out.glob("shard-*.h5"))
    require_room(out, sum(lengths), least_bytes_per_token(config, len(tokenizer)), present_bytes=present)
    options = request | derived

    def open_writer(leads: bool) -> CacheWriter:
        if extends:
            return CacheExtender(out, options, source, leads=leads)
        return CacheWriter(out, options, leads=leads)

    with contextlib.ExitStack() as stack:
        if ranks.leads:  # the others come when it has claimed the folder
            writer = stack.enter_context(open_writer(True))
        if ranks.agree([ranks.leads and writer.finished]) == [1]:
            return  # only a killed process's leftovers were to be cleared
        if not ranks.leads:
            writer = stack.enter_context(open_writer(False))
        numbers = range(writer.first_shard, writer.first_shard + len(shards))
        todo = ranks.agree([n for n in numbers if not writer.has_shard(n)] if ranks.leads else [])
        if len(todo) < len(shards):
            log(f"{len(shards) - len(todo)} of {len(shards)} shards are done already")
        mine = {n: shards[n - writer.first_shard] for n in todo[ranks.rank :: ranks.world_size]}
        from stage1_teacher.pipeline import label_shards, run_file, tracked

        with tracked(writer, config) as run:
            if mine:
                label_shards(writer, config, files, mine, corpus.pieces, ranks, run)
            ranks.wait()
            if not ranks.leads:
                return
            if not extends:
                with plain_errors(out):
                    save_tokenizer(tokenizer, out / "tokenizer")
            fused = all(read_json(out / f"{shard_name(shard)}.json")["fused_head"] for shard in numbers)
            writer.finish(identity("float32" if fused else config.dtype), [source])
            digests = {
                "label_identity": read_manifest(out)["label_identity"],
                "manifest_sha256": sha256_file(out / MANIFEST),
            }
            run.refer_to("logit-cache", out.name, out, digests)
            run_file(out).unlink(missing_ok=True)


def max_length(asked: int | None, limit: int | None) -> int | None:
    """The longest piece: what was asked for, else the teacher's positions; None where neither says.

    Raises:
        ConfigError: more than the teacher's positions is asked for.
    """
    if asked is not None and limit is not None and asked > limit:
        raise ConfigError("--max-length is beyond the teacher's positions", expected=f"at most {limit}", got=asked)
    return asked or limit


def _report(corpus: "Corpus", data: DocumentSet, num_documents: int, config: TeacherConfig) -> None:
    """Say what was read, and what happened to documents that are not simply kept."""
    tokens = sum(len(piece.ids) for piece in corpus.pieces)
    log(f"{data.name} {data.split}: {num_documents:,} documents, {tokens:,} tokens")
    first = data.documents[0]
    if first.prompt:
        log(f"prompt and completion meet as in {first.id}: {first.prompt[-30:]!r} + {first.completion[:30]!r}")
    verb = {"split": "split", "truncate": "truncated", "drop": "dropped"}[config.on_long]
    for what, ids in ((f"too long and {verb}", corpus.long), ("not restored by the tokenizer", corpus.lossy)):
        if ids:
            more = f" and {len(ids) - 5:,} more" if len(ids) > 5 else ""
            log(f"{len(ids):,} documents {what}: {', '.join(ids[:5])}{more}")
