"""`student sweep` on a small cache: killed, continued, with a run that fails."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from shared.errors import ConfigError
from shared.eval.fidelity.measure import evaluate_fidelity
from stage2_student.cli import student
from tests.support import warm
from tests.support.student_cache import make_cache
from tests.support.wandb_runs import wandb_runs

ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}
FIXED = """
preset = "tiny"
block_size = 48
per_device_train_batch_size = 2
max_steps = 12
save_steps = 5
bf16 = false
"""
FOUR = f"""{FIXED}
[grid]
alpha = [0.0, 1.0]
[[run]]
divergence = "reverse"
hidden_size = 24
num_attention_heads = 2
num_key_value_heads = 1
[[run]]
learning_rate = 1e30
"""
SMALL = "divergence=reverse,hidden_size=24,num_attention_heads=2,num_key_value_heads=1"
FAILING = "learning_rate=1e+30"


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    make_cache(folder / "train")
    make_cache(folder / "validation", seed=1, lengths=(30, 20, 10, 5))
    return folder


def arguments(caches, folder, grid, *options):
    (folder / "grid.toml").write_text(grid)
    return [
        f"--cache={caches / 'train'}", f"--validation={caches / 'validation'}", f"--grid={folder / 'grid.toml'}",
        f"--out={folder / 'sweep'}", *options,
    ]  # fmt: skip


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes_naming(folder):
    """Command lines of live processes that were given this folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found += [line for line in [file.read_bytes().decode()] if str(folder) in line]
    return found


def test_a_sweep_killed_continued_with_a_failing_run_and_run_again(caches, tmp_path):
    sweep = tmp_path / "sweep"
    command = ["student", "sweep", *arguments(caches, tmp_path, FOUR, "--jobs=2")]
    process = warm.Command(*command, env=ENVIRONMENT)
    wait_for((sweep / "alpha=1.0" / "checkpoint-5" / "COMPLETE").exists)
    process.kill()
    process.wait()

    offline = ENVIRONMENT | {"WANDB_MODE": "offline"}
    done = warm.run(*command, env=offline, timeout=200)
    assert processes_naming(sweep) == []
    assert done.returncode == 1, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: 1 of 4 runs are not finished; where: {sweep}; got: {FAILING}: ")
    assert "not finite" in error and f"see {FAILING}.log" in error
    assert "continuing from" in (sweep / "alpha=1.0.log").read_text()
    rows = json.loads((sweep / "sweep.json").read_text())["runs"]
    assert {row["name"]: row["state"] for row in rows} == {
        "alpha=0.0": "finished", "alpha=1.0": "finished", SMALL: "finished", FAILING: "failed"
    }  # fmt: skip
    assert rows[-1]["name"] == FAILING and rows[-1]["nll_nats"] is None
    assert rows[-1]["reasons"]["nll_nats"] == "not trained yet"
    assert [row["nll_nats"] for row in rows[:-1]] == sorted(row["nll_nats"] for row in rows[:-1])
    for row in rows[:-1]:
        record = json.loads((sweep / row["name"] / "run.json").read_text())
        known = evaluate_fidelity(sweep / row["name"], caches / "validation", dtype="float32", batch_tokens=64)
        assert row["nll_nats"] == pytest.approx(known.nll_nats, rel=1e-5)
        assert row["nll_nats"] == pytest.approx(record["metrics"]["eval_ce"], rel=1e-5)
        assert row["kl_to_teacher_nats"] == pytest.approx(known.kl_to_teacher_nats, rel=1e-5)
        assert row["reasons"] == {}
        assert (row["parameters"], row["steps"]) == (record["parameters"], 12)
    assert len({row["parameters"] for row in rows[:-1]}) == 2
    assert (sweep / "sweep.md").read_text().partition("\n\n")[2] in done.stderr
    assert (sweep / "sweep.svg").read_text().count("<svg") == 1
    runs = wandb_runs(sweep)
    assert runs[FAILING] == ("sweep", 1)
    assert runs[SMALL] == ("sweep", 0)

    before = {path: path.stat().st_mtime_ns for row in rows for path in (sweep / row["name"]).rglob("*")}
    options = arguments(caches, tmp_path, FOUR.partition("[[run]]\nlearning_rate")[0])
    again = CliRunner().invoke(student, ["sweep", *options])
    assert again.exit_code == 0, again.output
    assert json.loads((sweep / "sweep.json").read_text())["runs"] == rows[:-1]
    assert before == {path: path.stat().st_mtime_ns for row in rows for path in (sweep / row["name"]).rglob("*")}
    options = arguments(caches, tmp_path, FOUR.replace("12", "13"))
    error = CliRunner().invoke(student, ["sweep", *options]).exception
    assert isinstance(error, ConfigError) and "another max_steps" in str(error)


