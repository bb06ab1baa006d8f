"""What long work says of itself in a log, and on a terminal."""

import io
import itertools
import sys
from types import SimpleNamespace

import pytest

from shared import progress as module
from shared.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """The seconds since the start, as the test sets them."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_log_shows_what_is_done_how_fast_and_how_long_still(clock, capsys):
    with progress("labelling", 200_000, "tokens") as bar:
        for clock.now in (1.0, 10.0, 15.0, 20.0):
            bar.advance(5_000)
    assert capsys.readouterr().err.splitlines() == [
        "labelling: 10,000/200,000 tokens (5%), 1,000 tokens/s, 190 s left",
        "labelling: 20,000/200,000 tokens (10%), 1,000 tokens/s, 180 s left",
        "labelling: 20,000 tokens in 20.0 s (1,000 tokens/s)",
    ]


def test_nobody_knows_how_long_work_without_a_total_takes(clock, capsys):
    with progress("tokenising", None, "documents") as bar:
        clock.now = 10.0
        bar.advance(400, "9,000 tokens, 900 tokens/s")
    assert capsys.readouterr().err.splitlines() == [
        "tokenising: 400 documents, 40 documents/s, 9,000 tokens, 900 tokens/s",
        "tokenising: 400 documents in 10.0 s (40 documents/s, 9,000 tokens, 900 tokens/s)",
    ]


def test_the_lines_of_a_log_grow_rarer(clock, capsys):
    seconds = []
    with progress("labelling", 1_000_000, "tokens") as bar:
        for clock.now in range(1, 200_000, 5):
            bar.advance(1)
            if capsys.readouterr().err:
                seconds.append(clock.now)
    gaps = [b - a for a, b in itertools.pairwise(seconds)]
    assert (seconds[0], gaps[0], gaps[-1]) == (11, 10, 600)
    assert gaps == sorted(gaps)
    assert 300 < len(seconds) < 500  # of a build of 55 hours


def test_hours_that_are_left_are_told_as_hours(clock, capsys):
    with progress("labelling", 100_000, "tokens") as bar:
        clock.now = 10.0
        bar.advance(10)
    assert "1 tokens/s, 1 day, 3:46:30 left" in capsys.readouterr().err


@pytest.mark.parametrize(("total", "shown"), [(1_000, "400/1000"), (None, "400/?")])
def test_a_terminal_shows_a_bar(monkeypatch, total, shown):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    with progress("tokenising", total, "documents") as bar:
        bar.advance(400, "9,000 tokens")
    assert shown in terminal.getvalue() and "9,000 tokens" in terminal.getvalue()
