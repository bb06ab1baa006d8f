"""A working directory that holds modules of the user's own, named as ours are: they are never imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.student_cache import make_cache

BIN = Path(sys.executable).parent
NAMES = ("data", "stage1_teacher", "stage2_student", "shared", "torch")
FIXED = {"preset": "tiny", "block_size": 48, "max_steps": 2, "save_steps": 0, "bf16": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's: a module or a package of every name, each of which ends the process that imports it."""
    folder = tmp_path_factory.mktemp("user")
    for number, name in enumerate(NAMES):
        file = folder / f"{name}.py" if number % 2 == 0 else folder / name / "__init__.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"raise SystemExit('the {name} of the user was imported')\n")
    make_cache(folder / "cache")
    grid = "".join(f"{key} = {json.dumps(value)}\n" for key, value in FIXED.items()) + "[grid]\nalpha = [0.0]\n"
    (folder / "grid.toml").write_text(grid)
    return folder


def run(folder, *command):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "of the user was imported" not in done.stdout + done.stderr


def test_the_modules_would_be_imported(folder):
    done = subprocess.run([sys.executable, "-c", "import data"], cwd=folder, capture_output=True, text=True)
    assert done.stderr == "the data of the user was imported\n"


def test_the_command(folder):
    run(folder, "codedistill", "cache", "info", "cache")


def test_the_runs_of_a_sweep(folder):
    run(folder, "codedistill", "student", "sweep", "--grid", "grid.toml", "--cache", "cache", "--out", "sweep")
    (row,) = json.loads((folder / "sweep" / "sweep.json").read_text())["runs"]
    assert row["state"] == "finished"


def test_torchrun_as_the_readme_starts_it(folder):
    assigned = [f"--set={key}={json.dumps(value)}" for key, value in FIXED.items()]
    launcher = ["torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", "codedistill"]
    run(folder, *launcher, "student", "train", "--cache", "cache", "--out", "run", *assigned)
    record = json.loads((folder / "run" / "run.json").read_text())
    assert (record["state"], record["world_size"]) == ("finished", 2)