def test_settings_with_several_seeds_are_compared_with_the_first(caches, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    warm.fork_students(monkeypatch)
    variants = '[[variant]]\nname = "ce"\nalpha = 0.0\n[[variant]]\nname = "ghost"\n'
    text = f"{FIXED.replace('12', '2')}\n[grid]\nseed = [1, 2]\n{variants}"
    done = CliRunner().invoke(student, ["sweep", *arguments(caches, tmp_path, text, "--jobs=2")])
    assert done.exit_code == 0, done.exception
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    nll = {(row["setting"], row["seed"]): row["nll_nats"] for row in result["runs"]}
    (row,) = result["comparisons"]
    assert (row["setting"], row["versus"]) == ("ghost", "ce")
    differences = [nll["ghost", seed] - nll["ce", seed] for seed in (1, 2)]
    assert row["difference"] == pytest.approx(sum(differences) / 2)
    assert row["p_holm"] == row["p"]
    assert f"| ghost   | ce     | {row['difference']:+.4f}" in done.output.replace("**", "")
    assert (tmp_path / "sweep" / "sweep.md").read_text().partition("\n\n")[2] == done.stdout


def test_a_sweep_says_before_it_trains_that_nothing_will_be_scored(caches, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    warm.fork_students(monkeypatch)
    grid = f"{FIXED.replace('12', '1')}[grid]\nalpha = [0.0]\n"
    options = [option for option in arguments(caches, tmp_path, grid) if not option.startswith("--validation")]
    done = CliRunner().invoke(student, ["sweep", *options])
    assert done.exit_code == 0, done.exception
    assert done.stderr.startswith("no --validation cache is given: students are trained, but neither scored nor ranked")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_sweep_and_its_processes(caches, tmp_path, number, code):
    sweep = tmp_path / "sweep"
    options = arguments(caches, tmp_path, f"{FIXED}\n[grid]\nseed = [4, 5]\n")
    process = warm.Command("student", "sweep", *options, env=ENVIRONMENT)
    wait_for((sweep / "seed=4.log").exists)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors.endswith("nothing finished is lost, the same command continues\n")
    assert processes_naming(sweep) == []
    assert not (sweep / "seed=5.log").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("temperature = 3.0", "temperature one of 0.5, 1, 1.5, 2"),
        ("k = 7", "k at most 6"),
        ('lr_scheduler_type = "zigzag"', "zigzag"),
        ('loss = "sampled"', "needs sampled targets"),
        ('loss = "dense"', "needs the teacher's full distribution"),
    ],
)
def test_a_run_that_does_not_fit_the_cache_is_refused_before_any_is_trained(caches, tmp_path, change, words):
    options = arguments(caches, tmp_path, f"{FIXED}\n[[run]]\nseed = 1\n[[run]]\n{change}\n")
    error = CliRunner().invoke(student, ["sweep", *options]).exception
    assert isinstance(error, ConfigError)
    assert words in str(error) and change.partition(" ")[0] in str(error)
    assert not (tmp_path / "sweep").exists()
