"""Programs in isolation: the right verdict for honest ones, none passed for hostile ones, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from data.humaneval import load_humaneval
from shared.errors import SandboxError
from shared.eval.sandbox import probe, runner
from shared.eval.sandbox.policy import Isolation
from shared.eval.sandbox.runner import Candidate, Sandbox, open_sandbox, run_candidates
from shared.eval.sandbox.worker import Worker
from tests.support.sandbox_programs import REFUSED, attack_rows, honest_rows, hostile_rows, program, wrong

SLOW = 10.0  # seconds: other tests may be running


def sandbox_or_skip():
    try:
        return open_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def sandbox():
    return sandbox_or_skip()


def test_honest_programs_get_their_verdict(sandbox):
    assert wrong(honest_rows(), sandbox, SLOW) == []


def test_hostile_programs_get_theirs(sandbox):
    endless = [row for row in hostile_rows(slow=True) if row[0] in ("signals ignored", "sleeps at load")]
    assert wrong(hostile_rows(slow=False), sandbox, SLOW) == []
    assert wrong(endless, sandbox, 0.5) == []


def test_attacks_by_the_sandboxs_own_parts_reach_what_refuses_them(sandbox):
    """One that relies on a part that has been renamed fails of itself, with another detail."""
    names, candidates, details = zip(*attack_rows(), strict=True)
    verdicts = run_candidates(candidates, sandbox=sandbox, timeout_seconds=SLOW)
    found = {name: (v.verdict, v.detail) for name, v in zip(names, verdicts, strict=True)}
    assert found == {name: ("failed", detail) for name, detail in zip(names, details, strict=True)}


def test_canonical_solutions_all_pass_and_empty_completions_all_fail(sandbox):
    rows = []
    for problem in load_humaneval():
        for completion, right in ((problem.canonical_solution, "passed"), ("", "failed")):
            candidate = Candidate(
                prompt=problem.prompt, completion=completion, test=problem.test, entry_point=problem.entry_point
            )
            rows.append((problem.task_id, candidate, [right]))
    assert wrong(rows[::3], sandbox, 15.0) == []


def test_what_shares_the_checkers_process_cannot_upset_others(sandbox):
    """Such a program may forge its own verdict, but no word of it is anything else."""
    writes = [
        b'["killed", 5]\n',
        b"[" * 60_000 + b"\n",
        b'[["killed"], 5]\n',
        b'["perfect", "x"]\n',
        b"[null, null]\n",
    ]
    bodies = [f"    return 0\nimport os, time\nos.write(3, {data!r})\ntime.sleep(9)\n" for data in writes]
    rows = [program(body, same_process=True) for body in bodies]
    verdicts = run_candidates([*rows, program("    return x + 1\n")], sandbox=sandbox, timeout_seconds=SLOW)
    assert [v.verdict for v in verdicts[:-1]] == ["failed"] * len(writes)
    assert {v.detail for v in verdicts[:-1]} == {"the program wrote something into the checker's pipe"}
    assert verdicts[-1].verdict == "passed"


def test_a_flood_of_notes_is_not_kept(sandbox):
    flood = "    return 0\nimport os\nwhile True: os.write(3, b'xy\\n' * 20_000)\n"
    tracemalloc.start()
    (verdict,) = run_candidates([program(flood, same_process=True)], sandbox=sandbox, timeout_seconds=1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert verdict.verdict == "timed out"
    assert peak < 8 << 20


def test_asserts_and_loading_are_told_apart(sandbox):
    test = "def check(candidate):\n    for i in range(3): assert candidate(i) == i + 1\n    assert candidate(9) == 9\n"
    bodies = ("    return x + 1\n", "    return 9\n", "    return x +\n", "    return 1 // x\n", "    return x or 1\n")
    verdicts = run_candidates([program(body, test) for body in bodies], sandbox=sandbox, timeout_seconds=SLOW)
    assert [(v.verdict, v.loaded, v.asserts_passed) for v in verdicts] == [
        ("failed", True, 3),
        ("failed", True, 1),
        ("failed", False, 0),
        ("failed", True, 0),
        ("failed", True, 2),
    ]
    caught = (
        "def check(candidate):\n    try:\n        assert candidate(1) == 1\n    except AssertionError:\n        pass\n"
    )
    assert run_candidates([program(bodies[0], caught)], sandbox=sandbox, timeout_seconds=SLOW)[0].verdict == "passed"


def test_a_test_that_uses_the_programs_names_is_our_error_unless_in_one_process(sandbox):
    test = "def check(candidate):\n    assert candidate(lambda: 1) == 1\n    assert candidate(one) == 1\n"
    body = "    return x()\ndef one():\n    return 1\n"
    apart, together = run_candidates(
        [program(body, test), program(body, test, same_process=True)], sandbox=sandbox, timeout_seconds=SLOW
    )
    assert apart.verdict == "error" and "name 'one' is not defined" in apart.detail
    assert (together.verdict, together.asserts_passed) == ("passed", 2)
    assert "forgeable" in together.detail


def test_what_messages_take_is_no_time_of_the_program(sandbox):
    """Calls of the program and large arguments, each for longer than the limit."""
    limit = 0.3
    calls = "def check(candidate):\n    for i in range(12000): assert candidate(i) == i + 1\n"
    large = (
        "TEXTS = [str(v) for v in range(20000)]\ndef check(candidate):\n"
        "    for i in range(60): assert candidate(list(TEXTS)) == 20000\n"
    )
    rows = [program("    return x + 1\n", calls), program("    return len(x)\n", large)]
    verdicts = run_candidates(rows, sandbox=sandbox, timeout_seconds=limit, workers=1)
    assert [v.verdict for v in verdicts] == ["passed"] * 2
    assert verdicts[0].seconds > limit


def test_messages_put_no_deadline_off_for_good_and_calls_by_the_program_for_less(sandbox):
    asleep = program("    x(1)\n    while True: pass\n", "def check(candidate):\n    candidate(lambda v: v)\n")
    calls = program("    while True: x()\n", "def check(candidate):\n    candidate(lambda: None)\n")
    is_called = program("    return x\n", "def check(candidate):\n    while True: candidate(1)\n")
    with Worker(sandbox.isolation) as worker:
        found = [worker.run(candidate, 0.2) for candidate in (asleep, calls, is_called)]
    assert [verdict.verdict for verdict in found] == ["timed out"] * 3
    assert found[0].seconds < found[1].seconds < found[2].seconds


def test_what_the_test_keeps_is_not_gone_through_in_full_for_each_call(sandbox):
    kept = (
        "def check(candidate):\n    kept = [candidate(i) for i in range(1000)]\n"
        "    assert kept == [[i] for i in range(1000)]\n"
    )
    inputs = (
        "ALL = [[[i, 3, 2, i]] for i in range(600)]\n"
        "def check(candidate):\n    for v in ALL: assert candidate(*v) == sorted(v[0])\n"
    )
    rows = [program("    return [x]\n", kept), program("    return sorted(x)\n", inputs)]
    verdicts = run_candidates(rows, sandbox=sandbox, timeout_seconds=3.0)
    assert [v.verdict for v in verdicts] == ["passed"] * 2


def test_the_detail_can_be_printed(sandbox):
    (verdict,) = run_candidates([program("    raise ValueError('\\ud800')\n")], sandbox=sandbox, timeout_seconds=SLOW)
    assert verdict.detail == "ValueError: ?"


def test_a_broken_test_is_our_error(sandbox):
    tests = ("def check(candidate):\n    assert (\n", "x = 1\n")
    verdicts = run_candidates([program("    return 1\n", t) for t in tests], sandbox=sandbox, timeout_seconds=SLOW)
    assert [v.verdict for v in verdicts] == ["error", "error"]


# HumanEval+'s and MBPP+'s tests as they are published, but for their inputs and results.
PLUS = """
import numpy as np

