"""Candidates to verdicts: what scoring knows of the sandbox."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.eval.sandbox import limited


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A program (prompt and completion), the test that defines `check(candidate)`, and the name it is given.

    `same_process`: the test uses more of the program's names than the entry point.
    """

    prompt: str
    completion: str
    test: str
    entry_point: str
    same_process: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of a candidate: `passed`, `failed`, `timed out`, `killed` (it vanished) or `error` (ours).

    `loaded`: the program ran to its end and defined the entry point; `asserts_passed`: how many of the test's asserts
    held. None where that is not known.
    """

    verdict: str
    detail: str
    seconds: float
    loaded: bool | None = None
    asserts_passed: int | None = None


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What programs run in; `description` goes into every result."""

    description: dict[str, Any]


def open_sandbox(*, allow_host_reads: bool = False, unsafe: bool = False) -> Sandbox:
    """What this machine offers.

    Raises:
        SandboxError: it has no walls.
    """
    return Sandbox({"kind": "limited subprocess, forgeable", "allow_host_reads": allow_host_reads, "unsafe": unsafe})


def run_candidates(
    candidates: Sequence[Candidate], *, sandbox: Sandbox, timeout_seconds: float, workers: int | None = None
) -> list[Verdict]:
    """One verdict per candidate, in order.

    Raises:
        SandboxError: a known-good program does not pass.
    """
    programs = [
        limited.Candidate(program=c.prompt + c.completion, test=c.test, entry_point=c.entry_point) for c in candidates
    ]
    verdicts = limited.run_candidates(programs, timeout_seconds=timeout_seconds)
    sandbox.description["isolated"] = limited.were_isolated(verdicts)
    return [Verdict(verdict=v.verdict, detail=v.detail, seconds=v.seconds) for v in verdicts]
