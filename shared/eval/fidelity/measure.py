"""How close a model is to the teacher, and to the text, over a cache's held-out documents."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shared.batching import plan_batches
from shared.cache.format import Array
from shared.cache.reader import Cache
from shared.checkpoints import describe_model, dtype_name, load_model, student_record
from shared.errors import CacheMismatchError
from shared.eval.bootstrap import METHOD, percentile_interval, resample_sums
from shared.eval.fidelity.rows import agreement, dense_rows, partition_rows, text_rows
from shared.eval.inputs import cache_digest
from shared.eval.results import CacheFacts, CalibrationBin, Fidelity, ModelFacts
from shared.files import read_json
from shared.logits import LogitSource, largest, send
from shared.process import log
from shared.progress import progress
from shared.tokenizer import load_tokenizer, tokenizer_digest

_CPU_ROWS, _GPU_ROWS = 256, 1_024  # rows whose float32 log-softmax is formed at once
_TOP = 5
_BINS = 15
DEFINITIONS = {
    "kl_to_teacher_nats": "KL(teacher‖model) at T=1, mean over targets",
    "reverse_kl_nats": "KL(model‖teacher), likewise; without the tail bucket where the teacher has no tail",
    "top1_agreement": "share of targets where both have the same most likely id",
    "top5_agreement": "mean of |A ∩ B| / m, A and B being the m most likely ids of each; m = 5, or k in a row of k < 5",
    "ece": "expected calibration error of the most likely id against the text: Σ count/targets |accuracy − confidence|"
    f" over {_BINS} bins of equal width",
    "ci95": METHOD + ", over documents",
    "per_document": "sums over a document's targets; the figures are ratios of such sums over all documents",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """Sums over the targets of each document, in float64.

    By name there are `targets`, `nll_nats`, `kl_nats`, `reverse_kl_nats`, `top1_agreed`, `top5_overlap`; and
    `teacher_nll_nats` where the teacher is run.
    """

    columns: dict[str, Array]  # f64 `[D]`
    bins: Array  # f64 `[D, bins, 3]`: targets, confidence and correct ones by the confidence in the most likely id


def evaluate_fidelity(
    model_dir: Path, cache_dir: Path, *, dtype: str, batch_tokens: int, teacher_dir: Path | None = None
) -> Fidelity:
    """Score a model on every target of a cache.

    Args:
        model_dir: a transformers directory.
        cache_dir: a finished cache, usually of held-out documents.
        dtype: see `checkpoints.load_frozen`; the head always runs in float32.
        batch_tokens: max tokens, padding included, that go through the model at once (one document at least).
        teacher_dir: a teacher to run beside the model. The KL is then over the whole vocabulary (`dense`); without it,
            over the cache's K+1 partition, whose KL is never above the dense one.

    Returns:
        The result; a figure that is not finite or not known is None, with the reason in `reasons`.

    Raises:
        CacheMismatchError: model, teacher and cache have different tokenizers, or a head is too narrow.
        ConfigError: the cache has no targets.
    """
    start = time.monotonic()
    cache = Cache(cache_dir)
    cache.require_targets()
    model = load_for_cache(model_dir, dtype, cache)
    teacher = load_for_cache(teacher_dir, dtype, cache) if teacher_dir else None
    sums = score_cache(model, cache, batch_tokens=batch_tokens, teacher=teacher)
    metas = [cache.meta(doc) for doc in range(cache.num_documents)]
    sums.columns["target_bytes"] = np.array([meta.get("target_bytes", math.nan) for meta in metas], np.float64)
    figures, intervals = figures_of(sums)
    cached_nll = cache.statistics.get("teacher_nll_nats")
    if teacher is None:
        figures["teacher_nll_nats"] = math.nan if cached_nll is None else cached_nll
    elif cached_nll and abs((nll := figures["teacher_nll_nats"]) / cached_nll - 1) > 0.01:
        log(f"warning: {teacher_dir} has an NLL of {nll:.4f}, the teacher that made {cache_dir} one of "
            f"{cached_nll:.4f}: is it the same?")  # fmt: skip
    reasons = {name: "unknown" if math.isnan(value) else f"not finite ({value})"
               for name, value in figures.items() if not math.isfinite(value)}  # fmt: skip
    positions = getattr(model.config, "max_position_embeddings", None) or np.inf
    known: dict[str, Any] = {name: None if name in reasons else value for name, value in figures.items()}
    return Fidelity(
        **known,
        ci95={name: intervals.get(name) for name in figures},
        reasons=reasons,
        kl_kind="dense" if teacher else f"partition K={cache.manifest.top_k}",
        ece_bins=_calibration(sums.bins.sum(0)),
        num_targets=int(sums.columns["targets"].sum()),
        num_documents=cache.num_documents,
        num_cut_documents=int((cache.doc_lengths > positions).sum()),
        target_bytes=cache.statistics.get("target_bytes"),
        definitions=DEFINITIONS,
        model=ModelFacts(**describe_model(model, model_dir)),
        teacher=ModelFacts(**describe_model(teacher, teacher_dir)) if teacher and teacher_dir else None,
        cache=CacheFacts(
            digest=cache_digest(cache_dir),
            label_identity=cache.label_identity,
            codec=cache.manifest.codec,
            teacher_nll_nats=cached_nll,
        ),
        seen_in_training=seen_in_training(model_dir, cache),
        device=model.device.type,
        seconds=round(time.monotonic() - start, 3),
        per_document=_document_rows(sums.columns, metas),
    )


def load_for_cache(directory: Path, dtype: str, cache: Cache) -> Any:
    """Load a model that has a cache's tokenizer.

    Raises:
        CacheMismatchError: it has another one.
    """
    model, tokenizer = load_model(directory, dtype)
    ours, theirs = tokenizer_digest(tokenizer), tokenizer_digest(load_tokenizer(cache.tokenizer_path))
    if ours != theirs:
        raise CacheMismatchError("the model's tokenizer is not the cache's", where=f"{directory} and {cache.path}",
                                 expected=f"{theirs} (cache)", got=f"{ours} (model)",
                                 fix="evaluate on a cache of this model's teacher")  # fmt: skip
    return model


def seen_in_training(model_dir: Path, cache: Cache) -> bool:
    """Whether the model is a run or an export that was trained on any of this cache's shards or data sets."""
    record = student_record(model_dir)
    seen = record is not None and cache.shares_data(read_json(record).get("caches", []))
    if seen:
        log(f"warning: {model_dir} was trained on documents of {cache.path}: these are no held-out figures")
    return seen


