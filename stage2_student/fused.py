"""The output head fused with the loss: gradients are formed in the forward pass, chunk by chunk of positions.

No [N, V] tensor is kept: a chunk's logits turn into their own gradient, which is multiplied into the gradients of the
hidden states and of the head's matrix before the next chunk starts. The backward pass only scales them. Compiled, a
chunk's logits are read twice and its gradient is written once.
"""

from collections.abc import Callable
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
        compiles: make kernels for a chunk's loss with `torch.compile`.

    Attributes:
        scaled: a loss as the backward pass gets it: a loss scaler's `scale`.
    """

    def __init__(self, config: StudentConfig, sampling: Sampling | None = None, *, compiles: bool = False) -> None:
        self.config = config
        self._decoding = Decoding(temperature=config.temperature, sampling=sampling if config.uses_samples else None)
        self._scratch: dict[tuple[int, ...], Tensor] = {}
        self.scaled: Callable[[Tensor], Tensor] = torch.clone
        self.chunk = self._chunk
        if compiles:
            # The option would move reads of the logits behind the write to them, which then needs a copy.
            self.chunk = torch.compile(self._chunk, options={"reorder_for_locality": False})

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
        num_targets = len(targets_N) if num_items_in_batch is None else num_items_in_batch
        at_least_1 = num_targets.clamp(min=1) if isinstance(num_targets, Tensor) else max(num_targets, 1)
        device = hidden_NH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype
        # float16 would lose small gradients: they are rounded as the scaled loss has them.
        factor = self.scaled(torch.as_tensor(1 / at_least_1, device=device)) if dtype == torch.float16 else 1.0
        with_gradients = torch.is_grad_enabled()
        total, kd, ce = _FusedHeadLoss.apply(
            hidden_NH, weight_VH, labels_N, labels, self, dtype, factor, with_gradients
        )
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

    def logits_memory(self, x_CH: Tensor, w_VH: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for a chunk [C, V]; a compiler plans its own."""
        C, V = len(x_CH), len(w_VH)
        if torch.compiler.is_compiling():
            return x_CH.new_empty(C, V, dtype=dtype)
        return self.scratch(chunk_rows(x_CH.device.type), V, dtype=dtype, device=x_CH.device)[:C]

    def _chunk(
        self, x_CH: Tensor, w_VH: Tensor, labels_C: Tensor, soft: SoftLabels | None, factor: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """The loss sums [3] of a chunk and its gradient by the logits times `factor` [C, V], in the dtype of `x_CH`."""
        dtype = torch.promote_types(x_CH.dtype, torch.float32)
        z_CV = g_CV = self.logits_memory(x_CH, w_VH, dtype)
        if dtype != x_CH.dtype:
            g_CV = self.logits_memory(x_CH, w_VH, x_CH.dtype)
        _logits_(x_CH, w_VH, z_CV, g_CV)
        return torch.stack(self.chunk_(z_CV, labels_C, soft, g_CV, factor)), g_CV

    def chunk_(
        self, logits_CV: Tensor, labels_C: Tensor, soft: SoftLabels | None, out_CV: Tensor, factor: Tensor | float
    ) -> ChunkLoss:
        """Loss sums of a chunk; `out_CV`, which may be `logits_CV`, becomes the gradient times `factor`."""
        if soft is None:
            return cross_entropy_(logits_CV, labels_C, self.config.label_smoothing, out_CV=out_CV, factor=factor)
        return distill_(logits_CV, labels_C, soft, self.config, out_CV=out_CV, factor=factor)


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        soft: SoftLabels | None,
        loss: HeadLoss,
        dtype: torch.dtype,
        factor: Tensor | float,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden_NH.device.type
        x_NH, w_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
        gradient_NH = torch.empty_like(hidden_NH)
        gradient_VH = torch.zeros_like(weight_VH, dtype=torch.promote_types(weight_VH.dtype, torch.float32))
        sums = hidden_NH.new_zeros(3, dtype=gradient_VH.dtype)
        rows = chunk_rows(device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(x_NH), rows):
                chunk = slice(start, start + rows)
                x_CH = x_NH[chunk]
                chunk_sums, g_CV = loss.chunk(x_CH, w_VH, labels_N[chunk], soft and soft.rows(chunk), factor)
                sums += chunk_sums
                if not with_gradients:
                    continue
                # dL/dhidden [C, H] and dL/dweight [V, H]
                gradient_NH[chunk] = g_CV @ w_VH
                if g_CV.dtype == gradient_VH.dtype:
                    gradient_VH.addmm_(g_CV.T, x_CH)
                    continue
                product = torch.float32 if device == "cuda" else dtype
                out_VH = loss.scratch(*w_VH.shape, dtype=product, device=w_VH.device)
                options = {"out_dtype": product} if device == "cuda" else {}
                gradient_VH += torch.mm(g_CV.T, x_CH, out=out_VH, **options)
        ctx.save_for_backward(gradient_NH, gradient_VH)
        ctx.weight_dtype, ctx.factor = weight_VH.dtype, factor
        total, kd, ce = sums.unbind()
        ctx.mark_non_differentiable(kd, ce)
        return total, kd, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a copy of the matrix's gradient would be the largest tensor of all. A second backward pass through
        # the same graph fails, as autograd sees that what was saved has changed.
        gradient_NH, gradient_VH = ctx.saved_tensors
        gradient = gradient / ctx.factor
        return gradient_NH.mul_(gradient), gradient_VH.mul_(gradient).to(ctx.weight_dtype), *[None] * 6


def _logits_(x_CH: Tensor, w_VH: Tensor, z_CV: Tensor, g_CV: Tensor) -> None:
    """Write x · Wᵀ to z; a processor's products in half precision are rounded, and pass through `g_CV`."""
    if z_CV.dtype == w_VH.dtype:
        torch.mm(x_CH, w_VH.T, out=z_CV)
    elif z_CV.device.type == "cuda":
        torch.mm(x_CH, w_VH.T, out_dtype=z_CV.dtype, out=z_CV)
    else:
        torch.mm(x_CH, w_VH.T, out=g_CV)
        z_CV.copy_(g_CV)
