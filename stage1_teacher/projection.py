"""The output head over chunks of hidden states: float32 logits out of half-precision weights.

Shapes: N rows of a chunk, D hidden size, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import DistillError

_BLOCK_ROWS = 8  # rows whose halves are added while they are in a processor's cache


class Projection:
    """Logits = scale · (hidden · Wᵀ + bias), then cap · tanh(logits / cap); in float32.

    Products of two half-precision numbers are exact in float32, and kernels add them up in float32; it is the result
    that they round. On a GPU it is asked for in float32. A processor's bfloat16 kernels always round: there a second
    product gives what the rounding took, and both results together hold 16 bits of the sum. Neither way needs a float32
    copy of the matrix, and each is faster than a product in float32.

    Args:
        head: the linear layer; brought back for good where accelerate has offloaded it.
        chunk_rows: most rows of a call.
        scale: of the logits.
        cap: soft cap of the scaled logits; None without one.

    Raises:
        DistillError: all weights are 0, as where a file was not read.
    """

    def __init__(self, head: nn.Linear, chunk_rows: int, *, scale: float = 1.0, cap: float | None = None) -> None:
        weight, self._bias = _parameters(head)
        self._scale, self._cap = scale, cap
        self._rounded: Tensor | None = None
        on_cpu, half = weight.device.type == "cpu", weight.dtype in (torch.bfloat16, torch.float16)
        if on_cpu and weight.dtype == torch.bfloat16 and _remainders_are_exact(weight):
            self._rounded = weight.new_empty(chunk_rows, len(weight))
        elif on_cpu or not half:
            weight = weight.float()
        self._weight = weight
        # Fresh pages cost as much as the sums: the buffers stay.
        self._out = weight.new_empty(chunk_rows, len(weight), dtype=torch.float32)
        buffers = [self._out, *([] if self._rounded is None else [self._rounded])]
        buffers += [] if weight.dtype == head.weight.dtype else [weight]
        #: Memory beyond the model's own, in bytes.
        self.num_bytes: int = sum(buffer.nbytes for buffer in buffers)

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] of up to `chunk_rows` rows, float32; valid until the next call."""
        x_ND, w_DV = hidden_ND.to(self._weight.device, self._weight.dtype), self._weight.T
        out = self._out[: len(x_ND)]
        if self._rounded is not None:
            _two_products(x_ND, w_DV, self._rounded[: len(x_ND)], out)
        elif w_DV.dtype == torch.float32:
            torch.mm(x_ND, w_DV, out=out)
        else:
            torch.mm(x_ND, w_DV, out_dtype=torch.float32, out=out)
        if self._bias is not None:
            out.add_(self._bias)
        if self._scale != 1.0:
            out.mul_(self._scale)
        return out if self._cap is None else out.div_(self._cap).tanh_().mul_(self._cap)


def _two_products(x_ND: Tensor, w_DV: Tensor, rounded_NV: Tensor, out_NV: Tensor) -> None:
    """Write x · w as its rounding and the rounding of what is left; `rounded_NV` is scratch memory."""
    torch.mm(x_ND, w_DV, out=rounded_NV)
    out_NV.copy_(rounded_NV)
    rounded_NV.addmm_(x_ND, w_DV, beta=-1)
    for out, rest in zip(out_NV.split(_BLOCK_ROWS), rounded_NV.split(_BLOCK_ROWS), strict=True):
        out.add_(rest.float())  # a sum of two dtypes is many times slower


def _remainders_are_exact(weight_VD: Tensor) -> bool:
    """Whether this machine's kernels subtract before they round, tried on a part of the matrix."""
    w = weight_VD[:1024]
    x = w[:16]
    out = x.new_empty(len(x), len(w), dtype=torch.float32)
    _two_products(x, w.T, out.to(x.dtype), out)
    exact = x.double() @ w.double().T
    return bool(((out - exact).abs() <= exact.abs() * 2**-15 + 2**-18 * exact.abs().max()).all())


def _parameters(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    context: Any = nullcontext()
    if head.weight.is_meta:
        from accelerate.utils import align_module_device

        context = align_module_device(head)
    with context:
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach().float()
    if not weight.any():
        raise DistillError("all weights of the teacher's head are zero", fix="load or fetch it anew")
    return weight, bias
