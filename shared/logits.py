"""Float32 logits of chosen positions, a few rows at a time, from any causal language model.

Shapes: B rows of a batch, T positions, N chosen positions (flattened), D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import CacheMismatchError, DistillError, require

_BLOCK_ROWS = 8  # rows whose halves are added while they are in a processor's cache


class LogitSource:
    """Float32 logits of chosen positions of a batch, a few rows at a time: no [B, T, V] tensor in float32 exists.

    The backbone's hidden states of these positions go through the head in float32, then through the scale and the soft
    cap that the model applies behind its head. Both are read off one run of the model. A model that does anything else
    there keeps its own logits, in its own dtype; `notice` then says why.

    Args:
        model: a causal language model of transformers; put into evaluation mode.
        chunk_rows: rows of one chunk.

    Raises:
        DistillError: weights that are not there (on `meta`, or a head of zeros), or a model whose logits depend on
            later tokens, so that padding and the targets themselves would enter them.
    """

    def __init__(self, model: Any, chunk_rows: int) -> None:
        self.model, self.chunk_rows = model.eval(), chunk_rows
        self._device = _input_device(model)
        probe = _Probe(model, self._device)
        self.notice = probe.notice
        self.head_width: int = probe.head_width
        self.head_bytes: int | None = None  # memory of the fused head beyond the model's own
        if self.notice is None:
            head = model.get_output_embeddings()
            self._project = Projection(head, chunk_rows, scale=probe.scale, cap=probe.cap)
            self.head_bytes = self._project.num_bytes

    def require_width(self, tokenizer_size: int, where: object) -> None:
        """Refuse a head that is narrower than a cache's tokenizer.

        Raises:
            CacheMismatchError: it is; names `where`.
        """
        require(
            self.head_width >= tokenizer_size,
            "the model's head is narrower than the cache's tokenizer",
            error=CacheMismatchError,
            where=where,
            expected=f"at least {tokenizer_size}",
            got=self.head_width,
        )

    @torch.inference_mode()
    def chunks(self, ids_BT: Tensor, chosen_BT: Tensor) -> Iterator[Tensor]:
        """Yield the logits [n, V] of the positions that `chosen_BT` marks, in row-major order.

        A chunk is valid until the next one is asked for. Padding stands at the right, where no real token sees it under
        a causal mask, so there is no attention mask.
        """
        ids_BT = ids_BT.to(self._device)
        if self.notice is not None:
            logits_NV = self.model(input_ids=ids_BT, use_cache=False).logits
            for part in logits_NV[chosen_BT.to(logits_NV.device)].split(self.chunk_rows):
                yield part.float()
            return
        hidden_BTD = self.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        for part in hidden_BTD[chosen_BT.to(hidden_BTD.device)].split(self.chunk_rows):
            yield self._project(part)


def _input_device(model: Any) -> torch.device:
    """Where ids go: to the embeddings, or where accelerate brings offloaded ones."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    return torch.device(embeddings._hf_hook.execution_device) if device.type == "meta" else device


def _refuse_absent_weights(model: Any) -> None:
    """Refuse tensors on `meta`, which compute nothing, unless one of accelerate's hooks brings them back."""
    brought_back: set[str] = set()
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ()))):
            brought_back.add(name)
        for parameter, tensor in module.named_parameters(recurse=False):
            if tensor.is_meta and name not in brought_back:
                raise DistillError(
                    "a weight of the model is not there",
                    where=f"{type(model).__name__}, {name}.{parameter}".replace(" .", " "),
                    expected="a tensor in memory, or offloaded by accelerate's hooks",
                    got="a tensor on the `meta` device",
                    fix="load the model with from_pretrained, or name another --device-map",
                )


