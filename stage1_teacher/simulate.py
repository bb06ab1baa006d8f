"""How far the gradient of a cached, cut and quantised row points from that of the teacher's whole distribution."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.cache.format import ShardArrays
from shared.cache.identity import require_same
from shared.cache.simulate import Variant
from shared.checkpoints import load_model
from shared.progress import progress
from shared.tokenizer import load_tokenizer, tokenizer_digest
from stage1_teacher.logits import LogitSource

CHUNK_ROWS = 64


def gradient_errors(
    cache: Path, rows: ShardArrays, variants: Sequence[Variant], teacher: Path, student: Path | None, column: int
) -> list[dict[str, float]]:
    """Compare gradients at T = 1 with respect to a student's logits z, q = softmax(z), on every row of a sample.

    Dense: g = q − p with the teacher's own p, computed here. Sparse, as `ghost` training forms it from the decoded row:
    q_k − p_k for its ids, and (q_τ − p_τ) q_j / q_τ for each other id j.

    Args:
        cache: for its tokenizer.
        rows: the sample; variants: its encodings.
        teacher: a model directory.
        student: one whose logits z are taken; None for a student that knows nothing, z = 0.
        column: of T = 1 in the grid.

    Returns:
        For each variant, as means over all rows: `angle_degrees` between both, and `relative_error`, which is
        |sparse − dense| / |dense|.

    Raises:
        CacheMismatchError: the teacher's or student's tokenizer is not the cache's.
    """
    tokenizer = load_tokenizer(cache / "tokenizer")
    size = len(tokenizer)
    sources = [_load(path, cache, tokenizer) for path in (teacher, student) if path is not None]
    sums = np.zeros((len(variants), 2))
    count = 0
    with progress("gradients", len(rows.tokens), "tokens") as bar:
        for start, stop in zip(rows.doc_indptr[:-1], rows.doc_indptr[1:], strict=True):
            ids = torch.from_numpy(rows.tokens[start : stop - 1])
            at = int(start)
            for chunk in _chunks(sources, ids):
                logits = [part[:, :size].double().cpu() for part in chunk]
                p = logits[0].softmax(1)
                q = logits[1].softmax(1) if student is not None else torch.full_like(p, 1 / size)
                dense = q - p
                for number, variant in enumerate(variants):
                    sparse = _sparse(variant, at, at + len(p), column, q)
                    cosine = torch.cosine_similarity(sparse, dense, dim=1).clamp(-1, 1)
                    sums[number, 0] += float(cosine.arccos().rad2deg().sum())
                    sums[number, 1] += float(((sparse - dense).norm(dim=1) / dense.norm(dim=1)).sum())
                at += len(p)
                count += len(p)
            bar.advance(int(stop - start))
    return [{"angle_degrees": angle / count, "relative_error": error / count} for angle, error in sums.tolist()]


def _sparse(variant: Variant, start: int, stop: int, column: int, q: Tensor) -> Tensor:
    target = variant.shard.targets(start, stop, 1.0, column, variant.top_k)
    real = torch.arange(target.ids.shape[1]) < torch.from_numpy(target.k)[:, None]
    ids = torch.from_numpy(target.ids)
    p_head = torch.from_numpy(target.logp).double().exp().where(real, 0.0)
    inside = torch.zeros_like(q).scatter_add_(1, ids, real.double())  # padding repeats id 0 and adds nothing
    p_kept = torch.zeros_like(q).scatter_add_(1, ids, p_head)
    q_tail = (q * (1 - inside)).sum(1, keepdim=True)
    p_tail = torch.from_numpy(target.log_tail).double().exp()[:, None]
    share = (q_tail - p_tail) / q_tail.clamp(min=1e-300)
    return torch.where(inside > 0, q - p_kept, q * share)


def _chunks(sources: Sequence[LogitSource], ids: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The models' logits at a document's positions, side by side."""
    if len(ids):
        real = torch.ones(1, len(ids), dtype=torch.bool)
        yield from zip(*(source.chunks(ids[None], real) for source in sources), strict=True)


def _load(path: Path, cache: Path, tokenizer: Any) -> LogitSource:
    model, own = load_model(path)
    require_same(
        "the tokenizer",
        tokenizer_digest(tokenizer),
        tokenizer_digest(own),
        ours_name=cache,
        theirs_name=path,
        fix="name the cache's own teacher, and a student trained from it",
    )
    return LogitSource(model, CHUNK_ROWS)
