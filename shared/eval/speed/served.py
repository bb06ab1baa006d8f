"""Decoding as people serve it: keys and values in memory of fixed size, the decode step compiled and replayed."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import StaticLayer

from shared.errors import require
from shared.eval.programs.generate import cache_name, caches_by_token

HOW = "static KV cache; the decode step compiled (torch.compile) and replayed as one CUDA graph; prefill eager"
NOT_ON_CPU = "CUDA graphs are a GPU's: on a processor only eager decoding is timed"


class _Layer(StaticLayer):
    """Keys and values of one layer; all layers share one length on the device, which `Served` moves on."""

    def __init__(self, capacity: int, length: Tensor) -> None:
        super().__init__(max_cache_len=capacity)
        self.cumulative_length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write what is new behind the length; all keys and values [B, G, capacity, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        positions = torch.arange(key_states.shape[-2], device=key_states.device) + self.cumulative_length
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        return keys.index_copy_(2, positions, key_states), values.index_copy_(2, positions, value_states)


class Served:
    """A model that decodes a batch step by step, `width` tokens of each row at a time.

    On a GPU the step is one CUDA graph of compiled kernels; on a processor the same step runs as it is.

    Args:
        model: a transformers model.
        batch_size: B, rows.
        width: W, tokens of a row that a step feeds.
        capacity: positions of each row, those included that `cut` takes back.
        num_ids: only the first ids are ever the most likely; default: all.

    Raises:
        ConfigError: the model caches something else than keys and values by token.
    """

    def __init__(
        self, model: Any, *, batch_size: int, capacity: int, width: int = 1, num_ids: int | None = None
    ) -> None:
        self._model, self._cache_name = model, cache_name(model.forward)
        require(caches_by_token(model), "the model takes no static cache", where=type(model).__name__,
                expected="a cache of attention's keys and values only")  # fmt: skip
        self._num_ids = num_ids
        self._length = torch.zeros((), dtype=torch.int64, device=model.device)
        # Layers of a sliding window are full ones here: the mask has the window.
        self._cache = Cache(layers=[_Layer(capacity, self._length) for _ in DynamicCache(config=model.config).layers])
        self._ids_BW = torch.zeros((batch_size, width), dtype=torch.int64, device=model.device)
        self._next_BW = torch.zeros_like(self._ids_BW)
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.inference_mode():
            self.prefill(self._ids_BW[:, :1])
            if model.device.type == "cuda":
                self._capture()

    def prefill(self, prompt_BT: Tensor) -> Tensor:
        """Begin anew with prompts of one length; the most likely id after each, [B, 1]."""
        self.cut(0)
        return self._most_likely(prompt_BT, logits_to_keep=1)

    def step(self, ids_BW: Tensor) -> Tensor:
        """Feed W ids of each row; the most likely id after each of them, [B, W], overwritten by the next step."""
        self._ids_BW.copy_(ids_BW)
        if self._graph:
            self._graph.replay()
        else:
            self._run()
        return self._next_BW

    def cut(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        self._length.fill_(length)

    def keep(self) -> None:
        """Remember the position, for `rewind`."""
        self._kept = self._length.clone()

    def rewind(self) -> None:
        """Go on from where `keep` was called."""
        self._length.copy_(self._kept)

    def _most_likely(self, ids_BT: Tensor, **options: Any) -> Tensor:
        output = self._model(ids_BT, use_cache=True, **{self._cache_name: self._cache}, **options)
        self._length.add_(ids_BT.shape[1])
        most_likely_BT: Tensor = output.logits[..., : self._num_ids].argmax(-1)
        return most_likely_BT

    def _run(self) -> None:
        self._next_BW.copy_(self._most_likely(self._ids_BW))

    def _capture(self) -> None:
        """Compile the step, run it outside the graph as CUDA wants it, and record it."""
        # Every instance is compiled anew: more of them than torch expects of one function.
        with torch._dynamo.config.patch(recompile_limit=1000):
            step = torch.compile(self._run, fullgraph=True, dynamic=False)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.cut(1)
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                step()