class _Probe:
    """What a model does around its head, found by running it on a few ids.

    A float64 ramp replaces the head's output. Its image tells the scale or the soft cap behind the head to float32
    precision, whatever the model's own. The head's input must equal the backbone's output of the same run bit for bit.

    Attributes:
        notice: why the head cannot be fused; None where it can.
        head_width: logits of a row.
        scale: logits = scale · head output.
        cap: then cap · tanh(logits / cap); None without a soft cap.
    """

    notice: str | None = None
    scale: float = 1.0
    cap: float | None = None

    @torch.inference_mode()
    def __init__(self, model: Any, device: torch.device) -> None:
        _refuse_absent_weights(model)
        ids_BT = torch.arange(2 * 8, device=device).view(2, 8) % model.get_input_embeddings().num_embeddings
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        self.head_width = logits_BTV.shape[-1]
        _refuse_lookahead(model, ids_BT, logits_BTV)
        self.notice = self._look(model, ids_BT, logits_BTV)

    def _look(self, model: Any, ids_BT: Tensor, logits_BTV: Tensor) -> str | None:
        name, head, backbone = type(model).__name__, model.get_output_embeddings(), model.base_model
        if model.config.get_text_config() is not model.config:
            return f"{name} takes more than text"
        if type(head) is not nn.Linear or backbone is model:
            return f"{name} has no backbone with a linear head"
        hidden: list[Tensor] = []
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def replace(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            ramp = torch.linspace(-64, 64, output.numel(), device=output.device, dtype=torch.float64)
            ramp[:3] = torch.tensor([1e-4, -1e5, 1e5])  # where a soft cap is its slope, and its bound
            seen.append((arguments[0], output, ramp.view_as(output)))
            return seen[-1][2]

        handles = [
            head.register_forward_hook(replace),
            backbone.register_forward_hook(lambda module, arguments, output: hidden.append(output.last_hidden_state)),
        ]
        try:
            logits = model(input_ids=ids_BT, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) != 1 or len(hidden) != 1:
            return f"{name} does not call its backbone and its head once"
        head_input, head_output, ramp = seen[0]
        if logits.shape != ramp.shape or not self._read_map(ramp.flatten(), logits.double().flatten()):
            return f"{name} does more behind its head than scale and cap the logits"
        if head_input.shape != hidden[0].shape or not torch.equal(head_input, hidden[0].to(head_input)):
            return f"{name} changes the hidden states before the head"
        again = backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
        if not _same_but_for_noise(again, hidden[0]):
            return f"{name} gives its backbone more than the ids"
        ours = Projection(head, ids_BT.numel())(head_input.flatten(0, 1)).view_as(head_output)
        eps = torch.finfo(head_output.dtype).eps
        rounding = 2 * eps * ours.abs() + max(eps, 1e-6) * ours.square().mean().sqrt()
        if ((ours - head_output.to(ours)).abs() > rounding).any():
            return f"the head of {name} is not the linear map of its weights"
        return None

    def _read_map(self, ramp: Tensor, logits: Tensor) -> bool:
        """Read `scale` and `cap` off the ramp's image; False where they do not explain all of it."""
        scale, bound = float(logits[0] / ramp[0]), float(logits[2])
        if not 0 < scale * bound < math.inf:
            return False
        if abs(scale - 1) < 1e-6:
            scale = 1.0
        self.scale, self.cap = scale, None if abs(bound / (scale * 1e5) - 1) < 1e-5 else bound
        expected = ramp * scale if self.cap is None else self.cap * torch.tanh(ramp * (scale / self.cap))
        return torch.allclose(logits, expected, rtol=1e-6, atol=0)


def _same_but_for_noise(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to what atomics on a GPU change from run to run; `[…, D]`, −inf in the same places."""
    ours, theirs, eps = ours.float(), theirs.float(), torch.finfo(theirs.dtype).eps
    finite = theirs.isfinite()
    distance = torch.where(finite, ours - theirs, 0.0).norm(dim=-1)
    near = distance <= 8 * eps * torch.where(finite, theirs, 0.0).norm(dim=-1)
    return bool(near.all() and torch.equal(ours.isfinite(), finite))


def _refuse_lookahead(model: Any, ids_BT: Tensor, logits_BTV: Tensor) -> None:
    """Refuse a model whose logits at a token depend on what follows it."""
    half = ids_BT.shape[1] // 2
    other_BT = ids_BT.clone()
    other_BT[:, half:] = ids_BT.flip(1)[:, half:]
    logits = model(input_ids=other_BT, use_cache=False).logits
    if not _same_but_for_noise(logits[:, :half], logits_BTV[:, :half]):
        raise DistillError(
            "the model's logits depend on later tokens",
            where=type(model).__name__,
            expected="a causal language model",
            got="other logits once later ids change",
        )


# --- the head -------------------------------------------------------------------------------------------------------


class Projection:
    """The output head: scale · (hidden · Wᵀ + bias), then cap · tanh(logits / cap); in float32.

    Products of two half-precision numbers are exact in float32, and kernels add them up in float32; only the result is
    rounded to half precision. On a GPU the kernel returns float32. A CPU's bfloat16 kernels always round: a second
    product there gives what the rounding took, and both results together hold 16 bits of the sum. Neither way needs a
    float32 copy of the matrix, and both are faster than a product in float32.

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
    """Write x · w as its rounding plus the rounding of what is left; `rounded_NV` is scratch memory."""
    torch.mm(x_ND, w_DV, out=rounded_NV)  # [N, V] bfloat16: the product, rounded
    out_NV.copy_(rounded_NV)
    rounded_NV.addmm_(x_ND, w_DV, beta=-1)  # the product minus that, rounded
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
    require(weight.any(), "all weights of the model's head are zero", error=DistillError, fix="load or fetch it again")
    return weight, bias
