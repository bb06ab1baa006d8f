"""Durable files, strict JSON, ranks and exit codes."""

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from shared import errors, files, process, progress

CLI = """
import click, os, signal, time
from shared.errors import ConfigError
from shared.process import run_cli

@click.command()
@click.argument("what")
def command(what):
    if what == "domain":
        raise ConfigError("a thing is wrong", where="here", expected=1, got=2, fix="mend it")
    if what == "bug":
        raise KeyError("a bug")
    if what == "memory":
        import torch
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 80 GiB")
    if what == "wait":
        print("ready", flush=True)
        time.sleep(60)

run_cli(command)
"""


def run(*arguments):
    return subprocess.run([sys.executable, "-c", CLI, *arguments], capture_output=True, text=True, timeout=60)


def test_exit_codes_and_one_line_per_domain_error():
    assert run("done").returncode == 0
    domain = run("domain")
    assert domain.returncode == 1
    assert domain.stderr == "error: a thing is wrong; where: here; expected: 1; got: 2; fix: mend it\n"
    usage = run()
    assert usage.returncode == 2 and "Missing argument" in usage.stderr
    bug = run("bug")
    assert bug.returncode == 1 and "Traceback" in bug.stderr and "KeyError" in bug.stderr


def test_a_device_without_memory_is_one_line_that_says_what_to_lower():
    found = run("memory")
    assert (found.returncode, found.stderr.count("\n")) == (1, 1)
    assert found.stderr.startswith("error: the device has too little memory; got: CUDA out of memory; fix: in training")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_code_and_no_traceback(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", CLI, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert len(stderr.strip().splitlines()) == 1 and "the same command continues" in stderr


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_json_is_strict_both_ways(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "f.json", {"loss": float("nan")})
    (tmp_path / "f.json").write_text('{"loss": NaN}')
    with pytest.raises(errors.ConfigError, match="NaN is not JSON"):
        files.read_json(tmp_path / "f.json")
    files.write_json(tmp_path / "f.json", {"text": "ü\u2028", "n": None})
    assert files.read_json(tmp_path / "f.json") == {"text": "ü\u2028", "n": None}


def test_canonical_digest_ignores_key_order_alone():
    assert files.sha256_json({"a": 1, "b": 2}) == files.sha256_json({"b": 2, "a": 1})
    assert files.sha256_json({"a": 1}) != files.sha256_json({"a": 1.5})


def test_slurm_variables_without_a_launcher_are_not_a_distributed_run(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert (process.rank(), process.world_size()) == (0, 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert (process.rank(), process.world_size()) == (1, 2)


def test_progress_counts_and_says_how_fast(capsys):
    with progress.progress("Working", 10, "tokens") as bar:
        bar.advance(4)
        bar.advance(6)
        time.sleep(0.01)
    assert bar.done == 10
    assert "Working: 10 tokens in" in capsys.readouterr().err


def test_errors_survive_a_process_border():
    error = errors.CacheCorruptError("broken", where="shard 3", got="x")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.CacheCorruptError and str(copy) == str(error) and isinstance(copy, OSError)


def test_the_error_tree_inherits_builtins():
    pairs = {
        errors.ConfigError: ValueError,
        errors.CacheFormatError: ValueError,
        errors.CacheCorruptError: OSError,
        errors.CacheMismatchError: ValueError,
        errors.ResumeError: RuntimeError,
        errors.NonFiniteLossError: RuntimeError,
        errors.SandboxError: RuntimeError,
    }
    assert all(issubclass(ours, builtin) and issubclass(ours, errors.DistillError) for ours, builtin in pairs.items())


def test_click_is_only_imported_when_a_command_runs():
    code = "import sys, shared.process, shared.progress; assert not {'click', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("module", ["click", "shared.cli", "stage2_student.cli", "h5py"])
def test_a_signal_while_modules_are_imported_is_one_line(tmp_path, number, code, module):
    """Sent at the very moment in which a module is looked for."""
    program = f"""
import os, sys
class Finder:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Finder)
sys.argv = ["codedistill", "student", "train", "--cache", {str(tmp_path)!r}, "--out", {str(tmp_path / "run")!r}]
from shared.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.strip().splitlines()  # click ends the terminal's line of ^C first
    assert line.startswith("interrupted" if number == signal.SIGINT else "terminated")


@pytest.mark.parametrize(
    ("variables", "want"),
    [
        ({}, "expandable_segments:True None"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native None"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None backend:native"),
    ],
)
def test_cuda_memory_grows_in_segments_unless_the_user_says_otherwise(variables, want):
    code = (
        "import os, click\nfrom shared.process import run_cli\n@click.command()\ndef show():\n"
        "    print(*map(os.environ.get, ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF')))\nrun_cli(show)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")} | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == want