# --- from sums to figures --------------------------------------------------------------------------------------------


def figures_of(sums: Sums) -> tuple[dict[str, float], dict[str, list[float] | None]]:
    """Figures, NaN where unknown, and the 95 % interval of each over documents; none over fewer than two of them.

    A cut or split document is as many units as it has parts, which makes intervals a little narrow.
    """
    scored = sums.columns["targets"] > 0  # others have no say in any figure
    columns = {name: column[scored] for name, column in sums.columns.items()}
    bins = sums.bins[scored]
    figures = {
        name: float(value)
        for name, value in _figures({name: c.sum(0) for name, c in columns.items()}, bins.sum(0)).items()
    }
    if len(bins) < 2:
        return figures, {}
    names = list(columns)
    flat_DF = np.column_stack([*columns.values(), bins.reshape(len(bins), -1)])
    drawn_RF = resample_sums(flat_DF)
    resampled = _figures(
        dict(zip(names, drawn_RF[:, : len(names)].T, strict=True)),
        drawn_RF[:, len(names) :].reshape(-1, *bins.shape[1:]),
    )
    return figures, {name: percentile_interval(values) for name, values in resampled.items()}


def _figures(columns: Mapping[str, Array], bins: Array) -> dict[str, Array]:
    """Each figure from sums over documents; leading axes (resamples) are kept."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        nll_nats = columns["nll_nats"] / columns["targets"]
        figures = {
            "nll_nats": nll_nats,
            "bits_per_byte": columns["nll_nats"] / math.log(2) / columns["target_bytes"],
            "perplexity": np.exp(nll_nats),
            "kl_to_teacher_nats": columns["kl_nats"] / columns["targets"],
            "reverse_kl_nats": columns["reverse_kl_nats"] / columns["targets"],
            "top1_agreement": columns["top1_agreed"] / columns["targets"],
            "top5_agreement": columns["top5_overlap"] / columns["targets"],
            "ece": np.abs(bins[..., 1] - bins[..., 2]).sum(-1) / columns["targets"],
        }
        if "teacher_nll_nats" in columns:
            figures["teacher_nll_nats"] = columns["teacher_nll_nats"] / columns["targets"]
    return figures


def _calibration(bins: Array) -> list[CalibrationBin]:
    return [
        CalibrationBin(
            count=int(count),
            confidence=confidence / count if count else None,
            accuracy=correct / count if count else None,
        )
        for count, confidence, correct in bins.tolist()
    ]


def _document_rows(columns: Mapping[str, Array], metas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per document that has targets; what is not finite is null."""
    rows = []
    for doc in np.flatnonzero(columns["targets"]).tolist():
        sums = {name: column[doc].item() for name, column in columns.items()}
        rows.append({"id": metas[doc].get("id"), **{n: v if math.isfinite(v) else None for n, v in sums.items()}})
    return rows


