"""How fast models are, and what that takes: all models in one process, their repeats interleaved."""

import inspect
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.checkpoints import describe_model, load_model, trial
from shared.errors import require
from shared.eval.results import BatchTiming, Latency, Timing, TimingSettings
from shared.progress import progress

BATCH_SIZES = (1, 8)

Meter = Callable[[], float]  # joules so far; only differences mean anything


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """One prefill and the decode steps after it.

    Args:
        prefill_seconds: from the prompts to the first token of each.
        step_seconds: of each decode step, a token for every row of the batch.
        decode_joules: energy of all steps; None where the device does not report it.
        allocated_bytes: the most that torch allocated beyond what was there; None where it does not count.
    """

    prefill_seconds: float
    step_seconds: list[float]
    decode_joules: float | None
    allocated_bytes: int | None = None


def measure_latency(
    model_dirs: Mapping[str, Path], *, prompt_tokens: int, new_tokens: int, repeats: int, dtype: str
) -> Latency:
    """Time prefill and decoding of every model at the `BATCH_SIZES`.

    The prompts are random ids, and no token ends a generation, so exactly `new_tokens` decode steps are timed. Each
    repeat goes through all models in turn, so that other load on the machine falls on all of them. One round before is
    warm-up; peak memory is measured in it.

    Args:
        model_dirs: transformers directories by name.
        repeats: timed rounds.
        dtype: one of `checkpoints.DTYPES`.

    Returns:
        Per model and batch size `prefill_ms` and `decode_tokens_per_second` (medians over repeats, with `…_range`:
        least and greatest, and 95 % intervals under `ci95`, see `median_interval`), `prefill_tokens_per_second`,
        `decode_ms_p50` and `…_p95` (over all steps), `peak_bytes` (weights and what torch allocated beyond them),
        `tokens_per_second_per_watt` (tokens per joule of decoding). What is unknown is None, with a reason.

    Raises:
        ConfigError: the tokens asked for exceed a model's positions, or a model does not decode from a cache.
    """
    start, load_before = time.monotonic(), os.getloadavg()[0]
    models = {name: load_model(directory, dtype)[0] for name, directory in model_dirs.items()}
    for name, model in models.items():
        _require_decoding(name, model, prompt_tokens + new_tokens)
    device = next(iter(models.values())).device
    meter = energy_meter(device)
    no_energy = meter if isinstance(meter, str) else "the counter did not move"
    times = _rounds(models, prompt_tokens, new_tokens, repeats, meter)
    results = {}
    for name, model in models.items():
        weights, batches = weights_in_memory(model), {}
        for batch_size in BATCH_SIZES:
            warm_up, *timed = times[name, batch_size]
            peak = None if warm_up.allocated_bytes is None else weights + warm_up.allocated_bytes
            batches[str(batch_size)] = summarise_times(
                timed, batch_size, prompt_tokens, peak_bytes=peak, no_energy=no_energy
            )
        results[name] = Timing(**describe_model(model, model_dirs[name]), memory_bytes=weights, batches=batches)
    return Latency(
        models=results,
        settings=TimingSettings(
            batch_sizes=list(BATCH_SIZES),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            warmup_rounds=1,
            threads=torch.get_num_threads(),
            device=device.type,
            peak_bytes="weights + the most that torch allocated beyond what was there",
            energy=None if isinstance(meter, str) else "NVML total energy of the GPU",
            load_average_before=load_before,
        ),
        seconds=round(time.monotonic() - start, 3),
    )


