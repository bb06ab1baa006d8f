"""Candidates to verdicts: what scoring knows of the sandbox."""

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from shared.errors import SandboxError
from shared.eval.sandbox import probe
from shared.eval.sandbox.policy import Isolation
from shared.eval.sandbox.worker import Candidate, Verdict, Worker
from shared.machine import num_processors
from shared.progress import progress

__all__ = ["Candidate", "Sandbox", "Verdict", "open_sandbox", "run_candidates"]

FIX = "Linux 5.13 with Landlock; a container or virtual machine of its own and --unsafe-no-sandbox"


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What programs run in; `description` goes into every result."""

    isolation: Isolation

    @property
    def description(self) -> dict[str, Any]:
        """The layers, and whether there are none."""
        return {"isolation": self.isolation.value, "unsafe_no_sandbox": self.isolation == Isolation.NONE}


def open_sandbox(*, unsafe: bool = False) -> Sandbox:
    """The best isolation that this machine allows, by trying what it must refuse; or none with `unsafe`.

    Raises:
        SandboxError: there is none, and why.
    """
    reasons = []
    for isolation, _, reason in probe.probe_all():
        if not reason:
            return Sandbox(isolation)
        reasons.append(f"{isolation.value}: {reason}")
    if unsafe:
        return Sandbox(Isolation.NONE)
    raise SandboxError("no sandbox can be had here", got="; ".join(reasons), fix=FIX)


def run_candidates(
    candidates: Sequence[Candidate], *, sandbox: Sandbox, timeout_seconds: float, workers: int | None = None
) -> list[Verdict]:
    """One verdict per candidate, in order.

    A time-out is tried once more, alone, before it is recorded: a busy machine fails no program.

    Args:
        candidates: run in any order.
        timeout_seconds: wall seconds of one candidate, program and test together. Message time does not count: calls by
            the test extend the deadline to at most ten times the limit, calls by the program by at most one limit.
        workers: candidates at once; as many as there are processors by default.

    Raises:
        SandboxError: the isolation layers cannot be put up any more.
    """
    num_workers = min(workers or num_processors(), len(candidates))
    if num_workers == 0:
        return []
    with ExitStack() as stack:
        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        with_numpy = any("numpy" in candidate.test for candidate in candidates)
        everyone = [stack.enter_context(Worker(sandbox.isolation, with_numpy=with_numpy)) for _ in range(num_workers)]
        for worker in everyone:
            worker.wait_ready()
            idle.put(worker)

        def run(candidate: Candidate) -> Verdict:
            worker = idle.get()
            try:
                return worker.run(candidate, timeout_seconds)
            finally:
                idle.put(worker)

        pool = ThreadPoolExecutor(num_workers)
        verdicts = []
        try:
            with progress("Running programs", len(candidates), "programs") as bar:
                for verdict in pool.map(run, candidates):
                    verdicts.append(verdict)
                    bar.advance(1)
        except BaseException:
            for worker in everyone:
                worker.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [
            everyone[0].run(candidate, timeout_seconds) if verdict.verdict == "timed out" else verdict
            for candidate, verdict in zip(candidates, verdicts, strict=True)
        ]
