"""Float32 logits of real tokens, a few rows at a time, from any causal language model.

Shapes: B rows of a batch, T positions, N real tokens (flattened), D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import DistillError
from stage1_teacher.projection import Projection


class LogitSource:
    """Float32 logits of the real tokens of a batch, a few rows at a time, so that [B, T, V] float32 never exists.

    Fused: backbone → hidden states of real tokens → head in float32, with the scale and the soft cap that the model
    puts behind its head. What a model does is found by watching it run once. Where it does more than that its own
    logits are taken instead; `notice` then says why.

    Args:
        model: a causal language model of transformers; put into evaluation mode.
        chunk_rows: rows of one chunk.

    Raises:
        DistillError: weights that are not there (on `meta`, or a head of zeros), or a model whose logits depend on
            later tokens, so that padding and the targets themselves would leak into them.
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

    @torch.inference_mode()
    def chunks(self, ids_BT: Tensor, real_BT: Tensor) -> Iterator[Tensor]:
        """Yield logits of the positions marked in `real_BT`, in row-major order; each is valid until the next.

        Padding stands at the right, out of sight of every real token under a causal mask: no attention mask is needed.
        """
        ids_BT = ids_BT.to(self._device)
        if self.notice is not None:
            logits_NV = self.model(input_ids=ids_BT, use_cache=False).logits
            for part in logits_NV[real_BT.to(logits_NV.device)].split(self.chunk_rows):
                yield part.float()
            return
        hidden_BTD = self.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        for part in hidden_BTD[real_BT.to(hidden_BTD.device)].split(self.chunk_rows):
            yield self._project(part)


def _input_device(model: Any) -> torch.device:
    """Where ids go: to the embeddings, or where accelerate brings offloaded ones."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    return torch.device(embeddings._hf_hook.execution_device) if device.type == "meta" else device


def _refuse_absent_weights(model: Any) -> None:
    """Tensors on `meta` compute nothing; only accelerate's hooks bring them back."""
    brought_back: set[str] = set()
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ()))):
            brought_back.add(name)
        for parameter, tensor in module.named_parameters(recurse=False):
            if tensor.is_meta and name not in brought_back:
                raise DistillError(
                    "a weight of the teacher is not there",
                    where=f"{type(model).__name__}, {name}.{parameter}".replace(" .", " "),
                    expected="a tensor in memory, or offloaded by accelerate's hooks",
                    got="a tensor on the `meta` device",
                    fix="load the teacher with from_pretrained, or name another --device-map",
                )


class _Probe:
    """What a model does around its head, found by running it on a few ids.

    The head's output is replaced by a float64 ramp, from which a scale or a soft cap behind the head is read and
    verified to float32 precision, whatever the model's own. Its input must be what the backbone returned in the same
    run, bit for bit.

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
    """A token's logits may not depend on what follows it."""
    half = ids_BT.shape[1] // 2
    other_BT = ids_BT.clone()
    other_BT[:, half:] = ids_BT.flip(1)[:, half:]
    logits = model(input_ids=other_BT, use_cache=False).logits
    if not _same_but_for_noise(logits[:, :half], logits_BTV[:, :half]):
        raise DistillError(
            "the teacher's logits depend on later tokens",
            where=type(model).__name__,
            expected="a causal language model",
            got="other logits once later ids change",
        )