def _require_decoding(name: str, model: Any, tokens: int) -> None:
    """Refuse a model of too few positions, or that transformers cannot decode with step by step, before the timing."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokens
    require(tokens <= positions, "more tokens than the model has positions", where=name, expected=f"<= {positions}",
            got=tokens)  # fmt: skip
    with trial("this model cannot be timed", name, "decode steps from a cache that its prefill returns"):
        time_once(model, 1, 1, 1, "not counted")


def _cache_name(model: Any) -> str:
    """What a model calls its cache, in its arguments and its outputs; that depends on model and version."""
    arguments = inspect.signature(model.forward).parameters
    names = ("cache", "past_key_values", "cache_params", "state")
    return next((name for name in names if name in arguments), names[0])


def _rounds(
    models: Mapping[str, Any], prompt_tokens: int, new_tokens: int, repeats: int, meter: Meter | str
) -> dict[tuple[str, int], list[Timed]]:
    """All rounds by model and batch size, the warm-up first."""
    times: dict[tuple[str, int], list[Timed]] = defaultdict(list)
    with progress("Timing", (repeats + 1) * len(models) * len(BATCH_SIZES), "runs") as bar:
        for _ in range(repeats + 1):
            for name, model in models.items():
                for batch_size in BATCH_SIZES:
                    times[name, batch_size].append(time_once(model, batch_size, prompt_tokens, new_tokens, meter))
                    bar.advance(1)
    return times


def summarise_times(
    times: Sequence[Timed], batch_size: int, prompt_tokens: int, *, peak_bytes: int | None = None, no_energy: str = ""
) -> BatchTiming:
    """The figures of one model at one batch size; see `measure_latency`."""
    prefill_ms = [1000 * timed.prefill_seconds for timed in times]
    speeds = [batch_size * len(timed.step_seconds) / sum(timed.step_seconds) for timed in times]
    step_ms = np.array([1000 * seconds for timed in times for seconds in timed.step_seconds])
    joules = sum(timed.decode_joules or 0 for timed in times)
    ci95 = {"prefill_ms": median_interval(prefill_ms), "decode_tokens_per_second": median_interval(speeds)}
    reasons = {} if joules else {"tokens_per_second_per_watt": no_energy}
    if peak_bytes is None:
        reasons["peak_bytes"] = "torch counts memory only on a GPU"
    if None in ci95.values():
        reasons["ci95"] = f"{len(times)} repeats bear no 95 % interval of the median; 6 do"
    return BatchTiming(
        prefill_ms=statistics.median(prefill_ms),
        prefill_ms_range=[min(prefill_ms), max(prefill_ms)],
        prefill_tokens_per_second=1000 * batch_size * prompt_tokens / statistics.median(prefill_ms),
        decode_tokens_per_second=statistics.median(speeds),
        decode_tokens_per_second_range=[min(speeds), max(speeds)],
        decode_ms_p50=float(np.quantile(step_ms, 0.5)),
        decode_ms_p95=float(np.quantile(step_ms, 0.95)),
        peak_bytes=peak_bytes,
        tokens_per_second_per_watt=batch_size * len(step_ms) / joules if joules else None,
        ci95=ci95,
        reasons=reasons,
    )


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
    cache_name = _cache_name(model)
    counts_memory = model.device.type == "cuda"
    if counts_memory:
        torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device) if counts_memory else 0
    prompt_BT = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    start = now(model)
    output = model(prompt_BT, use_cache=True, logits_to_keep=1)
    token_BT = output.logits[:, -1:].argmax(-1)
    times = [now(model)]
    joules = None if isinstance(meter, str) else meter()
    for _ in range(new_tokens):
        output = model(token_BT, use_cache=True, **{cache_name: output[cache_name]})
        token_BT = output.logits[:, -1:].argmax(-1)
        times.append(now(model))
    return Timed(
        prefill_seconds=times[0] - start,
        step_seconds=np.diff(times).tolist(),
        decode_joules=None if isinstance(meter, str) or joules is None else meter() - joules,
        allocated_bytes=torch.cuda.max_memory_allocated(model.device) - before if counts_memory else None,
    )


def now(model: Any) -> float:
    """The time once the device has done everything asked of it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def weights_in_memory(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, those of tied tensors once."""
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def energy_meter(device: torch.device) -> Meter | str:
    """The energy counter of a GPU, or the reason why there is none."""
    if device.type != "cuda":
        return "energy is counted only on NVIDIA GPUs"
    return nvml_meter(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def nvml_meter(uuid: str) -> Meter | str:
    """NVML's counter of the GPU with this UUID, or the reason why there is none."""
    try:
        import pynvml
    except ImportError:
        return "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return f"NVML reports no energy for this GPU: {error}"
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # of millijoules
