"""How close a model is to the teacher, and to the text, over a cache's held-out documents."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.batching import plan_batches
from shared.cache.reader import Cache
from shared.errors import CacheMismatchError, ConfigError
from shared.eval.models import dtype_name, hub_commit, load_model, num_parameters, weight_bytes
from shared.runtime import log, machine, progress, read_json, sha256_file, versions
from shared.tokenizer import load_tokenizer, tokenizer_digest

_CHUNK_ROWS = 256  # rows whose float32 log-softmax is formed at once


@dataclass(kw_only=True, slots=True)
class Totals:
    """Sums over targets, in float64."""

    nll_nats: float = 0.0
    kl_nats: float = 0.0
    num_agreed: int = 0
    num_targets: int = 0


def evaluate_fidelity(model_dir: Path, cache_dir: Path, *, dtype: str, batch_tokens: int) -> dict[str, Any]:
    """Score a model on every target of a cache.

    Args:
        model_dir: a transformers directory.
        cache_dir: a finished cache, usually of held-out documents.
        dtype: a key of `models.DTYPES`; the head always runs in float32.
        batch_tokens: at most as many tokens, padding included, go through the model at once (one document at least).

    Returns:
        `nll_nats`, `bits_per_byte`, `perplexity`, `kl_to_teacher_nats` (K+1 partition at T=1), `top1_agreement`,
        `teacher_nll_nats` (from the cache), counts, `seen_in_training`, and what was measured on what. A figure that
        is not finite or not known is null, with the reason in `reasons`.

    Raises:
        CacheMismatchError: model and cache have different tokenizers, or the model's head is too narrow.
        ConfigError: the cache has no targets.
    """
    start = time.monotonic()
    cache = Cache(cache_dir)
    model, tokenizer = load_model(model_dir, dtype)
    ours, theirs = tokenizer_digest(tokenizer), tokenizer_digest(load_tokenizer(cache.tokenizer_path))
    if ours != theirs:
        raise CacheMismatchError("the model's tokenizer is not the cache's", where=f"{model_dir} and {cache_dir}",
                                 expected=f"{theirs} (cache)", got=f"{ours} (model)",
                                 fix="evaluate on a cache of this model's teacher")  # fmt: skip
    totals = score_cache(model, cache, batch_tokens=batch_tokens)
    if totals.num_targets == 0:
        raise ConfigError("the cache has no targets to score", where=cache_dir)
    target_bytes = cache.statistics.get("target_bytes")
    nll_nats = totals.nll_nats / totals.num_targets
    figures = {
        "nll_nats": nll_nats,
        "bits_per_byte": totals.nll_nats / math.log(2) / target_bytes if target_bytes else None,
        "perplexity": math.exp(nll_nats) if nll_nats < 700 else math.inf,
        "kl_to_teacher_nats": totals.kl_nats / totals.num_targets,
        "top1_agreement": totals.num_agreed / totals.num_targets,
        "teacher_nll_nats": cache.statistics.get("teacher_nll_nats"),
    }
    reasons = {key: "unknown" if value is None else f"not finite ({value})"
               for key, value in figures.items() if value is None or not math.isfinite(value)}  # fmt: skip
    return {
        **{key: None if key in reasons else value for key, value in figures.items()},
        "reasons": reasons,
        "num_targets": totals.num_targets,
        "num_documents": cache.num_documents,
        "num_cut_documents": int(
            (cache.doc_lengths > (getattr(model.config, "max_position_embeddings", None) or np.inf)).sum()
        ),
        "target_bytes": target_bytes,
        "kind": f"partition K={cache.manifest['top_k']}",
        "model": {
            "path": str(model_dir),
            "commit": hub_commit(model_dir),
            "parameters": num_parameters(model),
            "bytes": weight_bytes(model_dir),
        },
        "cache": {
            "label_identity": cache.label_identity,
            "manifest_sha256": sha256_file(cache_dir / "manifest.json"),
            "codec": cache.manifest["codec"],
        },
        "seen_in_training": _seen_in_training(model_dir, cache),
        "dtype": dtype_name(model),
        "device": model.device.type,
        "seconds": round(time.monotonic() - start, 3),
        "machine": machine(),
        "versions": versions("torch", "transformers", "numpy", "h5py", "codedistill"),
    }


def _seen_in_training(model_dir: Path, cache: Cache) -> bool:
    """Whether the model is a run that was trained on any of this cache's shards or data sets."""
    record = model_dir / "run.json"
    if not record.is_file():
        return False
    trained_on = read_json(record).get("caches", [])
    shards = {digest for part in trained_on for digest in part["shards"].values()}
    sources = {source["digest"] for part in trained_on for source in part["sources"]}
    ours = {entry["sha256"] for name, entry in cache.manifest["files"].items() if name.endswith(".h5")}
    seen = bool(shards & ours or sources & {source.get("digest") for source in cache.manifest["sources"]})
    if seen:
        log(f"warning: {model_dir} was trained on documents of {cache.path}: these are no held-out figures")
    return seen


