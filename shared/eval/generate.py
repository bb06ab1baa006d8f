"""Batched greedy generation."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig

from shared.errors import ConfigError
from shared.runtime import progress
from shared.tokenizer import Tokenizer, decode, encode_prompt, special_ids

_SEGMENT_TOKENS = 16  # tokens between looks at the text


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What a model wrote after a prompt.

    Args:
        text: the generated text, not yet cut.
        finish_reason: `eos`, `finished` (the caller's criterion on the text) or `length`.
        num_prompt_tokens: BOS included.
        num_new_tokens: EOS included.
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_new_tokens: int


def eos_ids(model: Any, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a generation: the tokenizer's EOS and those of the model's config."""
    configured = getattr(model.config, "eos_token_id", None)
    ids = set(configured) if isinstance(configured, list | tuple) else {configured}
    return sorted(id for id in ids | {special_ids(tokenizer)["eos"]} if id is not None)


@torch.inference_mode()
def generate_greedy(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    finished: Callable[[str], bool],
) -> list[Generation]:
    """Continue each prompt with the most likely token at every step.

    Prompts are sorted by length and padded on the left, where attention masks and positions leave the padding out: in
    float32 the result does not depend on the batch size. Nothing of the model directory's own generation config has
    any effect.

    Args:
        model: a transformers model with `generate`.
        tokenizer: the model's own.
        prompts: as `data.templates` renders them.
        max_new_tokens: at most as many tokens are made per prompt, fewer where the model's positions run out.
        batch_size: prompts at a time.
        finished: told the text so far every few tokens, says whether more of it is of no use.

    Returns:
        One generation per prompt, in the order of the prompts.

    Raises:
        ConfigError: a prompt leaves the model no position to write to.
    """
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    positions = getattr(model.config, "max_position_embeddings", None)
    limits = [max_new_tokens if positions is None else min(max_new_tokens, positions - len(row)) for row in ids]
    for index, (row, limit) in enumerate(zip(ids, limits, strict=True)):
        if not row or limit < 1:
            raise ConfigError("a prompt the model cannot continue", where=f"prompt {index}",
                              expected=f"1 to {positions} tokens", got=len(row))  # fmt: skip
    order = sorted(range(len(ids)), key=lambda index: (-len(ids[index]), index))
    eos = eos_ids(model, tokenizer)
    generations: dict[int, Generation] = {}
    with progress("Generating", len(ids), "prompts") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = _generate_batch(model, tokenizer, [ids[i] for i in batch], [limits[i] for i in batch], eos, finished)
            generations |= dict(zip(batch, rows, strict=True))
            bar.advance(len(batch))
    return [generations[index] for index in range(len(ids))]


def _generate_batch(
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    limits: list[int],
    eos: list[int],
    finished: Callable[[str], bool],
) -> list[Generation]:
    """Generate in segments of a few tokens; between two, rows that are done leave the batch and the KV cache."""
    width = max(map(len, prompts))
    # Padding is masked, so any id serves; 0 exists in every vocabulary.
    ids_BT = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    cache = DynamicCache(config=model.config)
    rows = list(range(len(prompts)))  # which prompt each row of the batch continues
    done: dict[int, Generation] = {}
    while rows:
        segment = min(_SEGMENT_TOKENS, min(limits[row] for row in rows) - (ids_BT.shape[1] - width))
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=segment,
            eos_token_id=eos or None,
            pad_token_id=0,
            use_cache=True,
        )
        with _own_config(model, config):
            ids_BT = model.generate(ids_BT, attention_mask=mask_BT, past_key_values=cache, generation_config=config)
        mask_BT = torch.nn.functional.pad(mask_BT, (0, ids_BT.shape[1] - mask_BT.shape[1]), value=1)
        keep = []
        for position, (row, new_ids) in enumerate(zip(rows, ids_BT[:, width:].tolist(), strict=True)):
            new_ids = _until_eos(new_ids[: limits[row]], eos)
            text = decode(tokenizer, new_ids)
            if new_ids[-1] in eos:
                reason = "eos"
            elif finished(text):
                reason = "finished"
            elif len(new_ids) == limits[row]:
                reason = "length"
            else:
                keep.append(position)
                continue
            done[row] = Generation(
                text=text, finish_reason=reason, num_prompt_tokens=len(prompts[row]), num_new_tokens=len(new_ids)
            )
        if keep and len(keep) < len(rows):
            index = torch.tensor(keep, device=model.device)
            ids_BT, mask_BT = ids_BT[index], mask_BT[index]
            cache.batch_select_indices(index)
        rows = [rows[position] for position in keep]
    return [done[row] for row in range(len(prompts))]


def _until_eos(ids: list[int], eos: list[int]) -> list[int]:
    """The ids up to the first EOS, with it."""
    end = next((position + 1 for position, id in enumerate(ids) if id in eos), len(ids))
    return ids[:end]


@contextlib.contextmanager
def _own_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Set `config` as the model's own: `generate` fills what a given config leaves open from the model's."""
    original = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = original