def is_floats(x) -> bool:
    # check if it is float; List[float]; Tuple[float]
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False


def assertion(out, exp, atol):
    exact_match = out == exp

    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match

"""
HUMANEVAL_PLUS = """
def check(candidate):
    inputs = {inputs}
    results = {results}
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, 0)
"""
MBPP_PLUS = """
inputs = {inputs}
results = {results}

for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion(f(*inp), exp, 0)
"""


@pytest.mark.parametrize("form", [HUMANEVAL_PLUS, MBPP_PLUS], ids=["HumanEval+", "MBPP+"])
def test_published_plus_tests_run_with_numpy(form, sandbox):
    means = PLUS + form.format(inputs=[[[1.0, 2.0]], [[1.0, 2.0, 4.0, 4.0]]], results=[1.5, 2.75])
    shared = PLUS + form.format(inputs=[[(3, 4, 5)], [()]], results=[(3, 5), ()])
    near = "    import math\n    return math.fsum(x) / len(x) + 1e-9\n"
    lie = "    class F(float): __sub__ = __rsub__ = __abs__ = lambda *_: 0.0\n    return F(9)\n"
    rows = [
        ("near", program(near, means), ["passed"]),
        ("far", program("    return 1.5\n", means), ["failed"]),
        ("a lie", program(lie, means), ["failed"]),
        ("tuples", program("    return tuple(v for v in x if v % 2)\n", shared), ["passed"]),
        ("lists", program("    return [v for v in x if v % 2]\n", shared), ["failed"]),
        ("has none", program("    import numpy\n    return 0\n", means), ["failed"]),
        ("an array", program("    return x\n", PLUS + "def check(f):\n    f(np.zeros(2))\n"), ["error"]),
    ]
    assert wrong(rows, sandbox, SLOW) == []


def test_without_numpy_a_test_that_imports_it_is_an_error(sandbox, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    test = PLUS + HUMANEVAL_PLUS.format(inputs=[[1]], results=[2])
    (verdict,) = run_candidates([program("    return x\n", test)], sandbox=sandbox, timeout_seconds=SLOW)
    assert (verdict.verdict, verdict.detail) == (
        "error",
        "the test imports what the sandbox does not have: ModuleNotFoundError: No module named 'numpy'",
    )


def test_where_namespaces_are_forbidden_the_other_layers_hold(monkeypatch):
    monkeypatch.setattr(probe, "CHOICES", (Isolation.WITHOUT_NAMESPACES,))
    sandbox = sandbox_or_skip()
    assert wrong(hostile_rows(slow=False)[::3] + honest_rows()[::4], sandbox, SLOW) == []
    assert sandbox.description == {"isolation": "Landlock, seccomp", "unsafe_no_sandbox": False}


def test_without_isolation_it_refuses_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(probe, "CHOICES", ())
    with pytest.raises(SandboxError, match="--unsafe-no-sandbox"):
        open_sandbox()
    sandbox = open_sandbox(unsafe=True)
    assert sandbox.description == {"isolation": "none", "unsafe_no_sandbox": True}
    rows = [("right", program("    return x + 1\n"), ["passed"]), ("wrong", program("    return x\n"), ["failed"])]
    assert wrong(rows, sandbox, SLOW) == []


def test_layers_that_leak_are_not_taken(monkeypatch):
    monkeypatch.setattr(probe, "CHOICES", (Isolation.NONE,))
    monkeypatch.setattr(probe, "attempts", lambda: {"a socket": program(REFUSED["abstract sockets"])})
    with pytest.raises(SandboxError, match="none: not refused: a socket"):
        open_sandbox()


def test_other_systems_are_told_that_there_is_none(monkeypatch):
    fake = "import sys; sys.platform = 'darwin'; from shared.eval.sandbox.runner import open_sandbox; open_sandbox()"
    done = subprocess.run([sys.executable, "-c", fake], capture_output=True, text=True, timeout=120)
    assert "no sandbox can be had here" in done.stderr


def test_a_dying_server_is_replaced_and_fails_no_program(sandbox):
    with Worker(sandbox.isolation) as worker:
        worker.wait_ready()
        worker._process.kill()
        worker._process.wait()
        assert worker.run(program("    return x + 1\n"), SLOW).verdict == "passed"


def test_a_server_that_cannot_start_is_an_error(sandbox, monkeypatch):
    with Worker(sandbox.isolation) as worker:
        worker.wait_ready()
        monkeypatch.setattr("shared.eval.sandbox.worker._INTERPRETER", ("/nonexistent/python",))
        worker._process.kill()
        assert worker.run(program("    return x + 1\n"), SLOW).verdict == "error"
        with pytest.raises(SandboxError, match="cannot be started"):
            run_candidates([program("")], sandbox=sandbox, timeout_seconds=1)
        monkeypatch.undo()
        worker._start()


def test_sixteen_workers_on_few_processors_fail_no_program(sandbox):
    right = ("right", program("    return x + 1\n"), ["passed"])
    rows = [right, ("wrong", program("    return x\n"), ["failed"])] * 32
    assert wrong(rows, sandbox, 3.0, workers=16) == []


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_runner_leaves_no_process(sandbox, sent):
    marker = f"OMP_NUM_THREADS={os.getpid()}{int(sent)}"
    code = f"""
import shared.eval.sandbox.worker as worker
worker._ENVIRONMENT |= dict([{marker!r}.split("=")])
from shared.eval.sandbox.policy import Isolation
from shared.eval.sandbox.runner import *
from tests.support.sandbox_programs import program
loop = program("    while True: pass\\n")
run_candidates([loop] * 4, sandbox=Sandbox({sandbox.isolation!s}), timeout_seconds=60, workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    wait_for(lambda: len(processes_with(marker)) >= 6)  # two servers, two solvers, two checkers
    process.send_signal(sent)
    process.wait(30)
    wait_for(lambda: processes_with(marker) == [])


def processes_with(marker):
    """Processes whose environment holds an entry."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in environ.read_bytes().split(b"\0"):
                found.append(environ.parent.name)
        except OSError:
            pass
    return found


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_candidates_need_no_sandbox():
    assert run_candidates([], sandbox=Sandbox(Isolation.NONE), timeout_seconds=1) == []
    assert runner.num_processors() >= 1
