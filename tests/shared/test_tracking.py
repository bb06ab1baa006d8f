import os
import re
import subprocess
import sys
import time

import pytest

from shared import tracking
from tests.support.wandb_runs import wandb_runs, wandb_summary

KEY = "0123456789abcdef0123456789abcdef01234567"
JOB = """
import sys
from pathlib import Path
from shared import tracking
with tracking.start("train", name="n", config={"lr": 1}, directory=Path(sys.argv[1]), run_id="job1") as run:
    run.log({"loss": 1.0}, step=1)
    run.summary({"loss": 0.5})
    print(run.active, run.id, Path(sys.argv[1], "wandb").exists())
"""


EVALUATION = """
import sys
from pathlib import Path
from shared import tracking
result = {"pass_at_k": {"1": 0.25}, "nll_nats": None, "kind": "text", "settings": {"seed": 3}, "per_document": [1]}
for name in ("kd", "ce"):
    tracking.record_evaluation("fidelity", Path(sys.argv[1], name, "fidelity.json"), result)
"""


def run_job(directory, *, before="", job=JOB, after="", **environment):
    """Run a tracked job in its own process, without the surroundings' own W&B settings, and time it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "RANK"}
    clean |= {"HOME": str(directory), "NETRC": str(directory / "netrc")} | environment
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", before + job + after, str(directory / "out")],
        env=clean, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=directory, timeout=60,
    )  # fmt: skip
    return done, time.monotonic() - start


def names(directory):
    """The runs recorded: `offline-run` or `run` and the id."""
    found = (re.fullmatch(r"(offline-run|run)-[\d_]+-(\w+)", p.name) for p in (directory / "out" / "wandb").iterdir())
    return sorted(match.groups() for match in found if match)


def assert_key_nowhere(directory, done):
    assert KEY not in done.stdout + done.stderr
    for path in directory.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("mode", "reason"),
    [(None, "no key was found"), ("online", "no key was found"), ("offline", "WANDB_MODE asks for it")],
)
def test_offline_without_a_key(tmp_path, mode, reason):
    done, _ = run_job(tmp_path, **({"WANDB_MODE": mode} if mode else {}))
    assert done.returncode == 0 and done.stdout == "True job1 True\n"
    assert names(tmp_path) == [("offline-run", "job1")]
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"since {reason}; upload with `wandb sync`")


def test_a_resumed_job_keeps_its_id(tmp_path):
    run_job(tmp_path, WANDB_MODE="offline")
    time.sleep(1.0)  # wandb's folders are named by the second
    run_job(tmp_path, WANDB_MODE="offline")
    assert names(tmp_path) == [("offline-run", "job1")] * 2


def test_a_key_and_no_server_costs_at_most_fifteen_seconds(tmp_path):
    done, seconds = run_job(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0 and done.stdout == "True job1 True\n"
    assert ("offline-run", "job1") in names(tmp_path)
    (line,) = done.stderr.splitlines()
    assert "since the server could not be used (CommError)" in line
    assert seconds < 15
    assert_key_nowhere(tmp_path, done)


def test_a_malformed_key_is_not_repeated(tmp_path):
    done, _ = run_job(tmp_path, WANDB_API_KEY=KEY[:20] + " " + KEY[20:])
    assert done.returncode == 0 and done.stdout == "True job1 True\n"
    (line,) = done.stderr.splitlines()
    assert "AuthenticationError" in line and KEY[:20] not in line


def test_evaluations_are_recorded_in_groups_and_a_server_that_failed_once_is_not_tried_again(tmp_path):
    server = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done, _ = run_job(tmp_path, job=EVALUATION, **server)
    assert done.returncode == 0, done.stderr
    kd, ce = done.stderr.splitlines()
    for line, name in ((kd, "kd"), (ce, "ce")):
        assert f"recording offline in {tmp_path / 'out' / name / 'wandb'}, since the server could not be used" in line
        assert wandb_runs(tmp_path / "out" / name) == {f"{name} fidelity": (name, 0)}
        assert wandb_summary(tmp_path / "out" / name, f"{name} fidelity") == {"pass_at_k/1": 0.25}
    tried = [name for name in ("kd", "ce") if list((tmp_path / "out" / name).glob("wandb/run-*"))]
    assert tried == ["kd"]
    assert_key_nowhere(tmp_path, done)


def test_the_group_of_the_surroundings_comes_first(tmp_path):
    done, _ = run_job(tmp_path, job=EVALUATION, WANDB_MODE="offline", WANDB_RUN_GROUP="night")
    assert done.returncode == 0, done.stderr
    assert wandb_runs(tmp_path / "out" / "kd") == {"kd fidelity": ("night", 0)}


def test_disabled_is_silent_and_loads_no_wandb(tmp_path):
    done, _ = run_job(tmp_path, after='print("wandb" in sys.modules)', WANDB_MODE="disabled")
    assert (done.returncode, done.stdout, done.stderr) == (0, "False None False\nFalse\n", "")


def test_other_ranks_record_nothing(tmp_path):
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}
    done, _ = run_job(tmp_path, WANDB_MODE="offline", **ranks)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False None False\n", "")


@pytest.mark.parametrize("module", ["None", "types.ModuleType('wandb')"], ids=["absent", "its own output folder"])
def test_without_wandb(tmp_path, module):
    before = f"import sys, types; sys.modules['wandb'] = {module}\n"
    done, _ = run_job(tmp_path, before=before)
    assert done.returncode == 0 and done.stdout == "False None False\n"
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"wandb: cannot be imported \(\w+\); nothing is tracked", line)


def test_settings_that_wandb_refuses(tmp_path):
    done, _ = run_job(tmp_path, WANDB_MODE="nonsense")
    assert done.returncode == 0 and done.stdout == "False None False\n"
    assert done.stderr == "wandb: cannot record (ValidationError); nothing is tracked\n"


class FullDisk:
    """A wandb run that can record nothing."""

    id = "job1"

    def log(self, metrics, step):
        raise OSError(KEY)

    finish = log


def test_a_record_that_fails_is_said_once_and_stops_nothing(capsys):
    run = tracking.Run(FullDisk())
    run.log({"loss": 1.0}, step=1)
    run.log({"loss": 1.0}, step=2)
    run.summary({"loss": 1.0})
    run.finish(0)
    assert run.active and run.id == "job1"
    assert capsys.readouterr().err == "wandb: something was not recorded (OSError); the job goes on\n"


def test_an_exception_in_the_block_ends_the_run_as_failed(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(tracking.Run, "finish", lambda self, exit_code: codes.append(exit_code))
    with (
        pytest.raises(KeyboardInterrupt),
        tracking.start("train", name=None, config={}, directory=tmp_path),
    ):
        raise KeyboardInterrupt
    with tracking.start("train", name=None, config={}, directory=tmp_path):
        pass
    assert codes == [1, 0]