# --- from rows to sums -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def score_cache(model: Any, cache: Cache, *, batch_tokens: int, teacher: Any = None) -> Sums:
    """Compare a model with text and teacher on all targets; the cache has the distributions where no teacher runs.

    Batches are padded on the right, out of sight of every real token under a causal mask, as in stage 1.
    """
    names = ["targets", "nll_nats", "kl_nats", "reverse_kl_nats", "top1_agreed", "top5_overlap"]
    names += ["teacher_nll_nats"] if teacher else []
    columns_FD = np.zeros((len(names), cache.num_documents))
    bins = np.zeros((cache.num_documents, _BINS, 3))
    models = [m for m in (model, teacher) if m is not None]
    sources = [logit_source(m, cache) for m in models]
    limits = [getattr(m.config, "max_position_embeddings", None) for m in models]
    positions = min([limit for limit in limits if limit] or [int(cache.doc_lengths.max())])
    with progress("Scoring", cache.num_tokens - cache.num_documents, "tokens") as bar:
        for pieces in cache_batches(cache, batch_tokens, positions):
            tokens = [cache.tokens(doc)[start : stop + 1] for doc, start, stop in pieces]
            masks = [cache.loss_mask(doc)[start:stop] for doc, start, stop in pieces]
            gold_N = torch.from_numpy(np.concatenate([t[1:][m] for t, m in zip(tokens, masks, strict=True)]))
            doc_N = np.repeat([doc for doc, _, _ in pieces], [mask.sum() for mask in masks])
            labels = None if teacher else _labels(cache, pieces, masks)
            ids_BT, chosen_BT = _padded(tokens, masks)
            stop = 0
            for chunks in zip(*(source.chunks(ids_BT, chosen_BT) for source in sources), strict=True):
                rows = slice(stop, stop := stop + len(chunks[0]))
                logits = [logits_NV[:, : cache.tokenizer_size] for logits_NV in chunks]
                compared = _compare(logits, gold_N[rows], labels and tuple(label[rows] for label in labels))
                columns_FN = torch.stack([column.double() for column in compared.values()]).cpu().numpy()
                values = dict(zip(compared, columns_FN, strict=True))
                docs = doc_N[rows]
                for row, name in enumerate(names):
                    np.add.at(columns_FD[row], docs, values[name])
                confidence, correct = values["confidence"], values["correct"]
                bin_N = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
                np.add.at(bins, (docs, bin_N), np.stack([np.ones_like(confidence), confidence, correct], 1))
            bar.advance(sum(map(len, masks)))
    return Sums(columns=dict(zip(names, columns_FD, strict=True)), bins=bins)


