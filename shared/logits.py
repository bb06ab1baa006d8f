"""Float32 logits of chosen positions, a few rows at a time, from any causal language model.

Shapes: B rows of a batch, T positions, N chosen positions (flattened), D hidden size, V vocabulary, G groups of ids.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import CacheMismatchError, DistillError, require

_BLOCK_ROWS = 8  # rows whose halves are added while they are in a processor's cache
# torch.topk on a CPU puts every column through a heap; maxima of groups of this many columns rule most of them out.
_GROUP = 16


class LogitSource:
    """Float32 logits of chosen positions of a batch, a few rows at a time: no [B, T, V] tensor in float32 exists.

    The backbone's hidden states of these positions go through the head in float32, then through the scale and the soft
    cap that the model applies behind its head. Both are read off one run of the model. A model that does anything else
    there keeps its own logits, in its own dtype; `notice` then says why.

    Args:
        model: a causal language model of transformers; put into evaluation mode.
        chunk_rows: rows of one chunk; by default 192 on a CPU and 2,048 on a GPU.

    Raises:
        DistillError: weights that are not there (on `meta`, or a head of zeros), or a model whose logits depend on
            later tokens, so that padding and the targets themselves would enter them.
    """

    def __init__(self, model: Any, chunk_rows: int | None = None) -> None:
        torch.set_float32_matmul_precision("highest")  # a CUDA device may otherwise multiply in TF32, with 10 bits
        torch.backends.cudnn.allow_tf32 = False
        self.model, self._device = model.eval(), _input_device(model)
        self.chunk_rows = chunk_rows or (192 if self._device.type == "cpu" else 2_048)
        probe = _Probe(model, self._device)
        self.notice = probe.notice
        self.head_width: int = probe.head_width
        self.head_bytes: int | None = None  # memory of the fused head beyond the model's own
        if self.notice is None:
            head = model.get_output_embeddings()
            self._project = Projection(head, self.chunk_rows, scale=probe.scale, cap=probe.cap)
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

        Both arguments are on the CPU. A chunk is valid until the next one is asked for. Padding stands at the right,
        where no real token sees it under a causal mask, so there is no attention mask.
        """
        chosen_N = torch.from_numpy(np.flatnonzero(chosen_BT.numpy()))  # by the host, which waits for nothing
        ids_BT = send(ids_BT, self._device)
        if self.notice is None:
            out_BTX = self.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        else:
            out_BTX = self.model(input_ids=ids_BT, use_cache=False).logits
        out_NX = out_BTX.flatten(0, 1)[send(chosen_N, out_BTX.device)]
        for part in out_NX.split(self.chunk_rows):
            yield part.float() if self.notice else self._project(part)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; the host does not wait for a CUDA device's earlier work."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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


# --- the largest logits ---------------------------------------------------------------------------------------------


def largest(z_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, descending, equal ones by ascending id. A GPU's host waits for nothing.

    Returns:
        values: `[N, k + 1]`, one more than asked for; fewer where V is smaller.
        ids: i64 `[N, k]`, of the first k.
    """
    if z_NV.device.type != "cpu":
        return largest_by_sorting(z_NV, k)
    values, ids = _topk_by_groups(z_NV, min(k + 1, z_NV.shape[1]))
    # `topk` leaves open in which order equal values come, and which of them at the border.
    ties, ids = values[:, 1:] == values[:, :-1], ids[:, :k]
    tied_N = ties.any(1).nonzero()[:, 0]
    border_N = ties[:, k - 1 :].any(1).nonzero()[:, 0]
    if len(border_N):
        ids[border_N] = _first_at_border(z_NV[border_N], values[border_N, :k], ids[border_N])
    if len(tied_N):
        ascending, order = ids[tied_N].sort(1)
        falling = values[tied_N, :k].gather(1, order).sort(dim=1, descending=True, stable=True).indices
        ids[tied_N] = ascending.gather(1, falling)
    return values, ids


def _first_at_border(z_NV: Tensor, values_NK: Tensor, ids_NK: Tensor) -> Tensor:
    """Ids of which those at each row's last value are the smallest that have it."""
    N, V = z_NV.shape
    groups, last_N1 = V // _GROUP, values_NK[:, -1:]
    # Only groups (see `_topk_by_groups`) whose maximum reaches the value are looked into.
    reach = z_NV[:, : groups * _GROUP].view(N, _GROUP, groups).amax(1) >= last_N1
    rows, firsts = reach.nonzero(as_tuple=True)
    columns = firsts[:, None] + torch.arange(_GROUP) * groups
    found = z_NV[rows[:, None], columns] == last_N1[rows]
    keys = (rows[:, None] * V + columns)[found]
    rest, places = (z_NV[:, groups * _GROUP :] == last_N1).nonzero(as_tuple=True)
    keys = torch.cat([keys, rest * V + places + groups * _GROUP]).sort().values
    rows, columns = keys // V, keys % V
    above_N = (values_NK > values_NK[:, -1:]).sum(1)
    places = torch.arange(len(rows)) - torch.searchsorted(rows, torch.arange(len(z_NV)))[rows] + above_N[rows]
    kept = places < values_NK.shape[1]
    ids_NK[rows[kept], places[kept]] = columns[kept]
    return ids_NK


def largest_by_sorting(z_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`largest` by stable sorts of few columns.

    The k + 1 groups of consecutive ids that come first in order of (largest logit, id) hold the k + 1 logits that come
    first in the same order: of a group that is left out, each logit has k + 1 before it.
    """
    N, V = z_NV.shape
    count = min(k + 1, V)
    width = max(math.isqrt(V // count), 1)
    groups = V // width
    ids_V = torch.arange(V, device=z_NV.device)
    maxima_NG = z_NV[:, : groups * width].unflatten(1, (groups, width)).amax(2)
    chosen_NG = maxima_NG.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    columns = (chosen_NG[:, :, None] * width + ids_V[:width]).flatten(1)
    columns = torch.cat([columns, ids_V[groups * width :].expand(N, -1)], 1)
    values, places = z_NV.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values[:, :count], columns.gather(1, places[:, :k])


def _topk_by_groups(z_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk on a CPU: values and ids `[N, k]`; among equal values at the boundary any may be chosen.

    The k groups of columns with the largest maxima come first: they hold every value above the k-th largest maximum,
    and at least k values that reach it.
    """
    N, V = z_NV.shape
    groups = V // _GROUP
    if groups < 4 * k:
        return z_NV.topk(k)
    # Group j holds the columns j, j + groups, …: its maximum is taken across contiguous stretches.
    maxima = z_NV[:, : groups * _GROUP].view(N, _GROUP, groups).amax(1)
    columns = (maxima.topk(k, sorted=False).indices[:, :, None] + torch.arange(0, groups * _GROUP, groups)).flatten(1)
    if V % _GROUP:
        columns = torch.cat([columns, torch.arange(groups * _GROUP, V).expand(N, -1)], 1)
    values, places = z_NV.gather(1, columns).topk(k)
    return values, columns.gather(1, places)


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
