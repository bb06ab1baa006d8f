"""What is kept of rows of logits: top-k, tails, gold, entropy, in one pass over a chunk of float32 logits.

Shapes: N rows, V vocabulary, K targets, G grid temperatures, R rows of a block.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

# torch.topk on a CPU puts every column through a heap; maxima of groups of this many columns rule most of them out.
_GROUP = 16
# Below this distance from the tail's maximum exp() is exactly 0 in float32 at every allowed temperature. Being finite
# (unlike −inf) it makes 0 · distance a 0.
_FLOOR = -1e4
# A power beyond this would cost float32 digits: each multiplication adds a rounding.
_MAX_POWER = 16


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
    values_NK1, ids_NK, sums_NG, weighted_N = _split_rows(z_NV, K, temperatures)
    values_NK, left_N = values_NK1[:, :K], values_NK1[:, K]  # what is kept; the largest logit that is not
    top_N = values_NK[:, 0].clone()
    margins_NK = top_N[:, None] - values_NK
    kept_NK = values_NK > -torch.inf
    # The tail sums are relative to its own largest logit: bring them to the row's, z_1.
    gap_N = (left_N.where(left_N.isfinite(), 0.0) - top_N).double()
    T_G = torch.tensor(temperatures, device=gap_N.device).double()
    tail_log_NG = sums_NG.double().log() + gap_N[:, None] / T_G

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


def _split_rows(z_NV: Tensor, K: int, temperatures: Sequence[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split rows into their K largest logits and the rest, block by block; `z_NV` becomes −inf at the former.

    Returns:
        values: f32 `[N, K + 1]`, the K + 1 largest, descending; −inf where there are fewer. One more than is kept: it
            is the tail's maximum, and shows whether a tie crosses the boundary.
        ids: i64 `[N, K]`, of the first K, equal logits by ascending id.
        sums, weighted: of the rest, as `_tail_sums` forms them.
    """
    N, V = z_NV.shape
    values_NK1 = z_NV.new_full((N, K + 1), -torch.inf)
    ids_NK = torch.empty(N, K, dtype=torch.int64, device=z_NV.device)
    sums_NG, weighted_N = z_NV.new_empty(N, len(temperatures)), z_NV.new_empty(N)
    block = min(block_rows(z_NV.device), N)
    scratch = [z_NV.new_empty(block, V) for _ in range(4)]
    for start in range(0, N, block):
        rows = slice(start, start + block)
        z_RV = z_NV[rows]
        values, ids = _topk(z_RV, min(K + 1, V))
        values_NK1[rows, : values.shape[1]], ids_NK[rows] = values, ids[:, :K]
        z_RV.scatter_(1, ids[:, :K], -torch.inf)
        shift_R1 = values_NK1[rows, K:]
        shift_R1 = shift_R1.where(shift_R1.isfinite(), 0.0)
        sums_NG[rows], weighted_N[rows] = _tail_sums(z_RV, shift_R1, temperatures, scratch)
    _order_ties(z_NV, values_NK1, ids_NK)
    return values_NK1, ids_NK, sums_NG, weighted_N


def block_rows(device: torch.device) -> int:
    """Rows that go through all passes together.

    On a CPU a few rows of a 49,152-word vocabulary stay in the caches; on a GPU a block is large against the cost of a
    launch, and its scratch memory small against the chunk.
    """
    return 8 if device.type == "cpu" else 256


def _topk(z_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk: values and ids `[R, k]`; among equal values at the boundary any may be chosen.

    On a CPU the k groups of columns with the largest maxima come first: they hold every value above the k-th largest
    maximum, and at least k values that reach it.
    """
    R, V = z_RV.shape
    groups = V // _GROUP
    if z_RV.device.type != "cpu" or groups < 4 * k:
        return z_RV.topk(k)
    # Group j holds the columns j, j + groups, …: its maximum is taken across contiguous stretches.
    maxima = z_RV[:, : groups * _GROUP].view(R, _GROUP, groups).amax(1)
    columns = (maxima.topk(k, sorted=False).indices[:, :, None] + torch.arange(0, groups * _GROUP, groups)).flatten(1)
    if V % _GROUP:
        columns = torch.cat([columns, torch.arange(groups * _GROUP, V).expand(R, -1)], 1)
    values, places = z_RV.gather(1, columns).topk(k)
    return values, columns.gather(1, places)


def _order_ties(z_NV: Tensor, values_NK1: Tensor, ids_NK: Tensor) -> None:
    """Put equal logits in order of their ids, and where a tie crosses the boundary choose the smallest ids; in place.

    Args:
        z_NV: logits, −inf at `ids_NK`; rows with boundary ties get their values back.
        values_NK1: the K + 1 largest, descending; −inf where there are fewer.
        ids_NK: ids with the first K of these values, in any order among equal ones.
    """
    equal_NK = (values_NK1[:, 1:] == values_NK1[:, :-1]) & values_NK1[:, 1:].isfinite()
    for row in equal_NK.any(1).nonzero().squeeze(1).tolist():
        values, ids = values_NK1[row, :-1], ids_NK[row]
        if equal_NK[row, -1]:
            bound = values[-1]
            z_NV[row].scatter_(0, ids, values)
            candidates = (z_NV[row] == bound).nonzero().squeeze(1)
            ids[values == bound] = candidates[: int((values == bound).sum())]
        ids, order = ids.sort()
        ids_NK[row] = ids[values[order].sort(descending=True, stable=True).indices]


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
def _powers(temperatures: tuple[float, ...]) -> list[tuple[float, list[tuple[int, list[int | None]]]]]:
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
