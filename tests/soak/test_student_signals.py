"""`student train` ended from outside while it loads, steps, evaluates or saves: three kills, and SIGTERM in each."""

import signal
import subprocess
import time

import pytest

from tests.support.student_kills import ENVIRONMENT, Trainings, outcome, unfinished


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    return Trainings(tmp_path_factory.mktemp("trainings"))


def test_three_kills_change_nothing(trainings, tmp_path):
    """One in the first steps, two inside a save."""
    out = tmp_path / "run"
    status, _ = trainings.run(out, kill_when=(out / "training_log.jsonl").exists, seconds=0.3)
    assert status == -signal.SIGKILL
    for _ in range(2):
        status, _ = trainings.run(out, kill_when=lambda: unfinished(out) > 0)
        assert status == -signal.SIGKILL
    status, said = trainings.run(out)
    assert status == 0, said
    assert outcome(out) == trainings.expected


def test_sigterm_at_any_moment_leaves_what_the_next_run_needs(trainings, tmp_path):
    """To the whole process group, as batch systems send it: the data loader's worker gets it too."""
    out, log = tmp_path / "run", tmp_path / "log"
    moments = {
        "load": lambda: "memory, about" in log.read_text(),
        "save": lambda: unfinished(out) > 0,
        "evaluation": lambda: "eval_loss" in log.read_text(),
        "load of a checkpoint": lambda: "continuing from" in log.read_text(),
    }
    for moment, has_come in moments.items():
        with log.open("w") as file:
            process = subprocess.Popen(
                [*trainings.command, str(out)], env=ENVIRONMENT, stderr=file, start_new_session=True
            )
            while not has_come():
                assert process.poll() is None, (moment, log.read_text())
                time.sleep(0.001)
            subprocess.run(["kill", "-TERM", "--", f"-{process.pid}"], check=True)
            assert process.wait(60) == 143, (moment, log.read_text())
        assert "Traceback" not in log.read_text(), moment
        assert unfinished(out) == 0
        assert not subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout
        if moment != "load":
            assert list(out.glob("checkpoint-*/COMPLETE"))
    status, said = trainings.run(out)
    assert status == 0, said
    assert outcome(out) == trainings.expected
