"""Latency's figures from made-up times; energy and memory counters."""

import numpy as np
import pytest
import torch

from shared.eval.speed import energy
from shared.eval.speed.latency import Timed, median_interval, summarise
from shared.eval.speed.memory import peak_growth, weights_in_memory


def test_figures_of_made_up_times():
    times = [
        Timed(prefill_seconds=0.2, step_seconds=[0.01] * 9 + [0.11], decode_joules=3.0),
        Timed(prefill_seconds=0.1, step_seconds=[0.02] * 10, decode_joules=1.0),
        Timed(prefill_seconds=0.4, step_seconds=[0.04] * 10, decode_joules=4.0),
    ]
    figures = summarise(times, 8, 64)
    assert figures.pop("ci95") == {"prefill_ms": None, "decode_tokens_per_second": None}  # of three repeats
    assert figures.pop("prefill_ms_range") == pytest.approx([100, 400])
    assert figures.pop("decode_tokens_per_second_range") == pytest.approx([200, 400])
    assert figures == pytest.approx({
        "prefill_ms": 200,
        "prefill_tokens_per_second": 8 * 64 / 0.2,
        "decode_tokens_per_second": 400,  # 80 tokens in 0.2 s in two of them
        "decode_ms_p50": 20,
        "decode_ms_p95": 40,
        "tokens_per_second_per_watt": 240 / 8,
    })  # fmt: skip
    silent = [Timed(prefill_seconds=1, step_seconds=[1], decode_joules=None)]
    assert summarise(silent, 1, 1)["tokens_per_second_per_watt"] is None


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


def write_counters(folder, *values):
    for number, value in enumerate(values):
        package = folder / f"intel-rapl:{number}"
        (package / "sub").mkdir(parents=True, exist_ok=True)
        (package / "energy_uj").write_text(f"{value}\n")
        (package / "max_energy_range_uj").write_text("999999999\n")


def test_rapl_counts_all_packages_and_wraps_around(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert energy.open_meter(torch.device("cpu")) == "no RAPL counters on this machine"
    write_counters(tmp_path, 5_000_000, 999_000_000)
    meter = energy.open_meter(torch.device("cpu"))
    start = meter.joules()
    write_counters(tmp_path, 7_500_000, 1_000_000)  # the second is past its end: 2 J
    assert meter.joules() - start == pytest.approx(4.5)
    write_counters(tmp_path, 7_500_000, 1_000_000)
    assert meter.joules() - start == pytest.approx(4.5)


def test_counters_that_cannot_be_read_are_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()
    assert energy.open_meter(torch.device("cpu")).startswith("RAPL counters cannot be read: ")


def test_growth_of_memory_is_what_was_touched_at_once():
    with peak_growth(torch.device("cpu")) as peak:
        for _ in range(3):
            np.ones(64 << 17)  # 64 MiB, given back each time
    assert peak.bytes == pytest.approx(64 << 20, abs=4 << 20)


def test_tied_weights_take_memory_once():
    first, second = torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(64, 32, bias=True)
    second.weight = first.weight
    assert weights_in_memory(torch.nn.ModuleList([first, second])) == 4 * (64 * 32 + 32)
