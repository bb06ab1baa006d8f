"""`student proof` as a real process: killed, continued, and held against its settings."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from shared.errors import CacheMismatchError, ConfigError, ResumeError
from shared.files import read_json
from shared.process import own_command
from stage1_teacher.cli import teacher as teacher_command
from stage2_student.experiments.proof import prove
from stage2_student.experiments.proof_plan import read_plan
from stage2_student.experiments.proof_run import train_member
from tests.support.eval_models import save_model

PLAN = """
learning_rates = [1e-3, 1e-2]
search_seed = 0
seeds = [1, 2]
[student]
preset = "tiny"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
block_size = 64
per_device_train_batch_size = 2
num_train_epochs = 3
bf16 = false
[[arm]]
name = "cross-entropy"
alpha = 0.0
[[arm]]
name = "ghost"
k = 4
[[arm]]
name = "dense"
dense = true
versus = ["ghost"]
"""
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher, its three caches and a plan."""
    folder = tmp_path_factory.mktemp("proof")
    save_model(folder / "teacher")
    for name, count in (("train", 24), ("validation", 5), ("test", 7)):
        rows = [{"prompt": f"# {name} {i}", "completion": f"\nx = {i}\n" + "y = x\n" * (i % 9)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ["--dataset", folder / f"{name}.jsonl", "--out", folder / name, "--dtype", "bfloat16"]
        done = CliRunner().invoke(teacher_command, ["build", "--teacher", *map(str, [folder / "teacher", *options])])
        assert done.exit_code == 0, done.exception
    (folder / "plan.toml").write_text(PLAN)
    return folder


def arguments(made):
    return (made / "plan.toml", made / "train", made / "validation", made / "test", made / "out")


def start(made):
    plan, train, validation, test, out = map(str, arguments(made))
    command = own_command("student", "proof", "--cache", train, "--validation", validation)
    command += ["--test", test, "--config", plan, "--teacher", str(made / "teacher"), "--out", out]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def times(made):
    return {path.name: path.stat().st_mtime_ns for path in (made / "out" / "members").glob("*.json")}


def children_of(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def proved(made):
    """Killed after its first members, then run to its end: the files there were at the kill, and the output."""
    process = start(made)
    deadline = time.monotonic() + 120
    while len(times(made)) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.01)
    before = times(made)
    again = start(made)
    output, errors = again.communicate(timeout=200)
    assert again.returncode == 0, errors
    return before, output


def test_what_was_finished_at_the_kill_is_kept(made, proved):
    before, output = proved
    after = times(made)
    assert len(before) >= 3 and len(after) == 6 + 6
    assert {name: after[name] for name in before} == before
    result = read_json(made / "out" / "proof.json")
    assert output.splitlines() == result["summary"]
    assert {path.name for path in (made / "out").iterdir()} == {
        "members", "settings.json", "proof.json", "proof.md", "proof.svg",
    }  # fmt: skip
    assert set(result["settings"]["caches"]) == {"train", "validation", "test"}


def test_arms_of_a_seed_are_pairs_and_trials_never_see_the_test_set(made, proved):
    result = read_json(made / "out" / "proof.json")
    for seed in (1, 2):
        members = [member for member in result["members"] if member["seed"] == seed]
        assert [member["arm"] for member in members] == ["cross-entropy", "ghost", "dense"]
        for key in ("initial_weights_sha256", "data_order_sha256", "steps"):
            assert len({member[key] for member in members}) == 1, key
    assert len({member["initial_weights_sha256"] for member in result["members"]}) == 2
    assert not any("test" in key for trial in result["search"] for key in trial)
    assert all(len(trial["validation_nll_nats"]) == 3 for trial in result["search"])
    plan, train, validation, _, out = arguments(made)
    trial = read_plan(plan).search()[2]
    again = train_member(trial, train, validation, made / "no-such-cache", made / "none", out)
    then = next(t for t in result["search"] if (t["arm"], t["learning_rate"]) == ("ghost", trial.learning_rate))
    assert again | {"seconds": 0} == then | {"seconds": 0}  # in another process, and bit for bit


def test_a_finished_proof_is_left_alone_and_other_settings_are_refused(made, proved, tmp_path):
    before = times(made)
    result = prove(*arguments(made), teacher=made / "teacher")
    assert times(made) == before
    assert result["arms"] == read_json(made / "out" / "proof.json")["arms"]
    plan, train, validation, test, out = arguments(made)
    (tmp_path / "plan.toml").write_text(PLAN.replace("num_train_epochs = 3", "num_train_epochs = 2"))
    with pytest.raises(ResumeError, match="other settings"):
        prove(tmp_path / "plan.toml", train, validation, test, out, teacher=made / "teacher")
    with pytest.raises(ConfigError, match="share a document"):
        prove(plan, train, validation, train, tmp_path / "new", teacher=made / "teacher")
    with pytest.raises(ConfigError, match="needs the teacher"):
        prove(plan, train, validation, test, tmp_path / "new")
    save_model(tmp_path / "other", seed=1)
    with pytest.raises(CacheMismatchError, match="not those of the cache"):
        prove(plan, train, validation, test, tmp_path / "new", teacher=tmp_path / "other")
