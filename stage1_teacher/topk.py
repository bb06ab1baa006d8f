"""What is kept of rows of logits: top-k, tails, gold, entropy, in one pass over a chunk of float32 logits.

Shapes: N rows, V vocabulary, K targets, G grid temperatures, R rows of a block.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.cache.format import Array
from shared.logits import largest

_BLOCK_ROWS = 8  # rows of a 49,152-word vocabulary that stay in a CPU's caches while all passes read them
# Below this distance from the tail's maximum exp() is exactly 0 in float32 at every allowed temperature. Being finite
# (unlike −inf) it makes 0 · distance a 0.
_FLOOR = -1e4
# A power beyond this would cost float32 digits: each multiplication adds a rounding.
_MAX_POWER = 16

Powers = list[tuple[float, list[tuple[int, list[int | None]]]]]  # see `_powers`


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedRows:
    """What the cache keeps of N rows of logits, normalised over the tokenizer's ids; on the logits' device."""

    k: Tensor  # i64 [N] entries that are not −inf
    ids: Tensor  # i64 [N, K] descending logit, ties by ascending id
    margins: Tensor  # f32 [N, K] z_1 − z_i; +inf beyond k
    tail_log: Tensor  # f64 [N, G] log Σ_{j∉K} exp((z_j − z_1)/T); −inf without a tail
    gold_logprob: Tensor  # f32 [N] nats at T=1
    gold_rank: Tensor  # i64 [N] place of the gold token among the row's entries, from 0; K where it is not there
    entropy_nats: Tensor  # f32 [N] at T=1
    excess_mass: Tensor  # f32 [N] probability at T=1 of ids beyond the tokenizer, before they were masked
    top_logit: Tensor  # f32 [N] NaN or infinite where the row cannot be used
    sample_ids: Tensor | None = None  # i64 [N, M] drawn ids; −1 where a row has nothing to draw
    sample_margins: Tensor | None = None  # f32 [N, M] z_1 − z_i of each


class HostRows:
    """Captured rows on their way to the host as one buffer, which the device fills after its earlier work.

    Args:
        chunks: rows on one device.
    """

    def __init__(self, chunks: Sequence[CapturedRows]) -> None:
        joined = {name: [getattr(chunk, name) for chunk in chunks] for name in CapturedRows.__dataclass_fields__}
        fields = {name: torch.cat(parts) for name, parts in joined.items() if parts[0] is not None}
        fields = {n: field.int() if field.dtype == torch.int64 else field for n, field in fields.items()}
        fields = dict(sorted(fields.items(), key=lambda item: -item[1].itemsize))  # so that each starts at its own size
        buffer = torch.cat([field.flatten().view(torch.uint8) for field in fields.values()])
        self._shapes = {name: (field.shape, field.dtype) for name, field in fields.items()}
        self._bytes = buffer.to("cpu", non_blocking=buffer.is_cuda)  # then into pinned memory
        self._copied = torch.cuda.current_stream(buffer.device).record_event() if buffer.is_cuda else None

    def arrays(self) -> dict[str, Array]:
        """Wait for the copy; the fields of `CapturedRows` that are there, whole numbers as i32."""
        if self._copied is not None:
            self._copied.synchronize()
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in self._shapes.values()]
        parts = zip(self._shapes.items(), self._bytes.split(sizes), strict=True)
        return {name: part.view(dtype).view(shape).numpy() for (name, (shape, dtype)), part in parts}


@torch.inference_mode()
def capture_rows(
    logits_NV: Tensor, gold_N: Tensor, *, top_k: int, temperatures: Sequence[float], tokenizer_size: int
) -> CapturedRows:
    """Reduce rows of logits to what the cache keeps.

    Args:
        logits_NV: float32; overwritten.
        gold_N: i64, the token that really follows.
        top_k: entries to keep, fewer where the vocabulary or the finite logits are fewer.
        temperatures: the grid of tail masses; holds 1.
        tokenizer_size: ids from here on are masked before anything is normalised.

    Returns:
        Tensors on the logits' device. A row with NaN or +inf, or with nothing but −inf, has a `top_logit` that is not
        finite; its other values mean nothing.
    """
    z_NV, excess_NX = logits_NV[:, :tokenizer_size], logits_NV[:, tokenizer_size:]
    gold_logit_N = z_NV.gather(1, gold_N[:, None]).squeeze(1)
    K = min(top_k, tokenizer_size)
    split = split_by_blocks if z_NV.device.type == "cpu" else split_at_once
    values_NK1, ids_NK, sums_NG, weighted_N = split(z_NV, K, temperatures)
    values_NK, left_N = values_NK1[:, :K], values_NK1[:, K]  # what is kept; the largest logit that is not
    top_N = values_NK[:, 0].clone()
    margins_NK = top_N[:, None] - values_NK
    kept_NK = values_NK > -torch.inf
    # The tail sums are relative to its own largest logit: bring them to the row's, z_1.
    gap_N = (left_N.where(left_N.isfinite(), 0.0) - top_N).double()
    tail_log_NG = sums_NG.double().log() + torch.stack([gap_N / T for T in temperatures], 1)

    # T = 1, in float64, relative to z_1: log Z, then H = log Z + Σ p · (z_1 − z).
    head_NK = torch.exp(-margins_NK.double())
    tail_N = sums_NG[:, list(temperatures).index(1.0)].double()
    log_z_N = torch.log(head_NK.sum(1) + tail_N * gap_N.exp())
    head_gap_N = torch.where(kept_NK, head_NK * margins_NK, 0.0).sum(1)
    tail_gap_N = gap_N.exp() * (-gap_N * tail_N - weighted_N.double())
    entropy_N = log_z_N + (head_gap_N + tail_gap_N) * torch.exp(-log_z_N)

    excess_N = torch.zeros_like(top_N)
    if excess_NX.shape[1]:
        excess_N = torch.sigmoid(excess_NX.logsumexp(1) - top_N - log_z_N.float())
    is_gold_NK = (ids_NK == gold_N[:, None]) & kept_NK
    return CapturedRows(
        k=kept_NK.sum(1),
        ids=ids_NK,
        margins=margins_NK,
        tail_log=tail_log_NG,
        gold_logprob=(gold_logit_N - top_N).double().sub(log_z_N).float(),
        gold_rank=torch.where(is_gold_NK.any(1), is_gold_NK.int().argmax(1), K),
        entropy_nats=entropy_N.float(),
        excess_mass=excess_N,
        top_logit=top_N,
    )


def split_by_blocks(z_NV: Tensor, K: int, temperatures: Sequence[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split rows into their K largest logits and the rest, block by block; `z_NV` becomes −inf at the former.

    Returns:
        values: f32 `[N, K + 1]`, the K + 1 largest, descending; −inf where there are fewer. One more than is kept: it
            is the tail's maximum.
        ids: i64 `[N, K]`, of the first K, equal logits by ascending id.
        sums: f32 `[N, G]`, Σ exp((z − z_{K+1})/T) over the rest; weighted: f32 `[N]`, Σ exp(z − z_{K+1}) (z − z_{K+1}).
    """
    block = min(_BLOCK_ROWS, len(z_NV))
    scratch = [z_NV.new_empty(block, z_NV.shape[1]) for _ in range(4)]
    parts = []
    for z_RV in z_NV.split(block):
        values_RK1, ids_RK, shift_R1 = _take_largest(z_RV, K)
        parts.append((values_RK1, ids_RK, *_tail_sums(z_RV, shift_R1, temperatures, scratch)))
    values_NK1, ids_NK, sums_NG, weighted_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return values_NK1, ids_NK, sums_NG, weighted_N


