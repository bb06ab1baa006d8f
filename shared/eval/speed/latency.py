"""How fast models are, and what that takes: all models in one process, their repeats interleaved."""

import copy
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
from torch import Tensor

from shared.checkpoints import describe_model, dtype_name, load_model, trial
from shared.errors import ConfigError, require
from shared.eval.programs.generate import cache_name
from shared.eval.results import BatchTiming, Latency, Timing, TimingSettings
from shared.eval.speed.served import HOW, NOT_ON_CPU, Served
from shared.process import first_sentence, log
from shared.progress import progress

BATCH_SIZES = (1, 8)
ENERGY_SECONDS = 2.0  # of decoding between two readings: the sensor of a GPU is renewed only every 20 to 100 ms

Meter = Callable[[], float]  # joules so far; only differences mean anything


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """One prefill and the decode steps after it.

    Args:
        prefill_seconds: from the prompts to the first token of each.
        step_seconds: of each decode step, a token for every row of the batch.
        allocated_bytes: the most that torch allocated beyond what was there; None where it does not count.
    """

    prefill_seconds: float
    step_seconds: list[float]
    allocated_bytes: int | None = None


class Eager:
    """A model that decodes one operation at a time, from a cache that its prefill returns.

    Args:
        model: a transformers model.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._cache_name = model, cache_name(model.forward)
        self._cache: Any = None
        self._kept: Any = None

    def prefill(self, prompt_BT: Tensor) -> Tensor:
        """Begin anew with prompts of one length; the most likely id after each, [B, 1]."""
        return self._most_likely(self._model(prompt_BT, use_cache=True, logits_to_keep=1))

    def step(self, ids_B1: Tensor) -> Tensor:
        """Feed an id of each row; the most likely id after it, [B, 1]."""
        return self._most_likely(self._model(ids_B1, use_cache=True, **{self._cache_name: self._cache}))

    def keep(self) -> None:
        """Remember the cache as it is, for `rewind`."""
        self._kept = copy.deepcopy(self._cache)

    def rewind(self) -> None:
        """Go on from where `keep` was called."""
        self._cache = copy.deepcopy(self._kept)

    def _most_likely(self, output: Any) -> Tensor:
        self._cache = output[self._cache_name]
        most_likely_B1: Tensor = output.logits[:, -1:].argmax(-1)
        return most_likely_B1


def measure_latency(
    model_dirs: Mapping[str, Path], *, prompt_tokens: int, new_tokens: int, repeats: int, dtype: str
) -> Latency:
    """Time prefill and decoding of every model at the `BATCH_SIZES`, eagerly and, on a GPU, as people serve it.

    The prompts are random ids, and no token ends a generation, so exactly `new_tokens` decode steps are timed. Each
    repeat goes through all models in turn, so that other load on the machine falls on all of them. One round before is
    warm-up; peak memory is measured in it. Energy is counted last, over at least `ENERGY_SECONDS` of decoding.

    With `auto`, models of different dtypes on a GPU are all timed in the smallest of them, and those that it is not
    their own also as they are, under a name such as "student, float32".

    Args:
        model_dirs: transformers directories by name.
        repeats: timed rounds.
        dtype: see `checkpoints.load_frozen`.

    Returns:
        Per model, way and batch size `prefill_ms` and `decode_tokens_per_second` (medians over repeats, with
        `…_range`: least and greatest, and 95 % intervals under `ci95`, see `median_interval`),
        `prefill_tokens_per_second`, `decode_ms_p50` and `…_p95` (over all steps), `peak_bytes` (weights and what torch
        allocated beyond them), `tokens_per_second_per_watt` (tokens per joule of decoding). What is unknown is None,
        with a reason. `batches` are of eager decoding, `served` of `Served`, empty for the reason `not_served`. A batch
        that the device has too little memory for is left out, with the reason in `not_timed`.

    Raises:
        ConfigError: the tokens asked for exceed a model's positions, or a model does not decode from a cache.
        torch.OutOfMemoryError: a model cannot decode even one prompt.
    """
    start, load_before = time.monotonic(), os.getloadavg()[0]
    models = {name: load_model(directory, dtype)[0] for name, directory in model_dirs.items()}
    device = next(iter(models.values())).device
    directories = dict(model_dirs)
    if device.type == "cuda":
        _in_one_dtype(models, directories)
    for name, model in models.items():
        _require_decoding(name, model, prompt_tokens + new_tokens)
    ways, not_served = _ways(models, prompt_tokens + new_tokens)
    times, not_timed = _rounds(ways, models, prompt_tokens, new_tokens, repeats)
    meter = energy_meter(device)
    results = {}
    for name, model in models.items():
        weights = weights_in_memory(model)
        found: dict[str, dict[str, BatchTiming]] = {"batch": {}, "served": {}}
        for (_, way, batch_size), decoder in ((key, decoder) for key, decoder in ways.items() if key[0] == name):
            warm_up, *timed = times[name, way, batch_size]
            peak = None if warm_up.allocated_bytes is None else weights + warm_up.allocated_bytes
            prompt_BT = _prompt(model, batch_size, prompt_tokens)
            energy = meter if isinstance(meter, str) else tokens_per_joule(decoder, prompt_BT, new_tokens, meter)
            found[way][str(batch_size)] = summarise_times(
                timed, batch_size, prompt_tokens, peak_bytes=peak, energy=energy
            )
        results[name] = Timing(
            **describe_model(model, directories[name]),
            memory_bytes=weights,
            batches=found["batch"],
            served=found["served"],
            not_served=not_served.get(name),
            not_timed={f"{way} {size}": reason for (of, way, size), reason in not_timed.items() if of == name},
        )
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
            ways={"batches": "eager: the host launches each operation of each step", "served": HOW},
        ),
        seconds=round(time.monotonic() - start, 3),
    )


def _in_one_dtype(models: dict[str, Any], directories: dict[str, Path]) -> None:
    """Add the models that are not in the smallest dtype of all in that dtype, and rename them as they are."""
    smallest = min((model.dtype for model in models.values()), key=lambda dtype: dtype.itemsize)
    for name, model in list(models.items()):
        if model.dtype != smallest:
            as_is = f"{name}, {dtype_name(model)}"
            models[as_is], directories[as_is] = model, directories[name]
            models[name] = copy.deepcopy(model).to(smallest)


def _require_decoding(name: str, model: Any, tokens: int) -> None:
    """Refuse a model of too few positions, or that transformers cannot decode with step by step, before the timing."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokens
    require(tokens <= positions, "more tokens than the model has positions", where=name, expected=f"<= {positions}",
            got=tokens)  # fmt: skip
    with trial("this model cannot be timed", name, "decode steps from a cache that its prefill returns"):
        time_once(Eager(model), _prompt(model, 1, 1), 1)


