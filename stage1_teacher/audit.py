"""Does a cache come from the teacher that it names? Random documents run through that teacher again and are compared.

**What runs again.** A document runs in the batch of its build, which follows from the shard and its recorded token
budget: a batch's shape changes half-precision logits. Where the shard records no budget, the document runs by itself.

**What is compared.** The teacher's logits z are read at the cache's own ids: ids that tie within the tolerance may be
swapped, at the row's boundary too. A row's deviation, in logits, is the largest of

- |z_1 − z_i − m̂_i| beyond the codec's bound, over its entries, and over its samples, whose margins are exact;
- how far the best id outside the row exceeds the last one inside;
- T · |log tail_T − log tail̂_T| beyond the codec's bound, over the grid.

The next token's probability follows from these.

**Tolerance.** Roundings with unit roundoff u after each of the 2L residual additions, independent of one another, move
the last hidden state by u √(2L) of its length, and a logit by that share of σ, the row's standard deviation over the
vocabulary. Sums of D terms in float32 add √D · 2⁻²⁴ to u. A row may deviate by 16 σ √(2L) (u + √D · 2⁻²⁴), and
KL(cache‖teacher) over head and tail at T = 1 may on average be ½ (σ √(2L) (u + √D · 2⁻²⁴))² beyond the codec's bound.

Measured on SmolLM2-135M (L = 30, D = 576, σ = 3.2 nats) in bfloat16, where these are 0.48 σ and 4.7e-3: in the batch of
the build nothing at all; in other batches at most 0.20 σ and 8e-5; with other kernels for attention and matrices, as
another machine has, at most 0.23 σ and 1.1e-3. In float32, where 1.8e-4 σ is allowed: 1.2e-5 σ.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.batching import plan_batches
from shared.cache.codec import decode_tail, margin_bound
from shared.cache.format import MAX_MARGIN, Array
from shared.cache.reader import Cache
from shared.cache.shard import Shard
from shared.checkpoints import ModelFiles, identify_model, load_frozen
from shared.errors import CacheMismatchError, require
from shared.logits import LogitSource
from shared.partition import kl_rows
from shared.progress import progress
from shared.tokenizer import load_tokenizer, tokenizer_digest

MAX_DEVIATION = 16.0
CODEC_KL = 2.6e-3  # codec.py, for K ≤ 256
HEAD_ROWS = 256
NO_WEIGHT = -80.0  # the log of a tail that no figure in float32 notices
UNIT_ROUNDOFF = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-24}


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRows:
    """Cached rows as padded tensors: N rows with entries, K and R the most entries and samples of one, G temperatures.

    R is 0 without samples.
    """

    k: Tensor  # i64 `[N]`
    ids: Tensor  # i64 `[N, K]`, padded with the row's first id
    margins: Tensor  # f32 `[N, K]`, z_1 − z_i
    tail_log: Tensor  # f64 `[N, G]`, log Σ_{j∉K} exp((z_j − z_1)/T)
    sample_k: Tensor  # i64 `[N]`
    sample_ids: Tensor  # i64 `[N, R]`
    sample_margins: Tensor  # f32 `[N, R]`

    def chunk(self, rows: slice, device: torch.device) -> "BatchRows":
        """Some of the rows, on a device."""
        return BatchRows(**{name: getattr(self, name)[rows].to(device) for name in self.__dataclass_fields__})


def audit_cache(
    path: Path, teacher: str, *, revision: str | None = None, num_docs: int, seed: int = 0, device_map: str = "auto"
) -> dict[str, Any]:
    """Run random documents of a cache through a teacher and compare its rows with the cache's.

    Args:
        path: a finished cache.
        teacher: a directory or a Hub id; revision: branch, tag or commit of a Hub id.
        num_docs: documents to choose; all where there are fewer.
        seed: of the choice.
        device_map: where the teacher's layers go, as transformers reads it.

    Returns:
        JSON values: `passed`, the figures behind it, and the worst row by document and position.

    Raises:
        CacheMismatchError: the teacher's head is narrower than the cache's tokenizer, or the labels' dtype is unknown.
        CacheFormatError, CacheCorruptError: the cache cannot be read.
    """
    cache, files = Cache(path), identify_model(teacher, revision)
    source, dtype, share = _load_teacher(cache, files, device_map)
    with_rows = np.flatnonzero(cache.doc_lengths > 1)
    require(len(with_rows), "the cache has no rows to compare", error=CacheMismatchError, where=path)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(with_rows, min(num_docs, len(with_rows)), replace=False))
    deviations: list[Tensor] = []  # per document f64 [3, N]: deviation and σ in logits, KL in nats
    with progress("auditing", int(cache.doc_lengths[chosen].sum()), "tokens") as bar:
        for document in chosen:
            deviations.append(_audit_document(cache, int(document), source))
            bar.advance(int(cache.doc_lengths[document]))
    deviation, sigma, kl = torch.cat(deviations, 1)
    allowed = MAX_DEVIATION * share * sigma
    ratio = (deviation / allowed).nan_to_num(nan=torch.inf)
    mean_kl_allowed = CODEC_KL + 0.5 * float((share * sigma).square().mean())
    rows_pass = bool((ratio <= 1).all()) and float(kl.mean()) <= mean_kl_allowed
    worst = int(ratio.argmax())
    ends = np.cumsum([part.shape[1] for part in deviations])
    number = int(np.searchsorted(ends, worst, side="right"))
    digests = _differing_digests(cache.manifest.identity, files)
    return {
        "passed": rows_pass and not digests,
        "digests_that_differ": digests,
        "declared": bool(cache.manifest.identity.get("declared")),
        "rows_pass": rows_pass,
        "documents": len(chosen),
        "rows": len(ratio),
        "rows_that_deviate": int((ratio > 1).sum()),
        "worst": {
            "document": str(cache.meta(int(chosen[number])).get("id", int(chosen[number]))),
            "position": worst - int(ends[number]) + deviations[number].shape[1],
            "deviation_logits": _finite(deviation[worst]),
            "allowed_logits": _finite(allowed[worst]),
        },
        "kl_nats": {"mean": _finite(kl.mean()), "max": _finite(kl.max()), "mean_allowed": mean_kl_allowed},
        "dtype": dtype,
    }


def _load_teacher(cache: Cache, files: ModelFiles, device_map: str) -> tuple[LogitSource, str, float]:
    """The teacher's logits in the labels' dtype, that dtype, and √(2L) (u + √D · 2⁻²⁴) of the tolerance."""
    labels = cache.manifest.identity["labels"]
    dtype = labels.get("dtype", "bfloat16")  # an import does not say; most teachers run in it
    require(
        dtype in UNIT_ROUNDOFF,
        "the labels have a dtype that no teacher runs in",
        error=CacheMismatchError,
        where=cache.path,
        got=dtype,
    )
    model = load_frozen(files.path, dtype, load_in=labels.get("load_in"), device_map=device_map)
    source = LogitSource(model, HEAD_ROWS)
    source.require_width(cache.tokenizer_size, where=f"{files.name} and {cache.path}")
    config = model.config.get_text_config()
    roundoff = UNIT_ROUNDOFF[dtype] + config.hidden_size**0.5 * UNIT_ROUNDOFF["float32"]
    return source, dtype, (2 * config.num_hidden_layers) ** 0.5 * roundoff


def verdict(path: Path, teacher: str, result: dict[str, Any]) -> str:
    """An audit's result in one line."""
    worst, kl = result["worst"], result["kl_nats"]
    figures = (
        f"{result['documents']:,} documents, {result['rows']:,} rows; largest deviation "
        f"{_text(worst['deviation_logits'])} of {_text(worst['allowed_logits'])} logits allowed, "
        f"KL mean {_text(kl['mean'])} of {_text(kl['mean_allowed'])} nats allowed, max {_text(kl['max'])}"
    )
    declared = "; the cache declares its teacher without proof (no digests)" if result["declared"] else ""
    if result["passed"]:
        return f"{path}: its rows are those of {teacher}: {figures}{declared}"
    reasons = [f"the digest of its {part} differs" for part in result["digests_that_differ"]]
    if not result["rows_pass"]:
        reasons.append(
            f"{result['rows_that_deviate']:,} rows deviate, most at document {worst['document']!r}, "
            f"position {worst['position']}"
        )
    return f"{path}: NOT from {teacher}: {', and '.join(reasons)}; {figures}{declared}"


