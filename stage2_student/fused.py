"""The output head fused with the loss: gradients are formed in the forward pass, chunk by chunk of positions.

No [N, V] tensor is kept: a chunk's logits turn into their own gradient in place, which is multiplied into the
gradients of the hidden states and of the head's matrix before the next chunk starts. The backward pass only scales
them.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.cache.format import Sampling
from shared.model.gpt import IGNORE
from stage2_student.config import StudentConfig
from stage2_student.losses import ChunkLoss, SoftLabels, cross_entropy_, distill_
from stage2_student.soft_labels import Decoding, NarrowRows, decode


def chunk_rows(device: str) -> int:
    """Rows whose logits are formed at a time: few stay in a processor's caches; a GPU needs many to fill its cores."""
    return 256 if device == "cpu" else 2048


class HeadLoss:
    """The training loss of one run, called by `GPT.forward` with the final hidden states.

    Args:
        config: what `distill_` reads of it, and `k`.
        sampling: how the samples of the labels were drawn, for losses that need them.
    """

    def __init__(self, config: StudentConfig, sampling: Sampling | None = None) -> None:
        self.config = config
        self._decoding = Decoding(temperature=config.temperature, sampling=sampling if config.uses_samples else None)
        self._scratch: dict[tuple[int, ...], Tensor] = {}

    def __call__(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        *,
        targets: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **soft: Tensor,
    ) -> dict[str, Tensor]:
        """Return the loss of a batch.

        Args:
            hidden_NH: final hidden states.
            weight_VH: the head's matrix.
            labels_N: int64 target ids, `IGNORE` where there is none.
            targets: int64, where the labels are no `IGNORE`; default: found on the device, which the host then waits
                for.
            num_items_in_batch: what the sum is divided by; by default the number of targets here.
            soft: fields of `NarrowRows` [B, T, …] as `soft_<name>`; where alpha is 0 they may be absent, and `kd` is 0.

        Returns:
            `loss`, and the detached sums `kd` and `ce` over the batch, in nats; KD without its factor T². Without
            gradients to form (in evaluation) only the loss is computed.
        """
        # Prompts and padding need no logits.
        targets_N = (labels_N != IGNORE).nonzero().squeeze(1) if targets is None else targets
        hidden_NH, labels_N, labels = hidden_NH[targets_N], labels_N[targets_N], self.labels(soft, targets_N)
        total, kd, ce = _FusedHeadLoss.apply(hidden_NH, weight_VH, labels_N, labels, self, torch.is_grad_enabled())
        num_targets = len(targets_N) if num_items_in_batch is None else num_items_in_batch
        at_least_1 = num_targets.clamp(min=1) if isinstance(num_targets, Tensor) else max(num_targets, 1)
        return {"loss": total / at_least_1, "kd": kd, "ce": ce}

    def labels(self, soft: dict[str, Tensor], chosen_N: Tensor) -> SoftLabels | None:
        """The teacher's rows at some positions of a batch; None where there are none and none are needed."""
        if not soft and self.config.alpha == 0:
            return None
        per_block = {"soft_codebook"}
        fields = {name: field if name in per_block else field.flatten(0, 1) for name, field in soft.items()}
        rows = NarrowRows(**{name.removeprefix("soft_"): field for name, field in fields.items()})
        labels = decode(rows, chosen_N, self._decoding)
        return labels.first(self.config.k) if self.config.k else labels

    def combine(self, kd: float, ce: float) -> float:
        """The loss of both terms."""
        return self.config.alpha * self.config.temperature**2 * kd + (1 - self.config.alpha) * ce

    def scratch(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory kept from step to step: fresh pages cost a processor as much as the arithmetic."""
        key = (*shape, dtype.itemsize)
        if key not in self._scratch or (self._scratch[key].dtype, self._scratch[key].device) != (dtype, device):
            self._scratch[key] = torch.empty(shape, dtype=dtype, device=device)
        return self._scratch[key]

    def chunk_(self, logits_CV: Tensor, labels_C: Tensor, soft: SoftLabels | None) -> ChunkLoss:
        """Loss sums of a chunk; `logits_CV` becomes the gradient."""
        if soft is None:
            return cross_entropy_(logits_CV, labels_C, self.config.label_smoothing)
        return distill_(logits_CV, labels_C, soft, self.config)


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        soft: SoftLabels | None,
        loss: HeadLoss,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden_NH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype
        x_NH, w_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
        gradient_NH = torch.empty_like(hidden_NH)
        gradient_VH = torch.zeros_like(weight_VH, dtype=torch.promote_types(weight_VH.dtype, torch.float32))
        sums = hidden_NH.new_zeros(3, dtype=gradient_VH.dtype)
        V, H = w_VH.shape
        scratch = functools.partial(loss.scratch, device=w_VH.device)
        rows = chunk_rows(device)
        z_full = scratch(rows, V, dtype=gradient_VH.dtype)
        g_full = z_full if dtype == z_full.dtype else scratch(rows, V, dtype=dtype)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(x_NH), rows):
                chunk = slice(start, start + rows)
                x_CH = x_NH[chunk]
                z_CV, g_CV = z_full[: len(x_CH)], g_full[: len(x_CH)]
                # logits [C, V] in float32
                _logits_(x_CH, w_VH, z_CV, g_CV)
                # loss; z becomes dL/dz [C, V]
                sums += torch.stack(loss.chunk_(z_CV, labels_N[chunk], soft and soft.rows(chunk)))
                if not with_gradients:
                    continue
                # dL/dhidden [C, H] and dL/dweight [V, H]
                if g_full is not z_full:
                    g_CV.copy_(z_CV)
                gradient_NH[chunk] = g_CV @ w_VH
                if g_full is z_full:
                    gradient_VH.addmm_(g_CV.T, x_CH)
                elif device == "cuda":
                    out = scratch(V, H, dtype=gradient_VH.dtype)
                    gradient_VH += torch.mm(g_CV.T, x_CH, out_dtype=out.dtype, out=out)
                else:
                    gradient_VH += torch.mm(g_CV.T, x_CH, out=scratch(V, H, dtype=dtype))
        ctx.save_for_backward(gradient_NH, gradient_VH)
        ctx.weight_dtype = weight_VH.dtype
        total, kd, ce = sums.unbind()
        ctx.mark_non_differentiable(kd, ce)
        return total, kd, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a copy of the matrix's gradient would be the largest tensor of all. A second backward pass through
        # the same graph fails, as autograd sees that what was saved has changed.
        gradient_NH, gradient_VH = ctx.saved_tensors
        return gradient_NH.mul_(gradient), gradient_VH.mul_(gradient).to(ctx.weight_dtype), None, None, None, None


def _logits_(x_CH: Tensor, w_VH: Tensor, z_CV: Tensor, g_CV: Tensor) -> None:
    """Write x · Wᵀ to z; a processor's products in half precision are rounded, and pass through `g_CV`."""
    if z_CV.dtype == w_VH.dtype:
        torch.mm(x_CH, w_VH.T, out=z_CV)
    elif z_CV.device.type == "cuda":
        torch.mm(x_CH, w_VH.T, out_dtype=z_CV.dtype, out=z_CV)
    else:
        torch.mm(x_CH, w_VH.T, out=g_CV)
        z_CV.copy_(g_CV)
