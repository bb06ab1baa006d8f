"""Latency's figures from made-up times; energy and memory counters."""

import dataclasses
import sys
import types

import pynvml
import pytest
import torch

from shared.eval.speed.latency import (
    Timed,
    energy_meter,
    median_interval,
    nvml_meter,
    summarise_times,
    tokens_per_joule,
    weights_in_memory,
)


def test_figures_of_made_up_times():
    times = [
        Timed(prefill_seconds=0.2, step_seconds=[0.01] * 9 + [0.11]),
        Timed(prefill_seconds=0.1, step_seconds=[0.02] * 10),
        Timed(prefill_seconds=0.4, step_seconds=[0.04] * 10),
    ]
    figures = dataclasses.asdict(summarise_times(times, 8, 64, peak_bytes=7, energy=30.0))
    assert figures.pop("peak_bytes") == 7
    assert figures.pop("reasons") == {"ci95": "3 repeats bear no 95 % interval of the median; 6 do"}
    assert figures.pop("ci95") == {"prefill_ms": None, "decode_tokens_per_second": None}  # of three repeats
    assert figures.pop("prefill_ms_range") == pytest.approx([100, 400])
    assert figures.pop("decode_tokens_per_second_range") == pytest.approx([200, 400])
    assert figures == pytest.approx({
        "prefill_ms": 200,
        "prefill_tokens_per_second": 8 * 64 / 0.2,
        "decode_tokens_per_second": 400,  # 80 tokens in 0.2 s in two of them
        "decode_ms_p50": 20,
        "decode_ms_p95": 40,
        "tokens_per_second_per_watt": 30,
    })  # fmt: skip
    silent = [Timed(prefill_seconds=1, step_seconds=[1])]
    figures = summarise_times(silent * 6, 1, 1, energy="no counter")
    assert figures.tokens_per_second_per_watt is figures.peak_bytes is None
    assert figures.reasons == {
        "tokens_per_second_per_watt": "no counter", "peak_bytes": "torch counts memory only on a GPU"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("n", "low", "high"),
    [(6, 1, 6), (8, 1, 8), (9, 2, 8), (11, 2, 10), (12, 3, 10), (20, 6, 15), (100, 40, 61)],  # Conover's table
)
def test_the_median_lies_between_two_order_statistics(n, low, high):
    assert median_interval([float(i) for i in range(n, 0, -1)]) == [low, high]


def test_five_values_bear_no_interval():
    """The least and the greatest of five hold the median between them with probability 1 - 2/32."""
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert median_interval([]) is None


def test_energy_is_counted_by_nvml_in_joules(monkeypatch):
    millijoules = iter([5000, 5000, 7500])
    stand_in = types.SimpleNamespace(
        NVMLError=pynvml.NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID={"GPU-7": 7}.get,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(millijoules) if handle == 7 else None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    joules = nvml_meter("GPU-7")
    assert joules() - joules() == -2.5


def test_energy_without_memory_for_its_loop_is_a_reason():
    class Full(types.SimpleNamespace):
        def prefill(self, prompt_BT):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has no more")

    assert tokens_per_joule(Full(), torch.zeros(1, 1), 4, lambda: 0.0) == "CUDA out of memory"


def test_a_missing_counter_is_a_reason(monkeypatch):
    assert energy_meter(torch.device("cpu")) == "energy is counted only on NVIDIA GPUs"
    assert nvml_meter("GPU-0-0").startswith("NVML reports no energy for this GPU: ")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml_meter("GPU-0-0") == "the package nvidia-ml-py is not installed"


def test_tied_weights_take_memory_once():
    first, second = torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(64, 32, bias=True)
    second.weight = first.weight
    assert weights_in_memory(torch.nn.ModuleList([first, second])) == 4 * (64 * 32 + 32)