def _differing_digests(identity: dict[str, Any], files: ModelFiles) -> list[str]:
    """The parts of the teacher whose digest is not the recorded one; a declared teacher has that of its tokenizer."""
    parts = {"tokenizer": (identity["tokenizer"]["digest"], tokenizer_digest(load_tokenizer(files.path)))}
    if not identity.get("declared"):
        parts["weights"] = (identity["teacher"]["weights_digest"], files.weights_digest)
        parts["config"] = (identity["teacher"]["config_digest"], files.config_digest)
    return [part for part, (recorded, present) in parts.items() if recorded != present]


def _audit_document(cache: Cache, document: int, source: LogitSource) -> Tensor:
    """Deviation and σ in logits and KL in nats of a document's rows: f64 `[3, N]`."""
    number = bisect.bisect_right(cache.shard_indptr, document) - 1
    first = cache.shard_indptr[number]
    shard, local = cache.load_shard(number), document - first
    lengths = np.diff(shard.doc_indptr)
    budget = cache.record(number).capture.get("token_budget")
    batch = [local]
    if budget is not None:
        batch = next(batch for batch in plan_batches(lengths.tolist(), budget) if local in batch)
    real_BT = torch.arange(lengths[batch[0]] - 1) < torch.from_numpy(lengths[batch] - 1)[:, None]
    ids_BT = torch.zeros(real_BT.shape, dtype=torch.int64)
    ids_BT[real_BT] = torch.cat([torch.from_numpy(cache.tokens(first + i)[:-1]) for i in batch])
    wanted_BT = torch.zeros_like(real_BT)  # the head runs only over this document
    wanted_BT[batch.index(local)] = real_BT[batch.index(local)]

    start, stop = int(shard.doc_indptr[local]), int(shard.doc_indptr[local + 1]) - 1
    rows = batch_rows(shard, start, stop, cache.temperatures)
    parts, done = [], 0
    for logits_NV in source.chunks(ids_BT, wanted_BT):
        chunk = rows.chunk(slice(done, done + len(logits_NV)), logits_NV.device)
        deviations = compare(
            logits_NV[:, : cache.tokenizer_size],
            chunk,
            temperatures=cache.temperatures,
            codec=cache.manifest.codec,
            tail_scale=shard.tail_scale,
            num_codings=2 if cache.manifest.derived_from else 1,
        )
        parts.append(deviations.cpu())
        done += len(logits_NV)
    return torch.cat(parts, 1)


