"""Batched generation, greedy or sampled."""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import LinearAttentionCacheLayerMixin

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

    Prompts are padded on the left, where attention masks and positions leave the padding out: in float32 the result
    does not depend on the batch. Every few tokens, rows that are done leave the batch and the KV cache. Nothing of the
    model directory's own generation config has any effect.

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
    ids_BT = torch.tensor(padded, device=model.device)
    mask_BT = torch.tensor(mask, device=model.device)
    drawing = _Drawing(requests, sampling, width, model.device) if sampling else None
    eos = eos_ids(model, tokenizer)
    cache = DynamicCache(config=model.config) if caches_by_token(model) else None
    assert cache or len(requests) == 1
    rows = list(range(len(requests)))  # which request each row of the batch continues
    done: dict[int, Generation] = {}
    while rows:
        made = ids_BT.shape[1] - width
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=min(requests[row].max_new_tokens for row in rows) - made,
            eos_token_id=eos or None,
            pad_token_id=0,
            use_cache=True,
        )
        ends = functools.partial(_ends, tokenizer, [requests[row] for row in rows], width, eos)
        with _own_config(model, config):
            ids_BT = model.generate(
                ids_BT,
                attention_mask=mask_BT,
                generation_config=config,
                logits_processor=LogitsProcessorList([drawing] if drawing else []),
                stopping_criteria=StoppingCriteriaList([_SomeRowEnds(ends, ids_BT.shape[1])]),
                **({"past_key_values": cache} if cache else {}),
            )
        mask_BT = torch.nn.functional.pad(mask_BT, (0, ids_BT.shape[1] - mask_BT.shape[1]), value=1)
        keep = []
        for position, (row, end) in enumerate(zip(rows, ends(ids_BT), strict=True)):
            if end is None:
                keep.append(position)
            else:
                done[row] = end
        if keep and len(keep) < len(rows):
            index = torch.tensor(keep, device=model.device)
            ids_BT, mask_BT = ids_BT[index], mask_BT[index]
            assert cache
            cache.batch_select_indices(index)
            if drawing:
                drawing.uniforms_BT = drawing.uniforms_BT[index]
        rows = [rows[position] for position in keep]
    return [done[row] for row in range(len(requests))]


def _ends(
    tokenizer: Tokenizer, requests: Sequence[Request], width: int, eos: list[int], ids_BT: Tensor
) -> list[Generation | None]:
    """Each row's generation, from column `width` on, where it has ended; None where it goes on."""
    ended: list[Generation | None] = []
    for request, new_ids in zip(requests, ids_BT[:, width:].tolist(), strict=True):
        new_ids = new_ids[: request.max_new_tokens]
        new_ids = new_ids[: next((at + 1 for at, id in enumerate(new_ids) if id in eos), None)]
        text, reason = decode(tokenizer, new_ids), None
        if new_ids[-1] in eos:
            reason = "eos"
        elif request.end and request.end(text) is not None:
            reason = "finished"
        elif len(new_ids) == request.max_new_tokens:
            reason = "length"
        sizes = {"num_prompt_tokens": len(request.ids), "num_new_tokens": len(new_ids)}
        ended.append(Generation(text=text, finish_reason=reason, **sizes) if reason else None)
    return ended


class _SomeRowEnds(StoppingCriteria):
    """Stops the whole batch where some row has ended, looking every few tokens."""

    def __init__(self, ends: Callable[[Tensor], Sequence[object]], start: int) -> None:
        self.ends, self.start = ends, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """The same for every row, [B]."""
        is_due = (input_ids.shape[1] - self.start) % _SEGMENT_TOKENS == 0
        stops = is_due and any(end is not None for end in self.ends(input_ids))
        return torch.full((len(input_ids),), stops, dtype=torch.bool, device=input_ids.device)


class _Drawing(LogitsProcessor):
    """Leaves one id per row: the one drawn, so that the most likely is that one.

    Step t of a row inverts the distribution at the t-th number of the row's own generator. Ids stay in their order, so
    that rounding, which depends on the batch, moves an id's share of [0, 1) by no more than itself.
    """

    def __init__(self, requests: Sequence[Request], sampling: Sampling, width: int, device: torch.device) -> None:
        self.sampling, self.width = sampling, width
        steps = max(request.max_new_tokens for request in requests)
        generators = [random.Random(request.seed) for request in requests]  # the same in every version of Python
        uniforms = [[generator.random() for _ in range(steps)] for generator in generators]
        self.uniforms_BT = torch.tensor(uniforms, dtype=torch.float64, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Minus infinity for all ids but the drawn ones."""
        below_BV = scores.double() - scores.double().amax(-1, keepdim=True)  # a small temperature must not overflow
        probs_BV = (below_BV / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1:
            sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
            beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= self.sampling.top_p  # what comes before holds enough
            probs_BV = probs_BV.scatter(-1, order_BV, sorted_BV.masked_fill(beyond_BV, 0))
        shares_BV = probs_BV.cumsum(-1)
        total_B1 = shares_BV[:, -1:]
        point_B1 = self.uniforms_BT[:, input_ids.shape[1] - self.width, None] * total_B1
        below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))  # rounding may have reached the total
        drawn_B1 = torch.searchsorted(shares_BV, torch.minimum(point_B1, below_B1), right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn_B1, 0.0)


@contextlib.contextmanager
def _own_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Set `config` as the model's own: `generate` fills what a given config leaves open from the model's."""
    original = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = original
