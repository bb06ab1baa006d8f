"""Sampled targets: for each token ids drawn from the teacher's distribution, or from its tail, by the token's own seed.

Shapes: N rows of a chunk, S rows of a shard, V vocabulary, M draws per row.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.cache.format import Samples

# Rows whose float64 masses are formed at once: what stays in a CPU's caches; what a GPU has memory for.
_CPU_ROWS, _GPU_ROWS = 8, 256


def uniforms(meta: Mapping[str, Any], num_rows: int, num: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for a segment's rows: f64 `[num_rows, num]`.

    They follow only from the document's digest, the part of it that the segment is, and the position: batches, shards,
    ranks and devices do not change them.

    Args:
        meta: the segment's `digest` and, where the document was split, its `part`.
        num_rows: tokens that have a next one.
        num: draws per row.
    """
    key = hashlib.sha256(f"{meta['digest']} {meta.get('part', 0)}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random((num_rows, num))


@torch.inference_mode()
def draw(z_NV: Tensor, uniforms_NM: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw ids with probabilities ∝ exp(z/T) by inverting the cumulative distribution, in float64.

    Args:
        z_NV: float32 logits; −inf for ids that must not be drawn. A row with NaN draws arbitrary ids.
        uniforms_NM: float64 in [0, 1), on the same device.
        temperature: T.

    Returns:
        ids: i64 `[N, M]`; −1 where a row has no finite logit.
        logits: f32 `[N, M]`, those of the ids.
    """
    ids = torch.empty(uniforms_NM.shape, dtype=torch.int64, device=z_NV.device)
    rows = _CPU_ROWS if z_NV.device.type == "cpu" else _GPU_ROWS
    for start in range(0, len(z_NV), rows):
        part = slice(start, start + rows)
        top = z_NV[part].amax(1, keepdim=True)
        shift = torch.where(top == -torch.inf, 0.0, top)
        mass = ((z_NV[part] - shift) / temperature).exp_().double().cumsum_(1)
        total = mass[:, -1:]
        # Below the total even if the product rounds up to it: no id after the last one with mass is drawn.
        bound = torch.minimum(uniforms_NM[part] * total, torch.nextafter(total, torch.zeros_like(total)))
        ids[part] = torch.searchsorted(mass, bound, right=True).clamp_(max=z_NV.shape[1] - 1)
        ids[part].masked_fill_(total == 0, -1)
    return ids, z_NV.gather(1, ids.clamp(min=0))


def to_samples(
    ids_SM: NDArray[np.int64], margins_SM: NDArray[np.float32], *, temperature: float, drawn_from: str
) -> Samples:
    """Count equal draws.

    Args:
        ids_SM: what was drawn; rows of −1 hold no draws.
        margins_SM: z_1 − z_i of each.
        temperature: as drawn at.
        drawn_from: `full` or `tail`.
    """
    order = np.argsort(ids_SM, axis=1, kind="stable")
    ids, margins = np.take_along_axis(ids_SM, order, 1), np.take_along_axis(margins_SM, order, 1)
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first &= ids >= 0
    starts = np.flatnonzero(first)
    ends = np.minimum(np.append(starts[1:], ids.size), (starts // ids.shape[1] + 1) * ids.shape[1])
    return Samples(
        k=first.sum(1),
        ids=ids[first],
        counts=ends - starts,
        margins=margins[first],
        temperature=temperature,
        drawn_from=drawn_from,
        num=ids.shape[1],
    )