def logit_source(model: Any, cache: Cache) -> LogitSource:
    """A model's float32 logits: half-precision logits tie in most rows, which would decide the top-1 agreement."""
    source = LogitSource(model, _CPU_ROWS if model.device.type == "cpu" else _GPU_ROWS)
    source.require_width(cache.tokenizer_size, where=cache.path)
    if source.notice:
        log(f"the float32 head cannot be used: {source.notice}; scoring the model's own {dtype_name(model)} logits")
    return source


def _padded(tokens: list[Array], masks: list[Array]) -> tuple[Tensor, Tensor]:
    """A batch's ids `[B, T]` and which of its positions are targets, padded on the right."""
    ids = [torch.from_numpy(row[: len(mask)].astype(np.int64)) for row, mask in zip(tokens, masks, strict=True)]
    chosen = [torch.from_numpy(mask.astype(bool)) for mask in masks]
    return pad_sequence(ids, batch_first=True), pad_sequence(chosen, batch_first=True)


def _labels(cache: Cache, pieces: list[tuple[int, int, int]], masks: list[Array]) -> tuple[Tensor, ...]:
    """k, ids, log-probabilities and tails of a batch's targets."""
    targets = [cache.targets(doc, 1.0, start, stop) for doc, start, stop in pieces]
    return tuple(
        torch.from_numpy(np.concatenate([getattr(t, name)[mask] for t, mask in zip(targets, masks, strict=True)]))
        for name in ("k", "ids", "logp", "log_tail")
    )


def _compare(logits: list[Tensor], gold_N: Tensor, labels: tuple[Tensor, ...] | None) -> dict[str, Tensor]:
    """What each row adds to the sums: a model's logits against the teacher's, or against cached labels."""
    logits_NV, *rest = logits
    gold_N = send(gold_N, logits_NV.device)
    nll_N, confidence_N, correct_N = text_rows(logits_NV, gold_N)
    compared = {"targets": torch.ones_like(nll_N), "nll_nats": nll_N, "confidence": confidence_N, "correct": correct_N}
    if labels is None:
        teacher_NV = rest[0].to(logits_NV.device)
        compared["teacher_nll_nats"] = text_rows(teacher_NV, gold_N)[0]
        kl_N, reverse_kl_N = dense_rows(logits_NV, teacher_NV)
        teacher_NM = largest(teacher_NV, _TOP)[1]
        k_N = torch.full_like(gold_N, _TOP)
    else:
        k_N, ids_NK, logp_NK, log_tail_N = (send(label, logits_NV.device) for label in labels)
        kl_N, reverse_kl_N = partition_rows(logits_NV, k_N, ids_NK, logp_NK, log_tail_N)
        teacher_NM = ids_NK[:, :_TOP]
    top1_N, top5_N = agreement(largest(logits_NV, teacher_NM.shape[1])[1], teacher_NM, k_N)
    compared |= {"kl_nats": kl_N, "reverse_kl_nats": reverse_kl_N}
    return compared | {"top1_agreed": top1_N, "top5_overlap": top5_N}


def cache_batches(cache: Cache, batch_tokens: int, positions: int) -> Iterator[list[tuple[int, int, int]]]:
    """Batches of pieces (document, first row, end) that never cross a shard, cut as stage 1 cuts them.

    Rows are the tokens that have a next one, so a document's last token belongs to none.
    Each shard is decoded once, and a half-precision teacher, whose rows depend on the batch's shape, meets its own
    labels where the budget is the build's. A document beyond the model's positions is scored piece by piece.
    """
    first = 0
    for shard in range(cache.num_shards):
        lengths = np.diff(cache.load_shard(shard).doc_indptr).tolist()
        pieces = [
            (first + doc, start, min(start + positions, length - 1))
            for doc, length in enumerate(lengths)
            for start in range(0, length - 1, positions)
        ]
        for batch in plan_batches([stop + 1 - start for _, start, stop in pieces], batch_tokens):
            yield [pieces[i] for i in batch]
        first += len(lengths)
