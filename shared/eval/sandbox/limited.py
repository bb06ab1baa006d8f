"""Run generated programs in limited subprocesses.

Each candidate gets a process of its own: a bare interpreter with a clean environment, an empty working folder that is
removed afterwards, resource limits (CPU, memory, processes; regular files take no bytes), its own session, a deadline
after which everything it started is killed, and, where the kernel allows user namespaces, no network and no sight of
other processes. The verdict comes only as a message that carries a random token of this one run, on a pipe of its own,
written after the whole test has run: exit codes and output never count.

What this does NOT protect against, since the program and its test share a process:

- a program made to cheat: it can find the token in the frames above it, patch builtins the test uses, or return
  objects equal to everything;
- reading any file the user can read, creating empty files, deleting or truncating files the user owns;
- where user namespaces are forbidden (`Verdict.isolated` is false): the network, signals to this user's processes, and
  processes that leave the session (setsid);
- as root, the limit on the number of processes;
- kernel exploits and side channels.

Score only models you trust as much as code from a stranger that you would run by hand.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import SandboxError
from shared.runtime import progress

DEFAULT_TIMEOUT_SECONDS = 3.0
_MEMORY_BYTES = 2 << 30
_MAX_PROCESSES = 64
_MAX_MESSAGE_BYTES = 1 << 16
_CHECKER = Path(__file__).with_name("checker.py")
# `-I` would also ignore PYTHONHASHSEED, and with it the order of sets would change from run to run.
_INTERPRETER = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8"]
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A program (prompt and completion), the test that defines `check(candidate)`, and the name it is given."""

    program: str
    test: str
    entry_point: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of a candidate: `passed`, `failed`, `timed out`, `killed` (it vanished) or `error` (ours)."""

    verdict: str
    detail: str
    seconds: float
    isolated: bool | None = None


def run_candidates(
    candidates: Sequence[Candidate], *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
) -> list[Verdict]:
    """Run candidates, two at a time at most and never more than there are cores; verdicts in the same order.

    A time-out is tried once more, alone, before it is recorded: a busy machine fails no program.

    Raises:
        SandboxError: a known-good program does not pass here, so no verdict would mean anything.
    """
    control = run_candidate(
        Candidate(program="def f(x):\n    return x\n", test="def check(f):\n    assert f(1) == 1\n", entry_point="f"),
        timeout_seconds=max(timeout_seconds, 30.0),
    )
    if control.verdict != "passed":
        raise SandboxError("a known-good program does not pass", expected="passed", got=control, fix="see its detail")
    workers = min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    verdicts: list[Verdict] = []
    pool = ThreadPoolExecutor(workers)
    try:
        with progress("Running programs", len(candidates), "programs") as bar:
            for verdict in pool.map(lambda c: run_candidate(c, timeout_seconds=timeout_seconds), candidates):
                verdicts.append(verdict)
                bar.advance(1)
    finally:
        pool.shutdown(cancel_futures=True)
    return [
        run_candidate(candidate, timeout_seconds=timeout_seconds) if verdict.verdict == "timed out" else verdict
        for candidate, verdict in zip(candidates, verdicts, strict=True)
    ]


def run_candidate(candidate: Candidate, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Verdict:
    """Run one candidate to its verdict within `timeout_seconds` of wall time, interpreter start included."""
    start = time.monotonic()
    try:
        verdict, detail, isolated = _run(candidate, start + timeout_seconds, timeout_seconds)
    except (OSError, subprocess.SubprocessError, UnicodeError) as error:
        verdict, detail, isolated = "error", f"{type(error).__name__}: {error}", None
    return Verdict(verdict=verdict, detail=detail, seconds=round(time.monotonic() - start, 3), isolated=isolated)


def _run(candidate: Candidate, deadline: float, timeout_seconds: float) -> tuple[str, str, bool | None]:
    token = secrets.token_hex(16)
    limits = {
        "RLIMIT_CPU": int(timeout_seconds) + 2,
        "RLIMIT_AS": _MEMORY_BYTES,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NPROC": _MAX_PROCESSES,
        "RLIMIT_CORE": 0,
    }
    job = {
        "token": token,
        "limits": limits,
        "program": candidate.program,
        "test": candidate.test,
        "entry_point": candidate.entry_point,
    }
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="candidate-", ignore_cleanup_errors=True))
        stdin = stack.enter_context(tempfile.TemporaryFile())
        stdin.write(json.dumps(job).encode())
        stdin.seek(0)
        read_end, write_end = os.pipe()
        stack.callback(os.close, read_end)
        try:
            process = subprocess.Popen(
                [*_INTERPRETER, str(_CHECKER), str(write_end)],
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=scratch,
                env=_ENVIRONMENT,
                pass_fds=(write_end,),
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        try:
            message = _read_message(read_end, deadline)
        finally:
            # Always, and before the leader is reaped: its children may live on, and its id must not be reused.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if message is None:
        return "timed out", f"no verdict within {timeout_seconds:g} s", None
    match _parse(message):
        case [str(sent), str(verdict), str(detail), bool(isolated)] if secrets.compare_digest(sent, token):
            return verdict, detail, isolated
    return "killed", "the process vanished without a verdict", None


def _read_message(descriptor: int, deadline: float) -> bytes | None:
    """Everything written until a whole message is there or every writer is gone; None at the deadline."""
    message = b""
    while len(message) < _MAX_MESSAGE_BYTES:
        ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return None
        chunk = os.read(descriptor, 4096)
        message += chunk
        if not chunk or _parse(message) is not None:
            break
    return message


def _parse(message: bytes) -> Any:
    try:
        return json.loads(message)
    except (ValueError, RecursionError):
        return None


def were_isolated(verdicts: Iterable[Verdict]) -> bool | None:
    """Whether every program that told ran without network and other processes; None where none told."""
    told = [verdict.isolated for verdict in verdicts if verdict.isolated is not None]
    return all(told) if told else None