Key = tuple[str, str, int]  # of a model; `batch` (decoded eagerly) or `served`; the batch size
Ways = dict[Key, Eager | Served]


def _ways(models: Mapping[str, Any], capacity: int) -> tuple[Ways, dict[str, str]]:
    """How each model decodes at each batch size; why models do not decode as served."""
    ways: Ways = {(name, "batch", size): Eager(model) for name, model in models.items() for size in BATCH_SIZES}
    not_served = {}
    for name, model in models.items():
        if model.device.type == "cpu":
            not_served[name] = NOT_ON_CPU
            continue
        try:
            with trial("the model does not decode as served", type(model).__name__):
                for size in BATCH_SIZES:
                    ways[name, "served", size] = Served(model, batch_size=size, capacity=capacity)
        except (ConfigError, torch.OutOfMemoryError) as error:
            not_served[name] = first_sentence(error)
            ways = {key: decoder for key, decoder in ways.items() if key[:2] != (name, "served")}
    return ways, not_served


def _rounds(
    ways: Ways, models: Mapping[str, Any], prompt_tokens: int, new_tokens: int, repeats: int
) -> tuple[dict[Key, list[Timed]], dict[Key, str]]:
    """All rounds, the warm-up first; what runs out of memory leaves `ways`, and why it does."""
    times: dict[Key, list[Timed]] = defaultdict(list)
    not_timed: dict[Key, str] = {}
    with progress("Timing", (repeats + 1) * len(ways), "runs") as bar:
        for _ in range(repeats + 1):
            for key in list(ways):
                name, way, batch_size = key
                prompt_BT = _prompt(models[name], batch_size, prompt_tokens)
                bar.advance(1)
                try:
                    times[key].append(time_once(ways[key], prompt_BT, new_tokens))
                except torch.OutOfMemoryError as error:
                    if (way, batch_size) == ("batch", 1):
                        raise
                    not_timed[key] = first_sentence(error)
                    log(f"{name}, {way} {batch_size} is left out: {not_timed[key]}")
                    del ways[key]
    return times, not_timed


