"""How fast models are: prefill and decode apart, all models in one process, their repeats interleaved."""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shared.errors import ConfigError
from shared.eval.models import dtype_name, hub_commit, load_model, num_parameters, weight_bytes
from shared.runtime import machine, progress, versions


def measure_latency(
    model_dirs: Mapping[str, Path], *, prompt_tokens: int, new_tokens: int, repeats: int, dtype: str
) -> dict[str, Any]:
    """Time prefill and decoding of every model at batch 1.

    The prompt is random ids, the same positions for every model, and nothing ends a generation early, so exactly
    `new_tokens` decode steps are made and timed. Each repeat goes through all models in turn, so that what else the
    machine does meanwhile falls on all alike; one round before is warm-up.

    Args:
        model_dirs: name → transformers directory.
        prompt_tokens: length of the prompt.
        new_tokens: decode steps after it.
        repeats: timed rounds.
        dtype: a key of `models.DTYPES`.

    Returns:
        `models`: per name `commit` (of a Hub id), `parameters`, `bytes`, `dtype`, `prefill_ms`,
        `decode_tokens_per_second` (medians) and `…_range` (least and greatest); `settings`, `machine`, `versions`.

    Raises:
        ConfigError: the tokens asked for exceed a model's positions.
    """
    start = time.monotonic()
    models = {name: load_model(directory, dtype)[0] for name, directory in model_dirs.items()}
    for name, model in models.items():
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and prompt_tokens + new_tokens > positions:
            raise ConfigError("more tokens than the model has positions", where=name, expected=f"<= {positions}",
                              got=prompt_tokens + new_tokens)  # fmt: skip
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with progress("Timing", (repeats + 1) * len(models), "runs") as bar:
        for repeat in range(repeats + 1):
            for name, model in models.items():
                timed = time_once(model, prompt_tokens, new_tokens)
                if repeat > 0:
                    times[name].append(timed)
                bar.advance(1)
    results = {}
    for name, model in models.items():
        prefill_ms = [1000 * prefill for prefill, _ in times[name]]
        tokens_per_second = [new_tokens / decode for _, decode in times[name]]
        results[name] = {
            "commit": hub_commit(model_dirs[name]),
            "parameters": num_parameters(model),
            "bytes": weight_bytes(model_dirs[name]),
            "dtype": dtype_name(model),
            "prefill_ms": statistics.median(prefill_ms),
            "prefill_ms_range": [min(prefill_ms), max(prefill_ms)],
            "decode_tokens_per_second": statistics.median(tokens_per_second),
            "decode_tokens_per_second_range": [min(tokens_per_second), max(tokens_per_second)],
        }
    return {
        "models": results,
        "settings": {
            "batch_size": 1,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "warmup_rounds": 1,
            "threads": torch.get_num_threads(),
            "device": next(iter(models.values())).device.type,
        },
        "seconds": round(time.monotonic() - start, 3),
        "machine": machine(),
        "versions": versions("torch", "transformers", "codedistill"),
    }


@torch.inference_mode()
def time_once(model: Any, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill (prompt to first token) and of `new_tokens` greedy decode steps after it."""
    generator = torch.Generator().manual_seed(0)
    prompt_BT = torch.randint(model.config.vocab_size, (1, prompt_tokens), generator=generator).to(model.device)
    start = now(model)
    output = model(prompt_BT, use_cache=True, logits_to_keep=1)
    token_BT = output.logits[:, -1:].argmax(-1)
    prefilled = now(model)
    for _ in range(new_tokens):
        output = model(token_BT, past_key_values=output.past_key_values, use_cache=True)
        token_BT = output.logits[:, -1:].argmax(-1)
    return prefilled - start, now(model) - prefilled


def now(model: Any) -> float:
    """The time once the device has done everything asked of it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
