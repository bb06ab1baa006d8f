"""`student train` in two processes: the figures of one process, and one end for both."""

import json
import os
import signal
import socket
import subprocess
import time

import pytest

from tests.stage2_student.test_train import COMMAND, ENVIRONMENT, arguments, log_of, refused, run, run_here
from tests.support import warm
from tests.support.student_cache import make_cache


def torchrun(command):
    launcher = ["--standalone", "--nproc-per-node", "2", "--no-python"]
    return warm.Command(*launcher, *command, program=warm.TORCHRUN, env=ENVIRONMENT)


def children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    make_cache(folder / "train")
    make_cache(folder / "validation", seed=1, lengths=(30, 20, 10, 5, 41))
    return folder


OPTIONS = {"num_train_epochs": 2.5, "max_steps": -1, "logging_steps": 1, "eval_steps": 2, "save_steps": 2}


def same_figures(a, b):
    a, b = log_of(a), log_of(b)
    assert len(a) == len(b) > 3
    for ours, theirs in zip(a, b, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.fixture(scope="module")
def alone(caches, tmp_path_factory):
    """One process, one micro-batch of 4 blocks per step; the last step has blocks to spare."""
    out = tmp_path_factory.mktemp("alone") / "run"
    os.environ["WANDB_MODE"] = "disabled"
    command = arguments(caches / "train", out, caches / "validation", per_device_train_batch_size=4, **OPTIONS)
    assert run_here(command) is None
    assert json.loads((out / "run.json").read_text())["data"]["blocks"] % 4
    return out


def test_two_processes_have_the_figures_of_one_and_one_continues_what_two_began(caches, alone, tmp_path):
    out = tmp_path / "run"

    def command(**sizes):
        return arguments(caches / "train", out, caches / "validation", **OPTIONS, **sizes)

    two = command(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    codes, errors = warm.run_ranks(2, "student", *two[len(COMMAND) :], env=ENVIRONMENT, timeout=200)
    assert codes == [0, 0], errors
    assert errors.count("student tiny: ") == 1  # rank 0 alone speaks
    same_figures(out, alone)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in alone.iterdir())

    record = json.loads((out / "run.json").read_text())
    assert record["world_size"] == 2
    (out / "run.json").write_text(json.dumps(record | {"state": "running"}))
    newest = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    (newest / "COMPLETE").unlink()
    line = run(command(per_device_train_batch_size=4, gradient_accumulation_steps=2), 1).stderr
    assert "blocks per optimizer step" in line
    assert "expected: 4; got: 8" in line
    errors = run(command(per_device_train_batch_size=2, gradient_accumulation_steps=2)).stderr
    assert "continuing from" in errors
    same_figures(out, alone)


@pytest.mark.parametrize("who", ["launcher", "rank 1"])
def test_sigterm_stops_all_ranks_after_the_same_step(caches, tmp_path, who):
    out = tmp_path / "run"
    command = arguments(caches / "train", out, max_steps=2000, save_steps=0, logging_steps=1)
    process = torchrun(command)
    wait_for(lambda: (out / "training_log.jsonl").exists() and len(log_of(out)) > 2, process)
    ranks = children(process.pid)
    os.kill(process.pid if who == "launcher" else ranks[-1], signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "terminated; nothing finished is lost" in errors, errors
    assert not any(map(is_alive, ranks))
    (checkpoint,) = out.glob("checkpoint-*/COMPLETE")
    step = int(checkpoint.parent.name.partition("-")[2])
    assert log_of(out)[-1]["step"] == step
    if who == "rank 1":
        assert "exitcode  : 143" in errors, errors  # torchrun may end the other while it exits by itself
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.parent.iterdir()}


def test_a_rank_that_is_killed_ends_the_other(caches, tmp_path):
    out = tmp_path / "run"
    process = torchrun(arguments(caches / "train", out, max_steps=2000, logging_steps=1))
    wait_for(lambda: (out / "training_log.jsonl").exists() and len(log_of(out)) > 2, process)
    ranks = children(process.pid)
    start = time.monotonic()
    os.kill(ranks[-1], signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert time.monotonic() - start < 60
    assert process.returncode != 0
    assert not any(map(is_alive, ranks))
    assert errors.count("error: another process of this run has ended") <= 1
    assert "gloo" not in errors


def test_variables_of_slurm_or_left_behind_are_no_launcher(caches, tmp_path):
    stale = ENVIRONMENT | {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "PMI_SIZE": "4", "WORLD_SIZE": "4"}
    command = arguments(caches / "train", tmp_path / "run", max_steps=1, eval_steps=0)
    result = warm.run("student", *command[len(COMMAND) :], env=stale, timeout=100)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 1


@pytest.mark.parametrize(("rank", "missing"), [(0, "rank 1, 2"), (1, "rank 0, which opens the meeting point")])
def test_processes_that_never_come_are_named(caches, tmp_path, monkeypatch, capfd, rank, missing):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("shared.distributed.JOIN_SECONDS", 1)
    line = refused(arguments(caches / "train", tmp_path / "run"))
    assert f"expected: 3 processes within 1 s (WORLD_SIZE); got: no sign of {missing}" in line
    assert capfd.readouterr().err == ""  # no stacks of torch's own client
    assert not (tmp_path / "run").exists()
