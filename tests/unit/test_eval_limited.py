"""Running programs: verdicts come from the test alone."""

import os
import signal
from pathlib import Path

import pytest

from shared.errors import SandboxError
from shared.eval.sandbox import limited
from shared.eval.sandbox.limited import Candidate, run_candidate, run_candidates

TEST = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(41) == 42\n"


def candidate(body, test=TEST):
    return Candidate(program=f"def f(x):\n{body}", test=test, entry_point="f")


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("    return x + 1\n", "passed"),
        ("    return x\n", "failed"),
        ("    return (x + 1\n", "failed"),
        ("    return x + 1\ndel f\n", "failed"),
        ("    return 0\nimport sys\nsys.exit(0)\n", "failed"),
        ("    raise SystemExit(0)\n", "failed"),
        ("    class E(BaseException): pass\n    raise E('passed')\n", "failed"),
        ("    return 0\nimport os\nos._exit(0)\n", "killed"),
        ("    print('[\"passed\"]')\n    import os; os._exit(0)\n", "killed"),
        ('    import os\n    os.write(int(__import__(\'sys\').argv[1]), b\'["x", "passed", "", true]\')\n', "killed"),
        ("    import ctypes\n    ctypes.string_at(0)\n", "killed"),
        ("    b = b'x' * (10 << 30)\n    return x + 1\n", "failed"),
        ("    return f(x) + 1\n", "failed"),
        ("    for _ in range(200): print('A' * 65536)\n    return x + 1\n", "passed"),
        ("    return x + 1\nimport os, sys\nsys.stdout.close(); os.close(2)\n", "passed"),
        ("    return x + 1\nif __name__ == '__main__':\n    print(f(int(input())))\n", "passed"),
        ("    with open('big', 'w') as file: file.write('x')\n    return x + 1\n", "failed"),
    ],
)
def test_verdicts(body, verdict):
    assert run_candidate(candidate(body), timeout_seconds=20).verdict == verdict


def test_order_and_time_outs():
    loop = candidate("    while True: pass\n")
    verdicts = run_candidates([candidate("    return x + 1\n"), loop, candidate("    return x\n")], timeout_seconds=1.5)
    assert [v.verdict for v in verdicts] == ["passed", "timed out", "failed"]
    assert run_candidates([]) == []


def test_a_time_out_leaves_no_process_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(limited.tempfile, "tempdir", str(tmp_path))
    body = "    import os, time\n    if os.fork() == 0: os.setpgid(0, os.getpgrp())\n    time.sleep(60)\n"
    assert run_candidate(candidate(body), timeout_seconds=1.5).verdict == "timed out"
    assert processes_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def processes_in(folder):
    """Processes that work in a folder below this one, also where it is removed already."""
    return [link for link in Path("/proc").glob("[0-9]*/cwd") if readlink(link).startswith(str(folder))]


def readlink(path):
    try:
        return str(path.readlink())
    except OSError:
        return ""


def test_the_environment_is_clean(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "secret")
    body = "    import os\n    return x + 1 if 'SECRET_KEY' not in os.environ and os.listdir() == [] else 0\n"
    assert run_candidate(candidate(body), timeout_seconds=20).verdict == "passed"


def test_isolated_programs_reach_neither_network_nor_other_processes():
    if not run_candidate(candidate("    return x + 1\n"), timeout_seconds=20).isolated:
        pytest.skip("this kernel forbids user namespaces")
    network = "    import socket\n    socket.create_connection(('127.0.0.1', 9), 0.5)\n"
    assert "unreachable" in run_candidate(candidate(network), timeout_seconds=20).detail
    kill = f"    import os\n    os.kill({os.getpid()}, {int(signal.SIGTERM)})\n    return x + 1\n"
    assert "ProcessLookupError" in run_candidate(candidate(kill), timeout_seconds=20).detail


def test_the_test_may_use_names_of_the_program_and_mutation_counts():
    test = "def check(candidate):\n    xs = [2, 1]\n    candidate(xs)\n    assert xs == [1, 2] and helper() == 3\n"
    program = "def helper():\n    return 3\ndef f(xs):\n    xs.sort()\n"
    assert run_candidate(Candidate(program=program, test=test, entry_point="f"), timeout_seconds=20).verdict == "passed"


def test_a_harness_that_cannot_start_is_an_error_not_a_failure(monkeypatch):
    monkeypatch.setattr(limited, "_INTERPRETER", ["/nonexistent/python"])
    assert run_candidate(candidate("    return x + 1\n")).verdict == "error"
    with pytest.raises(SandboxError):
        run_candidates([candidate("    return x + 1\n")])
