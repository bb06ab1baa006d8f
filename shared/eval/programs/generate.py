"""Batched generation, greedy or sampled."""

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.masking_utils import create_masks_for_generate

from shared.checkpoints import trial
from shared.errors import ConfigError
from shared.eval.programs.completion import Ending
from shared.tokenizer import Tokenizer, decode, encode_prompt, special_ids

_SEGMENT_TOKENS = 16  # tokens between looks at the text


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Tokens are drawn, not the most likely taken.

    Args:
        temperature: above 0; the logits are divided by it.
        top_p: in (0, 1]; only the fewest most likely ids that hold this much probability are drawn from.
    """

    temperature: float
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt to continue.

    Args:
        ids: the prompt's, BOS included; not empty.
        max_new_tokens: 1 or more, and no more than the model's positions allow.
        end: told the text so far every few tokens, says where it ends, if it does; None: it never does.
        seed: what the sampled tokens follow from, whatever the batch; unused where greedy.
    """

    ids: list[int]
    max_new_tokens: int
    end: Ending | None = None
    seed: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What a model wrote after a prompt.

    Args:
        text: the generated text, not yet cut.
        finish_reason: `eos`, `finished` (the request's end of the text) or `length`.
        num_prompt_tokens: BOS included.
        num_new_tokens: EOS included.
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_new_tokens: int


def eos_ids(model: Any, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a generation: EOS, of tokenizer and model's config, and all special tokens.

    None of them is part of a program: StarCoder2, say, goes on to another file with `<file_sep>`.
    """
    configured = getattr(model.config, "eos_token_id", None)
    ids = set(configured) if isinstance(configured, list | tuple) else {configured}
    ids |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(id for id in ids | {special_ids(tokenizer)["eos"]} if id is not None)


def special_texts(tokenizer: Tokenizer) -> list[str]:
    """The texts of the tokens that end a generation, as a model may also spell them."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(texts | ({tokenizer.eos_token} if tokenizer.eos_token else set()))


def prepare(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str | list[int],
    *,
    max_new_tokens: int,
    end: Ending | None = None,
    where: str = "",
) -> Request:
    """A request for a prompt as `data.templates` renders it, or for its ids; fewer tokens where the model's positions
    run out.

    Raises:
        ConfigError: the prompt is empty, or leaves the model no position to write to; it is named as `where`.
    """
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt
    positions = getattr(model.config, "max_position_embeddings", None)
    limit = max_new_tokens if positions is None else min(max_new_tokens, positions - len(ids))
    if not ids or limit < 1:
        expected = f"1 to {positions - 1} tokens" if positions else "1 token or more"
        raise ConfigError("a prompt the model cannot continue", where=where, expected=expected, got=len(ids))
    return Request(ids=ids, max_new_tokens=limit, end=end)


def caches_by_token(model: Any) -> bool:
    """Whether the cache holds each token of each row by itself, as attention's does.

    Only then can rows leave a batch, and tokens be taken back. A recurrent state (Mamba, linear attention) is of all
    tokens at once, and not every such model leaves padding out of it.
    """
    if getattr(model, "_is_stateful", False):
        return False
    layers = DynamicCache(config=model.config).layers
    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def cache_name(function: Callable[..., Any]) -> str:
    """What a model, or another function of transformers, calls the cache; that depends on model and version."""
    arguments = inspect.signature(function).parameters
    names = ("cache", "past_key_values", "cache_params", "state")
    return next((name for name in names if name in arguments), names[0])


def require_generation(model: Any, tokenizer: Tokenizer, request: Request) -> None:
    """Try a few tokens, before the work of hours begins.

    Raises:
        ConfigError: transformers cannot generate with this model here.
    """
    with trial("transformers cannot generate with this model", type(model).__name__):
        generate_batch(model, tokenizer, [replace(request, max_new_tokens=min(request.max_new_tokens, 3))])


def plan_batches(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """The indices of each batch's requests: sorted by length, longest first, ties in order."""
    order = sorted(range(len(requests)), key=lambda index: (-len(requests[index].ids), index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.inference_mode()
def generate_batch(
    model: Any, tokenizer: Tokenizer, requests: Sequence[Request], sampling: Sampling | None = None
) -> list[Generation]:
    """Continue prompts with the most likely token at every step, or with drawn ones; one generation each, in order.

    Prompts are padded on the left, where attention masks and positions leave the padding out: on a processor, in
    float32, the result does not depend on the batch. A GPU's products may round otherwise for another shape, and a
    token whose logit is all but tied may then be another. Every few tokens, rows that are done leave the batch and the
    KV cache. Nothing of the model directory's own generation config has any effect.

    Args:
        model: a transformers model.
        tokenizer: the model's own.
        requests: one only where the model does not cache by token (see `caches_by_token`).
        sampling: None for greedy.
    """
    width = max(len(request.ids) for request in requests)
    # Padding is masked, so any id serves; 0 exists in every vocabulary.
    padded = [[0] * (width - len(request.ids)) + request.ids for request in requests]
    mask = [[0] * (width - len(request.ids)) + [1] * len(request.ids) for request in requests]
    rows = _Rows(tokenizer, requests, eos_ids(model, tokenizer))
    mask_BT = torch.tensor(mask)
    loop = _Loop(rows, mask_BT, _Drawing(requests, sampling, model.device) if sampling else None)
    cache = DynamicCache(config=model.config) if caches_by_token(model) else None
    assert cache or len(requests) == 1
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(request.max_new_tokens for request in requests),
        pad_token_id=0,
        use_cache=True,
    )
    with _own_config(model, config):
        model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=config,
            custom_generate=loop.run,
            **({cache_name(GenerationMixin.prepare_inputs_for_generation): cache} if cache else {}),
        )
    return [rows.done[row] for row in range(len(requests))]


class _Rows:
    """The new ids of every request, on the host, and which requests still go on."""

    def __init__(self, tokenizer: Tokenizer, requests: Sequence[Request], eos: list[int]) -> None:
        self.tokenizer, self.requests, self.eos = tokenizer, requests, set(eos)
        self.ids: list[list[int]] = [[] for _ in requests]
        self.going_on = list(range(len(requests)))  # which request each row of the batch continues
        self.done: dict[int, Generation] = {}
        self._with_eos: set[int] = set()
        self._steps = self._looked_from = 0

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Add a step's token to each row; which rows of the batch go on. Texts are looked at every few tokens."""
        for row, id in zip(self.going_on, tokens, strict=True):
            self.ids[row].append(id)
            if id in self.eos:
                self._with_eos.add(row)
        self._steps += 1
        is_due = (self._steps - self._looked_from) % _SEGMENT_TOKENS == 0
        is_last = self._steps == min(self.requests[row].max_new_tokens for row in self.going_on)
        if not (is_due or is_last or self._with_eos.issuperset(self.going_on)):
            return list(range(len(tokens)))
        for row in self.going_on:
            if end := self._end(row):
                self.done[row] = end
        keep = [position for position, row in enumerate(self.going_on) if row not in self.done]
        if len(keep) < len(tokens):
            self._looked_from = self._steps
        self.going_on = [self.going_on[position] for position in keep]
        return keep

    def are_padded(self) -> bool:
        """Whether a prompt that goes on is shorter than the longest of all."""
        width = max(len(request.ids) for request in self.requests)
        return any(len(self.requests[row].ids) < width for row in self.going_on)

    def _end(self, row: int) -> Generation | None:
        """A row's generation where it has ended; None where it goes on."""
        request, ids = self.requests[row], self.ids[row]
        ids = ids[: next((at + 1 for at, id in enumerate(ids) if id in self.eos), None)]
        text, reason = decode(self.tokenizer, ids), None
        if ids[-1] in self.eos:
            reason = "eos"
        elif request.end and request.end(text) is not None:
            reason = "finished"
        elif len(ids) == request.max_new_tokens:
            reason = "length"
        sizes = {"num_prompt_tokens": len(request.ids), "num_new_tokens": len(ids)}
        return Generation(text=text, finish_reason=reason, **sizes) if reason else None


class _Loop:
    """The decoding loop, in place of transformers' own: the host waits for the device once a step, for the tokens."""

    def __init__(self, rows: _Rows, mask_BT: Tensor, drawing: "_Drawing | None") -> None:
        self.rows, self.mask_BT, self.drawing = rows, mask_BT, drawing

    def run(self, model: Any, input_ids: Tensor, generation_config: GenerationConfig, **inputs: Any) -> Tensor:
        """Decode until all rows are done; called by `generate`, with `inputs` for the model."""
        del inputs["logits_processor"], inputs["stopping_criteria"]
        output = model._prefill(input_ids, generation_config, inputs)
        # Given masks of two dimensions, models look for padding in them at every step, and wait for the answer.
        if masks_here := model._can_compile_fullgraph and caches_by_token(model):
            inputs["attention_mask"] = None
        while True:
            logits_BV = output.logits[:, -1].float()
            tokens_B = self.drawing.draw(logits_BV) if self.drawing else logits_BV.argmax(-1)
            inputs = model._update_model_kwargs_for_generation(output, inputs)
            del output
            input_ids = torch.cat((input_ids, tokens_B[:, None]), 1)
            keep = self.rows.take(tokens_B.cpu().tolist())
            if not keep:
                return input_ids
            self.mask_BT = torch.nn.functional.pad(self.mask_BT, (0, 1), value=1)
            if len(keep) < len(input_ids):
                input_ids, inputs = self._select(keep, input_ids, inputs)
            step = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **inputs)
            if masks_here:
                step["attention_mask"] = self._step_mask(model, inputs)
            output = model(**step, return_dict=True)

    def _select(self, keep: list[int], input_ids: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Only these rows of everything."""
        index = torch.tensor(keep)
        self.mask_BT = self.mask_BT[index]
        index = index.to(input_ids.device, non_blocking=True)
        if self.drawing:
            self.drawing.uniforms_BT = self.drawing.uniforms_BT[index]
        for name, value in inputs.items():
            if isinstance(value, Cache):
                value.batch_select_indices(index)
            elif isinstance(value, Tensor) and len(value) == len(input_ids):
                inputs[name] = value[index]
        return input_ids[index], inputs

    def _step_mask(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The attention masks of one step, made on the host, as the model would make them; None without padding."""
        if not self.rows.are_padded():
            return None
        make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
        cache = next(value for value in inputs.values() if isinstance(value, Cache))
        # Of the embeddings only batch, length, dtype and device count.
        masks = make(
            config=model.config,
            inputs_embeds=torch.empty((len(self.mask_BT), 1, 0), dtype=model.dtype),
            attention_mask=self.mask_BT,
            **{cache_name(make): cache},
        )
        return tree_map_only(Tensor, lambda mask: mask.to(model.device, non_blocking=True), masks)


class _Drawing:
    """Draws an id for each row.

    Step t of a row inverts the distribution at the t-th number of the row's own generator. Ids stay in their order, so
    that rounding, which depends on the batch, moves an id's share of [0, 1) by no more than itself.
    """

    def __init__(self, requests: Sequence[Request], sampling: Sampling, device: torch.device) -> None:
        self.sampling, self.step = sampling, 0
        steps = max(request.max_new_tokens for request in requests)
        generators = [random.Random(request.seed) for request in requests]  # the same in every version of Python
        uniforms = [[generator.random() for _ in range(steps)] for generator in generators]
        self.uniforms_BT = torch.tensor(uniforms, dtype=torch.float64, device=device)

    def draw(self, logits_BV: Tensor) -> Tensor:
        """The next step's ids [B]."""
        logits_BV = logits_BV.double()
        below_BV = logits_BV - logits_BV.amax(-1, keepdim=True)  # a small temperature must not overflow
        probs_BV = (below_BV / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1:
            sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
            beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= self.sampling.top_p  # what comes before holds enough
            probs_BV = probs_BV.scatter(-1, order_BV, sorted_BV.masked_fill(beyond_BV, 0))
        shares_BV = probs_BV.cumsum(-1)
        total_B1 = shares_BV[:, -1:]
        point_B1 = self.uniforms_BT[:, self.step, None] * total_B1
        self.step += 1
        below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))  # rounding may have reached the total
        return torch.searchsorted(shares_BV, torch.minimum(point_B1, below_B1), right=True)[:, 0]


@contextlib.contextmanager
def _own_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Set `config` as the model's own: `generate` fills what a given config leaves open from the model's."""
    original = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = original
