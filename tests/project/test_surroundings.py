"""What the surroundings of a command may be: its own folder as --out, other programs' environment, any locale."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from shared.cache.verify import verify_cache
from shared.cli import codedistill
from shared.errors import ConfigError, DistillError
from tests.support.cache_faults import file_size_limit
from tests.support.eval_models import save_model
from tests.support.student_cache import make_cache

PROGRAM = [sys.executable, "-P", "-m", "shared"]
NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TRAIN = ["--preset", "tiny", *(f"--set={s}" for s in ("max_steps=1", "save_steps=0", "block_size=48", "bf16=false"))]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A command line of `teacher build` without its --out."""
    folder = tmp_path_factory.mktemp("teacher")
    save_model(folder)
    rows = [{"text": f"def f{i}(a):\n    return a + {i}\n"} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["teacher", "build", "--teacher", str(folder), "--dataset", str(folder / "data.jsonl")]


def run(arguments, cwd, code=0, **environment):
    done = subprocess.run([*PROGRAM, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_the_working_directory_may_be_the_cache(build, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    built = CliRunner().invoke(codedistill, [*build, "--out", "."])
    assert f"recording offline in {tmp_path / 'wandb'}" in built.stderr
    assert verify_cache(folder) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "wandb"]
    assert "is up to date" in run([*build, "--out", "."], folder).stderr


def test_the_working_directory_may_be_a_run_and_an_export(tmp_path, monkeypatch):
    cache = make_cache(tmp_path / "caches" / "made")
    for name in ("runs/mine", "exports/mine"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path / "runs" / "mine")
    trained = CliRunner().invoke(codedistill, ["student", "train", "--cache", str(cache.path), "--out", ".", *TRAIN])
    assert trained.exit_code == 0, trained.exception
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mine", "wandb"]
    monkeypatch.chdir(tmp_path / "exports" / "mine")
    exported = CliRunner().invoke(codedistill, ["student", "export", "../../runs/mine", "--out", "."])
    assert exported.exit_code == 0, exported.exception
    assert "# mine\n" in (tmp_path / "exports" / "mine" / "README.md").read_text()
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "students train under DDP and FSDP only; where: ACCELERATE_USE_DEEPSPEED"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "under DDP and FSDP only; where: ACCELERATE_USE_MEGATRON_LM; got: 1"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "where: ACCELERATE_MIXED_PRECISION; expected: no; got: bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "where: ACCELERATE_DYNAMO_BACKEND; expected: no; got: INDUCTOR"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "where: ACCELERATE_MIXED_PRECISION; expected: no; got: fp8"),
    ],
)
def test_what_the_environment_asks_accelerate_for_is_refused(tmp_path, monkeypatch, name, value, words):
    cache = make_cache(tmp_path / "cache")
    monkeypatch.setenv(name, value)
    command = ["student", "train", "--cache", str(cache.path), "--out", str(tmp_path / "run"), *TRAIN]
    done = CliRunner().invoke(codedistill, command)
    assert isinstance(done.exception, ConfigError) and words in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_what_accelerate_launch_sets_by_default_is_no_obstacle(tmp_path, monkeypatch):
    cache = make_cache(tmp_path / "cache")
    defaults = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "USE_DEEPSPEED": "false"}
    for name, value in defaults.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    command = ["student", "train", "--cache", str(cache.path), "--out", str(tmp_path / "run"), *TRAIN]
    assert CliRunner().invoke(codedistill, command).exit_code == 0


def test_a_locale_without_utf8_writes_and_names_any_path(build, tmp_path):
    run([*build, "--out", "zwölf/caché"], tmp_path, **NO_UTF8)
    assert verify_cache(tmp_path / "zwölf" / "caché") == []
    assert "zwölf/caché is up to date" in run([*build, "--out", "zwölf/caché"], tmp_path, **NO_UTF8).stderr
    assert "where: weg/ü" in run(["cache", "info", "weg/ü"], tmp_path, code=1, **NO_UTF8).stderr


def test_a_path_that_is_not_utf8_is_refused_before_any_work(build, tmp_path):
    done = run([*build, "--out", b"caf\xe9"], tmp_path, code=1)
    assert done.stderr == r"error: a path to write to is not UTF-8; where: --out; got: 'caf\udce9'" + "\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (3_000_000, "got: Error while serializing: I/O error: File too large"),  # of the weights, 6.5 MB
        (8_000_000, "got: [enforce fail at inline_container.cc"),  # of the optimizer's state, 13 MB
    ],
)
def test_a_disk_that_cannot_hold_a_checkpoint_is_one_line_and_the_run_goes_on_later(tmp_path, limit, words):
    cache, run = make_cache(tmp_path / "cache"), tmp_path / "run"
    command = ["student", "train", "--cache", str(cache.path), "--out", str(run), *TRAIN, "--set=save_steps=1"]
    with file_size_limit(limit):
        done = CliRunner().invoke(codedistill, command)
    assert type(done.exception) is DistillError
    assert f"a checkpoint cannot be saved; where: {run / 'checkpoint-1'}; {words}" in str(done.exception)
    assert CliRunner().invoke(codedistill, command).exit_code == 0
