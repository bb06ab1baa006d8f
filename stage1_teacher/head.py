"""The LM head and what is kept of its rows: top-k, tails, gold, entropy, in one pass over a chunk of float32 logits.

Shapes: B rows of a batch, T positions, N real tokens (flattened), D hidden size, V vocabulary, K targets, G grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# CPU: 8 rows of a 49,152-word vocabulary stay in the second-level cache through all passes of the tail.
_CPU_TAIL_ROWS = 8
# Below this distance from the tail's maximum exp() is exactly 0 in float32 at every allowed temperature. Being finite
# (unlike −inf) it makes 0 · distance a 0.
_FLOOR = -1e4


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRows:
    """What the cache keeps of N rows of logits, normalised over the tokenizer's ids."""

    k: Tensor  # i64 [N] entries that are not −inf
    ids: Tensor  # i64 [N, K] descending logit, ties by ascending id
    margins: Tensor  # f32 [N, K] z_1 − z_i; +inf beyond k
    tail_log: Tensor  # f64 [N, G] log Σ_{j∉K} exp((z_j − z_1)/T); −inf without a tail
    gold_logprob: Tensor  # f32 [N] nats at T=1
    gold_in_topk: Tensor  # bool [N]
    entropy_nats: Tensor  # f32 [N] at T=1
    excess_mass: Tensor  # f32 [N] probability at T=1 of ids beyond the tokenizer, before they were masked
    top_logit: Tensor  # f32 [N] NaN or infinite where the row cannot be used


@torch.inference_mode()
def label_rows(
    logits_NV: Tensor, gold_N: Tensor, *, top_k: int, temperatures: Sequence[float], tokenizer_size: int
) -> LabelRows:
    """Reduce rows of logits to what the cache keeps.

    Args:
        logits_NV: float32; overwritten.
        gold_N: i64, the token that really follows.
        top_k: entries to keep, fewer where the vocabulary or the finite logits are fewer.
        temperatures: the grid of tail masses; holds 1.
        tokenizer_size: ids from here on are masked before anything is normalised.

    Returns:
        Tensors on the logits' device. A row with NaN or +inf, or of −inf alone, has a `top_logit` that is not finite
        and is meaningless otherwise.
    """
    z_NV, excess_NX = logits_NV[:, :tokenizer_size], logits_NV[:, tokenizer_size:]
    gold_logit = z_NV.gather(1, gold_N[:, None]).squeeze(1)
    values_NK, ids_NK, tail_max = _topk_by_id(z_NV, top_k)
    top = values_NK[:, 0].clone()
    kept = values_NK > -torch.inf
    margins = top[:, None] - values_NK

    z_NV.scatter_(1, ids_NK, -torch.inf)
    shift = torch.where(tail_max.isfinite(), tail_max, 0.0)
    sums_NG, weighted_N = _tail_sums(z_NV, shift, temperatures)
    gap_N = (shift - top).double()
    tail_log = sums_NG.double().log() + gap_N[:, None] / torch.tensor(temperatures, device=gap_N.device).double()

    # T = 1, in float64, relative to z_1: log Z, then H = log Z + Σ p · (z_1 − z).
    head_N = torch.exp(-margins.double())
    tail_one = sums_NG[:, list(temperatures).index(1.0)].double()
    log_z = torch.log(head_N.sum(1) + tail_one * gap_N.exp())
    head_gap = torch.where(kept, head_N * margins, 0.0).sum(1)
    tail_gap = gap_N.exp() * (-gap_N * tail_one - weighted_N.double())
    entropy = log_z + (head_gap + tail_gap) * torch.exp(-log_z)

    excess = torch.zeros_like(top)
    if excess_NX.shape[1]:
        excess = torch.sigmoid(excess_NX.logsumexp(1) - top - log_z.float())
    return LabelRows(
        k=kept.sum(1),
        ids=ids_NK,
        margins=margins,
        tail_log=tail_log,
        gold_logprob=(gold_logit - top).double().sub(log_z).float(),
        gold_in_topk=((ids_NK == gold_N[:, None]) & kept).any(1),
        entropy_nats=entropy.float(),
        excess_mass=excess,
        top_logit=top,
    )