def summarise_times(
    times: Sequence[Timed], batch_size: int, prompt_tokens: int, *, peak_bytes: int | None = None, energy: float | str
) -> BatchTiming:
    """The figures of one model at one batch size; see `measure_latency`. `energy`: as `tokens_per_joule` gives it."""
    prefill_ms = [1000 * timed.prefill_seconds for timed in times]
    speeds = [batch_size * len(timed.step_seconds) / sum(timed.step_seconds) for timed in times]
    step_ms = np.array([1000 * seconds for timed in times for seconds in timed.step_seconds])
    ci95 = {"prefill_ms": median_interval(prefill_ms), "decode_tokens_per_second": median_interval(speeds)}
    reasons = {"tokens_per_second_per_watt": energy} if isinstance(energy, str) else {}
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
        tokens_per_second_per_watt=None if isinstance(energy, str) else energy,
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


def _prompt(model: Any, batch_size: int, prompt_tokens: int) -> Tensor:
    """Random ids [B, T], always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, prompt_tokens)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)


@torch.inference_mode()
def time_once(decoder: Eager | Served, prompt_BT: Tensor, new_tokens: int) -> Timed:
    """One prefill and `new_tokens` greedy decode steps after it, each step until the device is done."""
    counts_memory = prompt_BT.device.type == "cuda"
    if counts_memory:
        torch.cuda.reset_peak_memory_stats(prompt_BT.device)
    before = torch.cuda.memory_allocated(prompt_BT.device) if counts_memory else 0
    start = now(prompt_BT)
    token_B1 = decoder.prefill(prompt_BT)
    times = [now(prompt_BT)]
    for _ in range(new_tokens):
        token_B1 = decoder.step(token_B1)
        times.append(now(prompt_BT))
    return Timed(
        prefill_seconds=times[0] - start,
        step_seconds=np.diff(times).tolist(),
        allocated_bytes=torch.cuda.max_memory_allocated(prompt_BT.device) - before if counts_memory else None,
    )


@torch.inference_mode()
def tokens_per_joule(decoder: Eager | Served, prompt_BT: Tensor, new_tokens: int, meter: Meter) -> float | str:
    """The energy of decoding alone, the same steps again for `ENERGY_SECONDS`; or why there is no figure."""
    try:
        token_B1 = decoder.prefill(prompt_BT).clone()
        decoder.keep()
        start, joules, num_tokens = now(prompt_BT), meter(), 0
        while now(prompt_BT) - start < ENERGY_SECONDS:
            decoder.rewind()
            for _ in range(new_tokens):
                token_B1 = decoder.step(token_B1)
            num_tokens += token_B1.numel() * new_tokens
    except torch.OutOfMemoryError as error:  # `keep` copies the cache
        return first_sentence(error)
    joules = meter() - joules
    return num_tokens / joules if joules else "the counter did not move"


def now(on: Any) -> float:
    """The time once the device of a model or a tensor has done everything asked of it."""
    if on.device.type == "cuda":
        torch.cuda.synchronize(on.device)
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
