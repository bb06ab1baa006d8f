"""Build a logit cache: documents → pieces → shards, each labelled by the frozen teacher and written once."""

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.load import load_documents
from data.records import Document, DocumentSet
from shared import tracking
from shared.batching import plan_batches
from shared.cache.assemble import extensions
from shared.cache.derive import Input
from shared.cache.directory import has_leftovers, is_finished
from shared.cache.extend import CacheExtender
from shared.cache.identity import require_same_labels
from shared.cache.layout import BUILD, ShardArrays, shard_name
from shared.cache.manifest import read_manifest
from shared.cache.rows import truncate
from shared.cache.writer import CacheWriter
from shared.config import to_dict
from shared.errors import CacheFormatError, ConfigError, DistillError, ResumeError
from shared.runtime import log, progress, read_json, sha256_json, versions, world_size, write_json
from stage1_teacher.batching import plan_shards
from stage1_teacher.config import TeacherConfig
from stage1_teacher.teacher import TeacherFiles, head_and_positions, load_teacher, locate_teacher

if TYPE_CHECKING:  # torch and transformers load only where there is something to label
    from stage1_teacher.logits import LogitSource
    from stage1_teacher.pieces import Corpus, Piece

MAX_EXCESS_MASS = 1e-4
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
        ConfigError: options, teacher or documents that cannot be used.
        ResumeError: `out` was begun with other options, teacher or documents, or holds something else.
        CacheFormatError: labels that may not be written, such as NaN logits; with `extend`, no finished cache.
        CacheMismatchError: with `extend`, a cache of other labels.
    """
    if world_size() > 1:
        raise ConfigError("`teacher build` runs in one process for now", expected=1, got=f"{world_size()} processes")
    for name in ("teacher", "dataset"):
        if not getattr(config, name):
            raise ConfigError(f"no {name} is named", fix=f"pass --{name}, or set it in the configuration file")
    files = locate_teacher(config.teacher, config.revision)
    documents = load_documents(
        config.dataset,
        config.split,
        limit_docs=config.limit_docs,
        columns=config.columns,
        revision=config.dataset_revision,
    )
    request = _request(config, files, documents)
    if _is_done(out, request, extend):
        log(f"{out} is up to date")
        return
    if not extend:
        _refuse_moved(out, request)
        _build(config, out, files, documents, documents.documents, request)
    elif new := _new_documents(documents, out):
        _build(config, out, files, documents, new, request, extends=read_manifest(out))


def _request(config: TeacherConfig, files: TeacherFiles, documents: DocumentSet) -> dict[str, Any]:
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
    files: TeacherFiles,
    data: DocumentSet,
    documents: Sequence[Document],
    request: dict[str, Any],
    extends: dict[str, Any] | None = None,
) -> None:
    """Label documents of a data set; `extends` is the manifest of the finished cache that they are added to."""
    from shared.tokenizer import load_tokenizer, save_tokenizer, special_ids, tokenizer_digest
    from stage1_teacher.pieces import cut_documents

    tokenizer = load_tokenizer(files.path)
    head_width, limit = head_and_positions(files.path)
    corpus = cut_documents(
        documents,
        tokenizer,
        max_length=_max_length(config.max_length, limit),
        on_long=config.on_long,
        head_width=head_width,
    )
    _report(corpus, data, len(documents), config)
    shards = plan_shards([len(piece.ids) for piece in corpus.pieces], config.shard_tokens)
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
    options = request | derived
    with CacheExtender(out, options, source) if extends else CacheWriter(out, options) as writer:
        if writer.finished:  # only a killed process's leftovers were to be cleared
            return
        numbers = range(writer.first_shard, writer.first_shard + len(shards))
        todo = {n: shard for n, shard in zip(numbers, shards, strict=True) if not writer.has_shard(n)}
        if len(todo) < len(shards):
            log(f"{len(shards) - len(todo)} of {len(shards)} shards are done already")
        if todo:
            _label(writer, config, files, todo, corpus.pieces)
        if not extends:
            save_tokenizer(tokenizer, out / "tokenizer")
        fused = all(read_json(out / f"{shard_name(shard)}.json")["fused_head"] for shard in numbers)
        writer.finish(identity("float32" if fused else config.dtype), [source])
        _run_file(out).unlink(missing_ok=True)


def _max_length(asked: int | None, limit: int | None) -> int | None:
    if asked is not None and limit is not None and asked > limit:
        raise ConfigError("--max-length is beyond the teacher's positions", expected=f"at most {limit}", got=asked)
    return asked or limit


def _report(corpus: "Corpus", data: DocumentSet, num_documents: int, config: TeacherConfig) -> None:
    """Say what was read, and what happened to documents that are not simply kept."""
    tokens = sum(len(piece.ids) for piece in corpus.pieces)
    log(f"{data.name} {data.split}: {num_documents:,} documents, {tokens:,} tokens")
    verb = {"split": "split", "truncate": "truncated", "drop": "dropped"}[config.on_long]
    for what, ids in ((f"too long and {verb}", corpus.long), ("not restored by the tokenizer", corpus.lossy)):
        if ids:
            more = f" and {len(ids) - 5:,} more" if len(ids) > 5 else ""
            log(f"{len(ids):,} documents {what}: {', '.join(ids[:5])}{more}")


def _label(
    writer: CacheWriter,
    config: TeacherConfig,
    files: TeacherFiles,
    shards: dict[int, range],
    all_pieces: Sequence["Piece"],
) -> None:
    """Load the teacher and write the shards, each by the positions of its pieces."""
    from stage1_teacher.logits import LogitSource

    teacher = load_teacher(files.path, dtype=config.dtype, device_map=config.device_map, load_in=config.load_in)
    log(
        f"teacher {files.name}: {teacher.num_parameters / 1e6:,.1f} M parameters, {config.dtype} on "
        f"{', '.join(teacher.devices)}; licence {files.licence or 'unknown'}"
    )
    source = LogitSource(teacher.model, config.head_rows)
    if source.notice:
        log(f"the float32 head cannot be used: {source.notice}; taking the model's own {config.dtype} logits")
    if source.head_width != writer.build["head_width"]:
        raise DistillError(
            "the head does not fit the configuration", expected=writer.build["head_width"], got=source.head_width
        )
    extra = {
        "token_budget": config.batch_tokens,
        "fused_head": source.notice is None,
        "devices": teacher.devices,
        "versions": versions("codedistill", "torch", "transformers", "tokenizers", "numpy", "h5py"),
    }
    tokens = sum(len(all_pieces[i].ids) for positions in shards.values() for i in positions)
    documents_before = writer.num_documents_before
    with (
        tracking.start(
            "teacher-build",
            name=writer.path.name,
            config=to_dict(config),
            directory=writer.path.parent,
            run_id=_earlier_run_id(writer),
        ) as run,
        progress("labelling", tokens, "tokens") as bar,
    ):
        if run.id:
            with contextlib.suppress(OSError):  # tracking is an aid: where it cannot be noted, a resume is a new run
                write_json(_run_file(writer.path), {"id": run.id, "build": sha256_json(writer.build)})
        for shard, positions in shards.items():
            pieces = [all_pieces[i] for i in positions]
            arrays, excess_mass = label_shard(source, pieces, config, writer.build["tokenizer_size"], bar.advance)
            own = {"excess_mass": excess_mass, "first_document": documents_before + positions.start}
            record = writer.write_shard(shard, arrays, extra | own)
            statistics = record["statistics"]
            run.log(
                {
                    "tokens_per_second": bar.rate(),
                    "captured_mass": statistics["captured_mass"]["1"]["mean"],
                    **{key: statistics[key] for key in ("teacher_nll_nats", "entropy_nats", "gold_in_topk")},
                },
                step=shard,
            )


def _run_file(out: Path) -> Path:
    """Holds the id of an unfinished build's W&B run: beside wandb's own files, for it is no part of the cache."""
    return out.parent / "wandb" / f"{out.name}.json"


def _earlier_run_id(writer: CacheWriter) -> str | None:
    """The id that the same build had before it was stopped."""
    file = _run_file(writer.path)
    if not file.is_file():
        return None
    earlier = read_json(file)
    return earlier["id"] if earlier["build"] == sha256_json(writer.build) else None


def label_shard(
    source: "LogitSource",
    pieces: Sequence["Piece"],
    config: TeacherConfig,
    tokenizer_size: int,
    advance: Callable[[int], None],
) -> tuple[ShardArrays, float]:
    """Label one shard's pieces.

    Args:
        source: the teacher's logits.
        pieces: the shard's documents in order.
        config: batches, top-k, top-p, grid and samples.
        tokenizer_size: ids beyond it are masked.
        advance: told of tokens done.

    Returns:
        The shard's arrays, and the mean probability that the teacher gave to ids beyond the tokenizer.

    Raises:
        CacheFormatError: logits that cannot be used (document and position named), or too much mass on such ids.
    """
    import torch

    from stage1_teacher.head import label_rows
    from stage1_teacher.sampling import draw, to_samples, uniforms

    lengths = [len(piece.ids) for piece in pieces]
    ends = np.cumsum([0, *lengths])
    S, K = int(ends[-1]), min(config.top_k, tokenizer_size)
    tokens = np.concatenate([piece.ids for piece in pieces]).astype(np.int64)
    k, gold_in_topk = np.zeros(S, np.int64), np.zeros(S, bool)
    ids_SK, margins_SK = np.zeros((S, K), np.int32), np.zeros((S, K), np.float32)
    tail_log = np.full((S, len(config.temperatures)), -np.inf)
    gold_logprob, entropy, excess = np.full(S, np.nan, np.float32), np.zeros(S, np.float32), np.zeros(S, np.float32)

    drawn_from, samples_temperature = config.sampled()
    M = config.samples or 0
    uniform_SM = np.zeros((S, M))
    drawn_SM, drawn_margins_SM = np.full(uniform_SM.shape, -1, np.int64), np.zeros(uniform_SM.shape, np.float32)
    for piece, start, stop in zip(pieces, ends, ends[1:], strict=False) if M else ():
        uniform_SM[start : stop - 1] = uniforms(piece.meta, stop - start - 1, M)

    def where(row: int) -> str:
        piece = int(np.searchsorted(ends, row, side="right")) - 1
        return f"document {pieces[piece].meta['id']!r}, position {row - ends[piece]}"

    for batch in plan_batches(lengths, config.batch_tokens):
        # A document's last token predicts nothing: rows are the tokens before it, in document order.
        rows_N = np.concatenate([np.arange(ends[i], ends[i + 1] - 1) for i in batch])
        real_BT = torch.arange(lengths[batch[0]] - 1) < torch.tensor([[lengths[i] - 1] for i in batch])
        ids_BT = torch.zeros(real_BT.shape, dtype=torch.int64)
        ids_BT[real_BT] = torch.from_numpy(tokens[rows_N])
        for logits_NV in source.chunks(ids_BT, real_BT) if len(rows_N) else ():
            rows, rows_N = rows_N[: len(logits_NV)], rows_N[len(logits_NV) :]
            gold = torch.from_numpy(tokens[rows + 1]).to(logits_NV.device)
            uniform_NM = torch.from_numpy(uniform_SM[rows]).to(logits_NV.device)
            if M and drawn_from == "full":
                drawn, drawn_logits = draw(logits_NV[:, :tokenizer_size], uniform_NM, samples_temperature)
            part = label_rows(
                logits_NV, gold, top_k=config.top_k, temperatures=config.temperatures, tokenizer_size=tokenizer_size
            )
            usable = (part.top_logit + part.excess_mass).isfinite().cpu().numpy()
            if not usable.all():
                bad = int(np.flatnonzero(~usable)[0])
                raise CacheFormatError(
                    "the teacher's logits cannot be used",
                    where=where(int(rows[bad])),
                    expected="finite logits, or −inf beside them",
                    got=f"a largest logit of {float(part.top_logit[bad])}",
                    fix="another --dtype, such as float32, may help",
                )
            if M and drawn_from == "tail":
                tail_NV = logits_NV[:, :tokenizer_size].scatter_(1, part.ids, -torch.inf)
                drawn, drawn_logits = draw(tail_NV, uniform_NM, samples_temperature)
            if M:
                drawn_SM[rows], drawn_margins_SM[rows] = drawn.cpu(), (part.top_logit[:, None] - drawn_logits).cpu()
            width = part.ids.shape[1]
            ids_SK[rows, :width], margins_SK[rows, :width] = part.ids.cpu(), part.margins.cpu()
            k[rows], tail_log[rows], gold_in_topk[rows] = (
                part.k.cpu(),
                part.tail_log.cpu(),
                part.gold_rank.cpu() < width,
            )
            gold_logprob[rows], entropy[rows] = part.gold_logprob.cpu(), part.entropy_nats.cpu()
            excess[rows] = part.excess_mass.cpu()
        advance(sum(lengths[i] for i in batch))

    num_rows = S - len(pieces)
    excess_mass = float(excess.sum(dtype=np.float64)) / max(num_rows, 1)
    if excess_mass > MAX_EXCESS_MASS:
        raise CacheFormatError(
            "the teacher predicts ids that its tokenizer does not have",
            expected=f"a mean probability of at most {MAX_EXCESS_MASS:g} on ids from {tokenizer_size}",
            got=f"{excess_mass:.2e}",
            fix="use the tokenizer that the teacher was trained with",
        )
    kept_SK = np.arange(K) < k[:, None]
    arrays = ShardArrays(
        tokens=tokens,
        loss_mask=_loss_mask(pieces),
        doc_indptr=ends,
        doc_meta=[piece.meta for piece in pieces],
        k=k,
        topk_ids=ids_SK[kept_SK].astype(np.int64),
        topk_margins=margins_SK[kept_SK],
        tail_log=tail_log,
        gold_logprob=gold_logprob,
        gold_in_topk=gold_in_topk,
        entropy_nats=entropy,
        samples=to_samples(drawn_SM, drawn_margins_SM, temperature=samples_temperature, drawn_from=drawn_from)
        if M
        else None,
    )
    if config.top_p is not None:
        arrays = truncate(arrays, config.temperatures, top_p=config.top_p)
    return arrays, excess_mass


def _loss_mask(pieces: Sequence["Piece"]) -> np.ndarray:
    """1 where the next token is a target."""
    return np.concatenate([np.array([*piece.is_target[1:], False], np.uint8) for piece in pieces])
