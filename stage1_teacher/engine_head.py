"""The teacher's head, without its layers, over an engine's hidden states."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import logging

from shared.checkpoints import ModelFiles, load_frozen
from shared.errors import ConfigError, require
from shared.logits import LogitSource
from shared.process import log
from stage1_teacher.capture import device_placement
from stage1_teacher.config import TeacherConfig
from stage1_teacher.engine import HiddenStates

TOLERANCE = 0.02  # of the root mean square that a norm brings rows to


class EngineLogits(LogitSource):
    """Float32 logits of an engine's hidden states.

    Args:
        model: the teacher without layers: embeddings, final norm and head.
        hidden: where the states are.
        chunk_rows: rows of one chunk; None as `LogitSource` chooses.

    Raises:
        ConfigError: the model's head cannot be run on its own.
    """

    def __init__(self, model: nn.Module, hidden: HiddenStates, chunk_rows: int | None) -> None:
        super().__init__(model, chunk_rows)
        what = "this teacher's head cannot be run on hidden states"
        require(self.notice is None, what, where=type(model).__name__, got=self.notice)
        self._hidden, self._norm = hidden, _final_norm(model, self._device)

    @torch.inference_mode()
    def chunks(self, ids_BT: Tensor, chosen_BT: Tensor) -> Iterator[Tensor]:
        """Yield the logits [n, V] of the positions that `chosen_BT` marks, in row-major order.

        Each row's marked tokens are those of one document but its last.
        """
        parts = [self._states(ids_T[chosen_T]) for ids_T, chosen_T in zip(ids_BT, chosen_BT, strict=True)]
        for part in torch.cat(parts).split(self.chunk_rows):
            yield self._project(part)

    def _states(self, ids_N: Tensor) -> Tensor:
        """What goes into the head: the states of tokens [N], behind the final norm."""
        head = self.model.get_output_embeddings().weight
        if not len(ids_N):
            return head.new_empty(0, head.shape[1])
        states_ND = self._hidden.states(ids_N.numpy())
        record, where = self._hidden.record, self._hidden.folder
        if states_ND.shape[1] != head.shape[1]:
            got = states_ND.shape[1]
            raise ConfigError("hidden states of another model", where=where, expected=head.shape[1], got=got)
        states_ND = states_ND.to(head.device)
        if self._norm is None:
            return states_ND
        if record.final_norm != _is_behind(self._norm, states_ND, head.dtype):
            sides = ("before the final norm", "behind the final norm")
            raise ConfigError(
                "hidden states are not taken where engine.json says",
                where=where,
                expected=sides[record.final_norm],
                got=sides[not record.final_norm],
                fix=f'"final_norm": {str(not record.final_norm).lower()} in engine.json',
            )
        if record.final_norm:
            return states_ND
        normed: Tensor = self._norm(states_ND.to(head.dtype))
        return normed


def load_engine_head(config: TeacherConfig, files: ModelFiles, hidden: HiddenStates) -> EngineLogits:
    """Load the teacher without its layers, on this process's devices.

    Raises:
        DistillError: its head cannot be loaded, or not be run on its own.
    """
    reduced = AutoConfig.from_pretrained(str(files.path), trust_remote_code=False)
    reduced.num_hidden_layers = 0
    for name in vars(reduced).keys() & {"layer_types", "mlp_layer_types"}:
        setattr(reduced, name, [])
    vars(reduced).pop("quantization_config", None)  # of layers; heads are stored plain
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a report of all weights that are not used
    try:
        model = load_frozen(files.path, config.dtype, config=reduced, **device_placement(config))
        source = EngineLogits(model, hidden, config.head_rows)
    finally:
        logging.set_verbosity(verbosity)
    log(f"head of {files.name} in {config.dtype} over the hidden states of {hidden.record.label}")
    return source


def _final_norm(model: nn.Module, device: torch.device) -> nn.Module | None:
    """The module that makes the backbone's output out of what the last layer gives; None where there is none."""
    backbone: Any = model.base_model
    last: list[tuple[nn.Module, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda module, _, output: last.append((module, output)))
        for module in backbone.modules()
        if "norm" in type(module).__name__.lower()
    ]
    try:
        output = backbone(input_ids=torch.arange(4, device=device)[None], use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return next((module for module, normed in reversed(last) if torch.equal(normed, output)), None)


def _is_behind(norm: nn.Module, states_ND: Tensor, dtype: torch.dtype) -> bool:
    """Whether rows are a norm's output: without its weight and bias they have a root mean square of 1.

    Both are read off its output for ±v, whose entries are ±1 and so pass the norm as they are.
    """
    v_D = torch.ones(states_ND.shape[1], dtype=dtype, device=states_ND.device)
    v_D[1::2] = -1
    plus_D, minus_D = norm(v_D[None])[0].double(), norm(-v_D[None])[0].double()
    weight_D, bias_D = (plus_D - minus_D) / 2 * v_D, (plus_D + minus_D) / 2
    used_D = weight_D.abs() > 1e-6 * weight_D.abs().max()
    rows_ND = torch.where(used_D, (states_ND.double() - bias_D) / weight_D, 0.0)
    return bool((rows_ND.square().mean(1).sqrt() - 1).abs().median() < TOLERANCE)