def _topk_by_id(z_NV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K largest logits, ties by ascending id also at the boundary, and the largest logit left over (−inf if none).

    torch.topk leaves the order of equal values open. One value more than asked tells whether a tie crosses the
    boundary, and is the tail's own maximum.
    """
    K = min(top_k, z_NV.shape[1])
    values, ids = z_NV.topk(min(top_k + 1, z_NV.shape[1]))
    left = values[:, K].clone() if values.shape[1] > K else values.new_full((len(values),), -torch.inf)
    values, ids = values[:, :K], ids[:, :K]
    tied = ((values[:, -1] == left) & left.isfinite()).nonzero().squeeze(1)
    for rows in tied.split(_CPU_TAIL_ROWS if z_NV.device.type == "cpu" else max(len(tied), 1)):
        z, bound = z_NV[rows], left[rows, None]
        above, equal = z > bound, z == bound
        room = K - above.sum(1, keepdim=True)
        chosen = (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, K)
        ids[rows], values[rows] = chosen, z.gather(1, chosen)
    ids, order = ids.sort(1)
    values, order_by_value = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order_by_value), left


def _tail_sums(z_NV: Tensor, shift_N: Tensor, temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Σ exp((z − shift)/T) for the grid `[N, G]`, and Σ exp(z − shift) · (z − shift) `[N]`.

    Halving a temperature squares the exponential, so a chain such as 2, 1, ½ costs one exp().
    """
    sums = z_NV.new_empty(len(z_NV), len(temperatures))
    weighted = z_NV.new_empty(len(z_NV))
    rows = _CPU_TAIL_ROWS if z_NV.device.type == "cpu" else len(z_NV)
    for start in range(0, len(z_NV), rows):
        part = slice(start, start + rows)
        distance = (z_NV[part] - shift_N[part, None]).clamp_(min=_FLOOR)
        for first in (t for t in temperatures if 2 * t not in temperatures):
            u, t = (distance / first).exp_(), first
            while t in temperatures:
                sums[part, temperatures.index(t)] = u.sum(1)
                if t == 1.0:
                    weighted[part] = torch.linalg.vecdot(u, distance)
                u, t = u.square_(), t / 2
    return sums, weighted


class LogitSource:
    """Float32 logits of the real tokens of a batch, a few rows at a time, so that [B, T, V] float32 never exists.

    Fused: backbone → hidden states of real tokens → head in float32. Where the model does more around its head than
    a linear map (scaling, soft caps, offloading), its own logits are taken instead; `notice` then says why.
    """

    def __init__(self, model: Any, chunk_rows: int) -> None:
        self.model, self.chunk_rows = model, chunk_rows
        self.notice = _why_not_fused(model)
        self.head_width: int = model.get_output_embeddings().weight.shape[0] if self.notice is None else 0
        if self.notice is None:
            head = model.get_output_embeddings()
            self._weight = head.weight.float()
            self._bias = None if head.bias is None else head.bias.float()
            self._buffer = self._weight.new_empty(chunk_rows, self.head_width)  # fresh pages cost as much as the matmul
        else:
            self.head_width = model.config.get_text_config().vocab_size

    @torch.inference_mode()
    def chunks(self, ids_BT: Tensor, real_BT: Tensor) -> Iterator[Tensor]:
        """Yield logits of the positions marked in `real_BT`, in row-major order; each is valid until the next.

        Padding stands at the right, out of sight of every real token under a causal mask: no attention mask is needed.
        """
        if self.notice is not None:
            logits_NV = self.model(input_ids=ids_BT, use_cache=False).logits
            for part in logits_NV[real_BT.to(logits_NV.device)].split(self.chunk_rows):
                yield part.float()
            return
        hidden_BTD = self.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        for part in hidden_BTD[real_BT.to(hidden_BTD.device)].split(self.chunk_rows):
            yield self._project(part)

    def _project(self, hidden_ND: Tensor) -> Tensor:
        hidden_ND = hidden_ND.to(self._weight.device, torch.float32)
        out = self._buffer[: len(hidden_ND)]
        if self._bias is None:
            return torch.mm(hidden_ND, self._weight.T, out=out)
        return torch.addmm(self._bias, hidden_ND, self._weight.T, out=out)


@torch.inference_mode()
def _why_not_fused(model: Any) -> str | None:
    """Run the model once on a few ids and look at its head's input and output; None where the head is a plain map.

    The head's output is replaced by a ramp over ±64, so that a soft cap shows that a small random logit would not.
    """
    head, backbone = model.get_output_embeddings(), model.base_model
    if type(head) is not nn.Linear or backbone is model:
        return f"{type(model).__name__} has no backbone with a linear head"
    if head.weight.is_meta:
        return f"the head of {type(model).__name__} is offloaded"
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def replace(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ramp = torch.linspace(-64, 64, output.numel(), device=output.device, dtype=output.dtype).view_as(output)
        seen.append((arguments[0], output, ramp))
        return ramp

    ids_BT = torch.arange(8, device=model.get_input_embeddings().weight.device)[None] % head.weight.shape[0]
    handle = head.register_forward_hook(replace)
    try:
        logits = model(input_ids=ids_BT, use_cache=False).logits
    finally:
        handle.remove()
    if len(seen) != 1:
        return f"{type(model).__name__} does not call its head once"
    (head_input, head_output, ramp) = seen[0]
    if not torch.equal(logits.float(), ramp.float()):
        return f"{type(model).__name__} scales or caps its logits after the head"
    hidden = backbone(input_ids=ids_BT, use_cache=False).last_hidden_state.to(head_input.device)
    if not torch.equal(hidden, head_input):
        return f"{type(model).__name__} changes the hidden states before the head"
    ours = nn.functional.linear(
        head_input.float(), head.weight.float(), None if head.bias is None else head.bias.float()
    )
    tolerance = 4 * torch.finfo(head_output.dtype).eps * ours.abs().max()
    if not torch.allclose(ours, head_output.float(), rtol=0, atol=max(float(tolerance), 1e-5)):
        return f"the head of {type(model).__name__} is not the linear map of its weights"
    return None