def batch_rows(shard: Shard, start: int, stop: int, temperatures: Sequence[float]) -> BatchRows:
    """Rows `start` to `stop` of a shard, none of them empty."""
    k = shard.k[start:stop]
    entries = slice(int(shard.row_indptr[start]), int(shard.row_indptr[stop]))
    last = shard.last_margins[start:stop]
    tails = [
        decode_tail(shard.tail[start:stop, column], last, T, shard.tail_scale) for column, T in enumerate(temperatures)
    ]
    samples = shard.sampled(start, stop)
    none = np.zeros((stop - start, 0), np.int64)
    arrays = {
        "k": k,
        "ids": _pad(shard.ids[entries].astype(np.int64), k),
        "margins": _pad(shard.codebook[shard.codes[entries]], k),
        "tail_log": np.stack(tails, 1),
        "sample_k": np.zeros(len(k), np.int64) if samples is None else samples.k,
        "sample_ids": none if samples is None else samples.ids,
        "sample_margins": none.astype(np.float32) if samples is None else samples.margins,
    }
    return BatchRows(**{name: torch.from_numpy(array) for name, array in arrays.items()})


@torch.inference_mode()
def compare(
    z_NV: Tensor, rows: BatchRows, *, temperatures: Sequence[float], codec: str, tail_scale: int, num_codings: int = 1
) -> Tensor:
    """Deviation and σ in logits, and KL(cache‖teacher) over head and tail at T = 1 in nats: f64 `[3, N]`.

    Args:
        z_NV: f32, the teacher's logits of the tokenizer's ids.
        rows: the cache's.
        temperatures: the cache's grid; codec: its codec; tail_scale: steps of its tails per nat.
        num_codings: how often rows were rounded: twice where they were cut out of another cache.
    """
    finite_NV = z_NV.isfinite()
    count = finite_NV.sum(1)
    mean = torch.where(finite_NV, z_NV, 0.0).sum(1) / count
    sigma = (torch.where(finite_NV, z_NV - mean[:, None], 0.0).square().sum(1) / count).sqrt()

    inside_NK = torch.arange(rows.ids.shape[1], device=z_NV.device) < rows.k[:, None]
    head_NK = z_NV.gather(1, rows.ids)
    first_N1 = head_NK[:, :1]
    margins_NK = (first_N1 - head_NK).clamp(max=MAX_MARGIN)
    larger = torch.maximum(margins_NK, rows.margins).cpu().numpy()
    bound_NK = num_codings * torch.from_numpy(margin_bound(larger, codec)).to(z_NV.device)
    deviation = torch.where(inside_NK, (margins_NK - rows.margins).abs() - bound_NK, 0.0).amax(1)

    outside_NV = z_NV.scatter(1, rows.ids, -torch.inf)
    excess = outside_NV.amax(1) - head_NK.gather(1, rows.k[:, None] - 1)[:, 0]
    deviation = torch.maximum(deviation, excess).clamp(min=0).double()

    tail_NG = torch.stack([((outside_NV - first_N1) / T).logsumexp(1).double() for T in temperatures], 1)
    weighty_NG = torch.maximum(tail_NG, rows.tail_log) > NO_WEIGHT
    T_G = torch.tensor(temperatures, device=z_NV.device, dtype=torch.float64)
    # What was cut off a row and joined its tail had been rounded as an entry, by up to 0.1.
    tail_bound_G = 0.5 * num_codings / tail_scale + (num_codings - 1) * 0.1 / T_G
    tail_error_NG = T_G * ((tail_NG - rows.tail_log).abs() - tail_bound_G)
    deviation = torch.maximum(deviation, torch.where(weighty_NG, tail_error_NG, 0.0).amax(1))

    if rows.sample_ids.shape[1]:
        inside_NR = torch.arange(rows.sample_ids.shape[1], device=z_NV.device) < rows.sample_k[:, None]
        # The margins are relative to the row's largest logit, which is its first entry's.
        sampled_NR = first_N1 - z_NV.gather(1, rows.sample_ids)
        errors_NR = torch.where(inside_NR, (sampled_NR - rows.sample_margins).abs(), 0.0)
        deviation = torch.maximum(deviation, errors_NR.amax(1).double())

    unit = list(temperatures).index(1.0)
    ours = _log_partition(rows.margins, inside_NK, rows.tail_log[:, unit])
    theirs = _log_partition(margins_NK, inside_NK, tail_NG[:, unit])
    return torch.stack([deviation, sigma.double(), kl_rows(ours, theirs)])


def _log_partition(margins_NK: Tensor, inside_NK: Tensor, tail_log_N: Tensor) -> Tensor:
    """Log-probabilities of a row's entries and its tail: f64 `[N, K+1]`."""
    weights_NK = torch.where(inside_NK, -margins_NK.double(), -torch.inf)
    return torch.cat([weights_NK, tail_log_N[:, None]], 1).log_softmax(1)


def _pad(values: Array, k: Array) -> Array:
    """Rows of lengths k as `[N, K]`, each filled up with its own first value."""
    starts = np.cumsum(k) - k
    column = np.arange(k.max())
    return values[starts[:, None] + np.where(column < k[:, None], column, 0)]


def _finite(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def _text(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2g}"
