"""How fast models are, and what that takes: all models in one process, their repeats interleaved."""

import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.checkpoints import dtype_name, embedding_share, hub_commit, load_model, num_parameters, weight_bytes
from shared.errors import ConfigError
from shared.eval.speed import memory
from shared.eval.speed.energy import Meter, open_meter
from shared.machine import machine, versions
from shared.progress import progress

BATCH_SIZES = (1, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """One prefill and the decode steps after it.

    Args:
        prefill_seconds: from the prompts to the first token of each.
        step_seconds: of each decode step, a token for every row of the batch.
        decode_joules: energy of all steps; None where the device does not report it.
    """

    prefill_seconds: float
    step_seconds: list[float]
    decode_joules: float | None


def measure_latency(
    model_dirs: Mapping[str, Path], *, prompt_tokens: int, new_tokens: int, repeats: int, dtype: str
) -> dict[str, Any]:
    """Time prefill and decoding of every model at the `BATCH_SIZES`, and measure the memory they take.

    The prompts are random ids, the same positions for every model, and nothing ends a generation early, so exactly
    `new_tokens` decode steps are made and timed. Each repeat goes through all models in turn, so that what else the
    machine does meanwhile falls on all alike; one round before is warm-up, in which memory is measured.

    Args:
        model_dirs: name → transformers directory.
        prompt_tokens: length of a prompt.
        new_tokens: decode steps after it.
        repeats: timed rounds.
        dtype: one of `checkpoints.DTYPES`.

    Returns:
        `models`: per name `commit` (of a Hub id), `parameters`, `embedding_share` (of them), `bytes` (files),
        `memory_bytes` (weights in memory), `dtype`, the figures at batch 1, and those of every batch size under
        `batches`: `prefill_ms` and `decode_tokens_per_second` (medians over repeats, with `…_range`: least and
        greatest, and 95 % intervals under `ci95`, see `median_interval`), `prefill_tokens_per_second`, `decode_ms_p50`
        and `…_p95` (over all steps), `peak_bytes`, `tokens_per_second_per_watt` (tokens per joule of decoding); null
        where unknown, with `reasons`. `settings`, `machine`, `versions`.

    Raises:
        ConfigError: the tokens asked for exceed a model's positions.
    """
    start = time.monotonic()
    load_before = os.getloadavg()[0]
    models = {name: load_model(directory, dtype)[0] for name, directory in model_dirs.items()}
    for name, model in models.items():
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and prompt_tokens + new_tokens > positions:
            raise ConfigError("more tokens than the model has positions", where=name, expected=f"<= {positions}",
                              got=prompt_tokens + new_tokens)  # fmt: skip
    device = next(iter(models.values())).device
    meter = open_meter(device)
    memory_bytes = {name: memory.weights_in_memory(model) for name, model in models.items()}
    peaks: dict[tuple[str, int], memory.Peak] = {}
    times: dict[tuple[str, int], list[Timed]] = defaultdict(list)
    with progress("Timing", (repeats + 1) * len(models) * len(BATCH_SIZES), "runs") as bar:
        for repeat in range(repeats + 1):
            for name, model in models.items():
                for batch_size in BATCH_SIZES:
                    if repeat == 0:
                        with memory.peak_growth(device) as peaks[name, batch_size]:
                            time_once(model, batch_size, prompt_tokens, new_tokens, meter)
                    else:
                        timed = time_once(model, batch_size, prompt_tokens, new_tokens, meter)
                        times[name, batch_size].append(timed)
                    bar.advance(1)
    results = {}
    for name, model in models.items():
        batches = {}
        for batch_size in BATCH_SIZES:
            peak = peaks[name, batch_size]
            figures = summarise(times[name, batch_size], batch_size, prompt_tokens)
            figures["peak_bytes"] = None if peak.bytes is None else memory_bytes[name] + peak.bytes
            reasons = {"peak_bytes": peak.reason} if peak.reason else {}
            if None in figures["ci95"].values():
                reasons["ci95"] = f"{repeats} repeats bear no 95 % interval of the median; 6 do"
            if isinstance(meter, str):
                reasons["tokens_per_second_per_watt"] = meter
            elif figures["tokens_per_second_per_watt"] is None:
                reasons["tokens_per_second_per_watt"] = "the counter did not move"
            batches[str(batch_size)] = figures | {"reasons": reasons}
        results[name] = {
            "commit": hub_commit(model_dirs[name]),
            "parameters": num_parameters(model),
            "embedding_share": embedding_share(model),
            "bytes": weight_bytes(model_dirs[name]),
            "memory_bytes": memory_bytes[name],
            "dtype": dtype_name(model),
            **batches["1"],
            "batches": batches,
        }
    return {
        "models": results,
        "settings": {
            "batch_size": 1,
            "batch_sizes": list(BATCH_SIZES),
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "warmup_rounds": 1,
            "threads": torch.get_num_threads(),
            "device": device.type,
            "peak_bytes": memory.CUDA if device.type == "cuda" else memory.CPU,
            "energy": None if isinstance(meter, str) else meter.source,
            "load_average_before": load_before,
        },
        "seconds": round(time.monotonic() - start, 3),
        "machine": machine(),
        "versions": versions("torch", "transformers", "codedistill"),
    }


def summarise(times: Sequence[Timed], batch_size: int, prompt_tokens: int) -> dict[str, Any]:
    """The figures of one model at one batch size; see `measure_latency`."""
    prefill_ms = [1000 * timed.prefill_seconds for timed in times]
    speeds = [batch_size * len(timed.step_seconds) / sum(timed.step_seconds) for timed in times]
    step_ms = np.array([1000 * seconds for timed in times for seconds in timed.step_seconds])
    joules = sum(timed.decode_joules or 0 for timed in times)
    return {
        "prefill_ms": statistics.median(prefill_ms),
        "prefill_ms_range": [min(prefill_ms), max(prefill_ms)],
        "prefill_tokens_per_second": 1000 * batch_size * prompt_tokens / statistics.median(prefill_ms),
        "decode_tokens_per_second": statistics.median(speeds),
        "decode_tokens_per_second_range": [min(speeds), max(speeds)],
        "ci95": {"prefill_ms": median_interval(prefill_ms), "decode_tokens_per_second": median_interval(speeds)},
        "decode_ms_p50": float(np.quantile(step_ms, 0.5)),
        "decode_ms_p95": float(np.quantile(step_ms, 0.95)),
        "tokens_per_second_per_watt": batch_size * len(step_ms) / joules if joules else None,
    }


def median_interval(values: Sequence[float]) -> list[float] | None:
    """The narrowest two order statistics, as far from one end as from the other, with 95 % or more between them.

    For values drawn independently from any one distribution, its median lies outside the j-th least and j-th greatest
    of n with probability 2 · P(Binomial(n, 1/2) < j). None for fewer than six values, which bear no such interval.
    """
    n = len(values)
    ranks = range(1, n // 2 + 1)
    bearing = [j for j in ranks if 2 * sum(math.comb(n, i) for i in range(j)) / 2**n <= 0.05]
    return [sorted(values)[bearing[-1] - 1], sorted(values)[-bearing[-1]]] if bearing else None


@torch.inference_mode()
def time_once(model: Any, batch_size: int, prompt_tokens: int, new_tokens: int, meter: Meter | str) -> Timed:
    """One prefill and `new_tokens` greedy decode steps after it, each step until the device is done."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, prompt_tokens)
    prompt_BT = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    start = now(model)
    output = model(prompt_BT, use_cache=True, logits_to_keep=1)
    token_BT = output.logits[:, -1:].argmax(-1)
    times = [now(model)]
    joules = None if isinstance(meter, str) else meter.joules()
    for _ in range(new_tokens):
        output = model(token_BT, past_key_values=output.past_key_values, use_cache=True)
        token_BT = output.logits[:, -1:].argmax(-1)
        times.append(now(model))
    return Timed(
        prefill_seconds=times[0] - start,
        step_seconds=np.diff(times).tolist(),
        decode_joules=None if isinstance(meter, str) or joules is None else meter.joules() - joules,
    )


def now(model: Any) -> float:
    """The time once the device has done everything asked of it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