@torch.inference_mode()
def score_cache(model: Any, cache: Cache, *, batch_tokens: int) -> Totals:
    """Sum NLL, KL and agreement over all targets.

    Batches are padded on the right, out of sight of every real token under a causal mask, as in stage 1.
    """
    totals = Totals()
    positions = getattr(model.config, "max_position_embeddings", None) or int(cache.doc_lengths.max())
    with float32_head(model) as head, progress("Scoring", cache.num_tokens - cache.num_documents, "tokens") as bar:
        for pieces in cache_batches(cache, batch_tokens, positions):
            tokens = [cache.tokens(doc)[start : stop + 1] for doc, start, stop in pieces]
            masks = [cache.loss_mask(doc)[start:stop] for doc, start, stop in pieces]
            width = max(map(len, masks))
            ids_BT = np.zeros((len(pieces), width), np.int64)
            mask_BT = np.zeros((len(pieces), width), bool)
            for row, (ids, mask) in enumerate(zip(tokens, masks, strict=True)):
                ids_BT[row, : len(mask)] = ids[: len(mask)]
                mask_BT[row, : len(mask)] = mask
            head.rows_BT = torch.from_numpy(mask_BT).to(model.device)
            logits_NV = model(input_ids=torch.from_numpy(ids_BT).to(model.device), use_cache=False).logits
            if logits_NV.shape[-1] < cache.tokenizer_size:
                raise CacheMismatchError("the model's head is narrower than the cache's tokenizer",
                                         expected=f">= {cache.tokenizer_size}", got=logits_NV.shape[-1])  # fmt: skip
            gold_N = torch.from_numpy(np.concatenate([t[1:][m] for t, m in zip(tokens, masks, strict=True)]))
            targets = [
                (cache.targets(d, 1.0, start, stop), m) for (d, start, stop), m in zip(pieces, masks, strict=True)
            ]
            _add(
                totals,
                logits_NV[:, : cache.tokenizer_size],
                gold_N,
                torch.from_numpy(np.concatenate([t.k[mask] for t, mask in targets])),
                torch.from_numpy(np.concatenate([t.ids[mask] for t, mask in targets])),
                torch.from_numpy(np.concatenate([t.logp[mask] for t, mask in targets])),
                torch.from_numpy(np.concatenate([t.log_tail[mask] for t, mask in targets])),
            )
            bar.advance(sum(map(len, masks)))
    return totals


def _add(totals: Totals, logits_NV: Tensor, *targets: Tensor) -> None:
    for start in range(0, len(logits_NV), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        chunk = [target[rows].to(logits_NV.device) for target in targets]
        nll_N, kl_N, agreed_N = compare_rows(logits_NV[rows], *chunk)
        totals.nll_nats += nll_N.double().sum().item()
        totals.kl_nats += kl_N.double().sum().item()
        totals.num_agreed += int(agreed_N.sum())
        totals.num_targets += len(nll_N)


def compare_rows(
    logits_NV: Tensor, gold_N: Tensor, k_N: Tensor, ids_NK: Tensor, logp_NK: Tensor, log_tail_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare a student's rows with the teacher's K+1 partition at T=1.

    The student's tail is a logsumexp over all ids outside the row (LOSSES: never 1 − Σq, which errs by 1 % at a tail of
    1e-4).

    Args:
        logits_NV: float32 student logits, only ids of the tokenizer.
        gold_N: i64, the next token.
        k_N: i64, entries per row; the columns after are padding.
        ids_NK: i64, the teacher's ids, first the most likely.
        logp_NK: f32, their log-probabilities in nats.
        log_tail_N: f32, log-probability outside the row; −inf where there is none.

    Returns:
        Per row: NLL of the gold token and KL(teacher‖student) in nats, and whether both have the same first id.
    """
    valid_NK = torch.arange(ids_NK.shape[1], device=ids_NK.device) < k_N[:, None]
    ids_NK = torch.where(valid_NK, ids_NK, ids_NK[:, :1])  # padding must not name an id that is not in the row
    head_NK = logits_NV.gather(1, ids_NK).masked_fill(~valid_NK, -torch.inf)
    log_rest_N = logits_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1)
    log_total_N = torch.logaddexp(head_NK.logsumexp(1), log_rest_N)
    nll_N = log_total_N - logits_NV.gather(1, gold_N[:, None])[:, 0]
    log_ratio_NK = logp_NK - (head_NK - log_total_N[:, None])
    kl_N = torch.where(valid_NK, logp_NK.exp() * log_ratio_NK, 0.0).sum(1)
    tail_N = log_tail_N.exp() * (log_tail_N - (log_rest_N - log_total_N))
    kl_N = kl_N + torch.where(log_tail_N > -torch.inf, tail_N, 0.0)
    return nll_N, kl_N, logits_NV.argmax(1) == ids_NK[:, 0]


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


class _Float32Head(nn.Module):
    """A model's head in float32, over chosen rows only: the [B, T, V] tensor never exists."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight.detach().float()
        self.bias = None if head.bias is None else head.bias.detach().float()
        self.rows_BT: Tensor | None = None

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return nn.functional.linear(hidden_BTD[self.rows_BT].float(), self.weight, self.bias)


@contextlib.contextmanager
def float32_head(model: Any) -> Iterator[_Float32Head]:
    """Let `model(...).logits` be float32 `[N, V]` of the rows set as `rows_BT`, with the model's own scaling around.

    Half-precision logits tie in most rows, which would decide the top-1 agreement.
    """
    original = model.get_output_embeddings()
    head = _Float32Head(original)
    model.set_output_embeddings(head)
    try:
        yield head
    finally:
        model.set_output_embeddings(original)
