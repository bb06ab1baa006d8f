"""`student train` killed thirty times and more at random moments, saves included: the same weights, the same log."""

import json
import signal

import numpy as np
import pytest

from tests.support.student_kills import Trainings, outcome, progress


@pytest.mark.timeout(3600)
def test_thirty_kills_change_nothing(tmp_path):
    rng = np.random.default_rng(0)
    trainings = Trainings(tmp_path)
    while trainings.kills < 30 or trainings.in_saves < 5:
        trainings.kill_in_random_moments(tmp_path / "run", rng)
    print(f"{trainings.kills} kills, {trainings.in_saves} of them inside a save")


@pytest.mark.timeout(3600)
def test_kills_among_stray_files_lose_no_checkpoint(tmp_path):
    rng = np.random.default_rng(1)
    trainings = Trainings(tmp_path)
    while trainings.kills < 15 or trainings.in_saves < 3:
        trainings.kill_in_random_moments(tmp_path / "run", rng, strays=True)
    print(f"{trainings.kills} kills, {trainings.in_saves} of them inside a save, stray files everywhere")


def kill_once(trainings, out):
    """One run, killed after its first checkpoint, and the same command again; what that leaves."""
    status, said = trainings.run(out, kill_when=lambda: list(out.glob("checkpoint-*/COMPLETE")) and progress(out) > 3)
    assert status == -signal.SIGKILL, said
    status, said = trainings.run(out)
    assert status == 0, said
    assert "continuing from" in said
    return outcome(out)


def test_a_kill_in_bfloat16_changes_no_bit(tmp_path):
    trainings = Trainings(tmp_path, bf16=True)
    assert kill_once(trainings, tmp_path / "run") == trainings.expected


@pytest.mark.timeout(1800)
def test_torch_compile_gives_the_figures_of_eager_and_resumes(tmp_path):
    (tmp_path / "eager").mkdir()
    (tmp_path / "compiled").mkdir()
    eager_weights, eager = Trainings(tmp_path / "eager").expected
    trainings = Trainings(tmp_path / "compiled", torch_compile=True)
    weights, log = trainings.expected
    assert weights != eager_weights  # other kernels did run
    for line, plain in zip(log.splitlines(), eager.splitlines(), strict=True):
        assert json.loads(line) == pytest.approx(json.loads(plain), rel=1e-4)
    assert kill_once(trainings, tmp_path / "run") == trainings.expected