def split_at_once(z_NV: Tensor, K: int, temperatures: Sequence[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`split_by_blocks` for a GPU: few launches and no wait; on CUDA one read of the rest, in a compiled kernel."""
    values_NK1, ids_NK, shift_N1 = _take_largest(z_NV, K)
    powers = _powers(tuple(temperatures))
    if not z_NV.is_cuda:
        return values_NK1, ids_NK, *tail_sums(z_NV, shift_N1, len(temperatures), powers)
    with torch._dynamo.config.patch(suppress_errors=True):  # without a C compiler, as it is
        return values_NK1, ids_NK, *compiled_tail_sums()(z_NV, shift_N1, len(temperatures), powers)


def _take_largest(z_NV: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K + 1 largest logits, the ids of K, which become −inf in `z_NV`, and the tail's maximum `[N, 1]`, or 0."""
    values, ids_NK = largest(z_NV, K)
    values_NK1 = F.pad(values, (0, K + 1 - values.shape[1]), value=-torch.inf)
    z_NV.scatter_(1, ids_NK, -torch.inf)
    last_N1 = values_NK1[:, K:]
    return values_NK1, ids_NK, last_N1.where(last_N1.isfinite(), 0.0)


@functools.cache
def compiled_tail_sums() -> Callable[..., tuple[Tensor, Tensor]]:
    """`tail_sums` as one kernel."""
    return torch.compile(tail_sums)


def tail_sums(z_NV: Tensor, shift_N1: Tensor, num_temperatures: int, powers: Powers) -> tuple[Tensor, Tensor]:
    """What `_tail_sums` forms, without scratch memory: a compiler keeps what is between in registers."""
    distance = (z_NV - shift_N1).clamp(min=_FLOOR)
    sums = [distance] * num_temperatures  # each is replaced
    for rate, chains in powers:
        unit = (distance * rate).exp()
        for odd, columns in chains:
            u = unit**odd
            for doublings, column in enumerate(columns):
                u = u**2 if doublings else u
                if column is not None:
                    sums[column] = u.sum(1)
    return torch.stack(sums, 1), (distance.exp() * distance).sum(1)


def _tail_sums(
    z_RV: Tensor, shift_R1: Tensor, temperatures: Sequence[float], scratch: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Σ exp((z − shift)/T) for the grid `[R, G]`, and Σ exp(z − shift) · (z − shift) `[R]`.

    Args:
        z_RV: logits, −inf where they do not belong to the tail.
        shift_R1: their maximum, 0 where there is none.
        temperatures: the grid.
        scratch: four tensors that z fits into, overwritten: memory fresh from the system costs more than the sums.
    """
    distance, unit, u, product = (buffer[: len(z_RV)] for buffer in scratch)  # [R, V] each
    sums = z_RV.new_empty(len(temperatures), len(z_RV))
    torch.sub(z_RV, shift_R1, out=distance).clamp_(min=_FLOOR)  # z − shift ≤ 0
    for rate, chains in _powers(tuple(temperatures)):
        torch.mul(distance, rate, out=unit).exp_()  # the one exp() of this rate
        for odd, columns in chains:
            torch.pow(unit, odd, out=u)
            for doublings, column in enumerate(columns):
                if doublings:
                    torch.mul(u, u, out=u)  # exp(2 x) from exp(x)
                if column is not None:
                    torch.sum(u, 1, out=sums[column])
                    if temperatures[column] == 1.0:
                        weighted = torch.mul(u, distance, out=product).sum(1)
    return sums.T, weighted


@functools.cache
def _powers(temperatures: tuple[float, ...]) -> Powers:
    """How to form exp(x/T) for a whole grid with few exp(): rates r, and for each the odd powers of exp(r·x) to square.

    If all 1/T are small multiples of one rate, as 2, 1, ⅔ and ½ are of ⅙, that rate suffices: exp(x/6)³ and its
    squares are T = 2, 1 and ½, exp(x/6)⁴ is T = 1.5. A multiplication costs a tenth of an exp().

    Returns:
        For each rate its chains: an odd power, and the grid's columns of the powers odd, 2·odd, 4·odd, … (None where
        no temperature of the grid has that power).
    """
    inverse = [1 / Fraction(t).limit_denominator(1000) for t in temperatures]
    common = math.lcm(*(r.denominator for r in inverse))
    unit = Fraction(math.gcd(*(int(r * common) for r in inverse)), common)
    powers = [int(r / unit) for r in inverse]
    exact = all(math.isclose(power * unit * t, 1, rel_tol=1e-12) for power, t in zip(powers, temperatures, strict=True))
    if not exact or max(powers) > _MAX_POWER:
        return [(1 / t, [(1, [column])]) for column, t in enumerate(temperatures)]
    chains: dict[int, list[int | None]] = {}
    for power, column in sorted(zip(powers, range(len(powers)), strict=True)):
        doublings = (power & -power).bit_length() - 1
        columns = chains.setdefault(power >> doublings, [])
        columns += [None] * (doublings - len(columns)) + [column]
    return [(float(unit), sorted(chains.items()))]
