"""This side of one fork server: hand it candidates one by one, keep the deadline, believe nobody but the checker."""

import contextlib
import importlib.util
import json
import math
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import SandboxError
from shared.eval.sandbox.policy import OF_PROGRAM, OF_TEST, Isolation

START_SECONDS = 60.0
VERDICTS = ("passed", "failed", "timed out", "killed", "error")
_COUNT_SECONDS = 1.0  # for trying the other asserts after the first that failed
_CPU_SECONDS_BEYOND = 2
# What messages between test and program take is no time of the program's and puts the deadline off: for calls by the
# program by its limit at most, and never beyond so many times its limit.
_LONGEST = 10
_MAX_LINE_BYTES = 1 << 20
_ROOT = Path(__file__).parents[3]
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from shared.eval.sandbox import policy, server; del sys.path[0]; "
    "server.main(int(sys.argv[2]), policy.Isolation[sys.argv[3]], sys.argv[4])"
)
# `-I` would also ignore PYTHONHASHSEED, and with it the order of sets would change from run to run.
_INTERPRETER = (sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", _START)
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PATH": "", "HOME": "/", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A program (prompt and completion), its test, and the name of the entry point that the test calls.

    A test that defines `check(candidate)` has it called with the entry point; any other text is only run.
    `same_process`: the test uses more of the program's names than the entry point; such a verdict can be forged.
    `solution`: the whole program, in place of prompt and completion; the test still has what the prompt defines.
    """

    prompt: str
    completion: str
    test: str
    entry_point: str
    same_process: bool = False
    solution: str | None = None

    @property
    def program(self) -> str:
        """What is run."""
        return self.prompt + self.completion if self.solution is None else self.solution


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of a candidate: `passed`, `failed`, `timed out`, `killed` (it vanished) or `error` (not judged).

    `loaded`: the program ran to its end and defined the entry point; `asserts_passed`: how many of the test's asserts
    held, of those tried. None where that is not known.
    """

    verdict: str
    detail: str
    seconds: float
    loaded: bool | None = None
    asserts_passed: int | None = None


class Worker:
    """An isolated fork server, on request with numpy for tests. A context manager; one candidate at a time.

    Raises:
        SandboxError: no process can be started.
    """

    def __init__(self, isolation: Isolation, *, with_numpy: bool = False) -> None:
        self._isolation = isolation
        spec = importlib.util.find_spec("numpy") if with_numpy else None
        self._packages = str(Path(spec.origin).parents[1]) if spec and spec.origin else ""
        self._control: socket.socket
        self._process: subprocess.Popen[bytes]
        self._ready = False
        self._killed = False
        self._start()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and all that it started."""
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """End the server at once, from another thread than the one that runs a candidate, which gets an error."""
        self._killed = True
        self._process.kill()

    def wait_ready(self) -> None:
        """Wait until the layers are up; a `SandboxError` says why they are not."""
        if self._ready:
            return
        self._control.settimeout(START_SECONDS)
        try:
            answer = json.loads(self._control.recv(4096) or b'{"error": "it ended"}')
        except (OSError, ValueError) as error:
            answer = {"error": error}
        if "error" in answer:
            raise SandboxError("the fork server did not start", where=self._isolation.value, got=answer["error"])
        self._ready = True

    def run(self, candidate: Candidate, timeout_seconds: float) -> Verdict:
        """Run a candidate to its verdict. What dies for no reason of its own is tried once more."""
        verdict, suspect = self._run(candidate, timeout_seconds)
        return self._run(candidate, timeout_seconds)[0] if suspect and not self._killed else verdict

    def _run(self, candidate: Candidate, timeout_seconds: float) -> tuple[Verdict, bool]:
        """A verdict, and whether something from outside may have made it."""
        start = time.monotonic()
        try:
            self.wait_ready()
            start = time.monotonic()  # of the program, not of the server
            verdict, detail, notes, suspect = self._attempt(candidate, start + timeout_seconds, timeout_seconds)
        except (OSError, SandboxError, ValueError) as error:
            verdict, detail, notes, suspect = "error", f"{type(error).__name__}: {error}", None, True
            self.close()
            if not self._killed:
                with contextlib.suppress(SandboxError):
                    self._start()
        return Verdict(
            verdict=verdict,
            detail=detail,
            seconds=round(time.monotonic() - start, 3),
            loaded=notes.loaded if notes and verdict != "error" else None,
            asserts_passed=notes.num_held if notes and verdict != "error" else None,
        ), suspect

    def _start(self) -> None:
        self._ready = False
        self._control, other = socket.socketpair()
        arguments = [str(_ROOT), str(other.fileno()), self._isolation.name, self._packages]
        with other:
            try:
                self._process = subprocess.Popen(
                    [*_INTERPRETER, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env=_ENVIRONMENT,
                    pass_fds=(other.fileno(),),
                    start_new_session=True,
                )
            except OSError as error:
                self._control.close()
                where = self._isolation.value
                raise SandboxError("the fork server cannot be started", where=where, got=error) from error

    def _attempt(
        self, candidate: Candidate, deadline: float, timeout_seconds: float
    ) -> tuple[str, str, "_Notes", bool]:
        program = candidate.program
        job = {"test": candidate.test, "entry_point": candidate.entry_point}
        job |= {"program": program} if candidate.same_process else {"prompt": candidate.prompt}
        with contextlib.ExitStack() as stack:
            checker, of_checker = map(stack.enter_context, socket.socketpair())
            theirs = [of_checker]
            if not candidate.same_process:
                solver, of_solver = map(stack.enter_context, socket.socketpair())
                theirs.insert(0, of_solver)
            cpu_seconds = math.ceil(timeout_seconds * _LONGEST) + _CPU_SECONDS_BEYOND
            message, descriptors = [json.dumps(cpu_seconds).encode()], [end.fileno() for end in theirs]
            socket.send_fds(self._control, message, descriptors)
            for end in theirs:
                end.close()
            if not candidate.same_process:
                _hand_over(solver, {"program": program, "entry_point": candidate.entry_point}, deadline)
            _hand_over(checker, job, deadline)
            notes, in_time = _read_notes(checker, deadline, timeout_seconds)
            statuses = self._finish()
        if notes.verdict is not None:
            verdict, detail = _parsed(notes.verdict)
            if verdict == "killed" and statuses[0] != 0:
                detail += f" ({_how(statuses[0])})"
            return verdict, detail, notes, verdict == "killed" and statuses[0] == -signal.SIGKILL
        if not in_time:
            return "timed out", f"no verdict within {timeout_seconds:g} s", notes, False
        # Without the program in it, nothing that the program does ends the checker.
        outside = not candidate.same_process or statuses[-1] == -signal.SIGKILL
        return "killed", f"the checker's process ended ({_how(statuses[-1])})", notes, outside

    def _finish(self) -> list[int]:
        """Have both children killed. Returns how each ended, the solver first."""
        self._control.send(b".")
        self._control.settimeout(START_SECONDS)
        statuses: list[int] | None = json.loads(self._control.recv(256) or b"null")
        if statuses is None:
            raise ConnectionError("the fork server ended")
        return statuses


def _hand_over(end: socket.socket, job: dict[str, str], deadline: float) -> None:
    """Send a job and nothing after it. A child that takes too long or dies shows in the verdict."""
    with contextlib.suppress(OSError):
        end.settimeout(max(deadline - time.monotonic(), 0.001))
        end.sendall(json.dumps(job).encode())
        end.shutdown(socket.SHUT_WR)


@dataclass(slots=True)
class _Notes:
    """What a checker has written: its notes, and its verdict as it came. A program that shares its process may write
    anything, and as much as it likes."""

    loaded: bool = False
    num_held: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {OF_TEST: 0.0, OF_PROGRAM: 0.0})  # of messages
    verdict: bytes | None = None

    def add(self, line: bytes) -> None:
        if line.startswith(b"[") and self.verdict is None:
            self.verdict = line
        self.loaded |= line == b"loaded"
        self.num_held += line == b"held"
        match line.split(b" "):
            case [kind, number] if (of := kind.decode("ascii", "replace")) in self.seconds and number.isdigit():
                self.seconds[of] += int(number[:18]) / 1e6


def _read_notes(end: socket.socket, deadline: float, limit: float) -> tuple[_Notes, bool]:
    """What the checker writes until it ends or the deadline is there, which messages put off; and whether it ended."""
    notes, rest, last = _Notes(), b"", deadline + (_LONGEST - 1) * limit
    while True:
        # One that never stops writing has none left either.
        put_off = notes.seconds[OF_TEST] + min(notes.seconds[OF_PROGRAM], limit)
        left = min(deadline + put_off, last) - time.monotonic()
        if left <= 0 or not select.select([end], [], [], left)[0]:
            return notes, False
        try:
            data = end.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        *lines, rest = (rest + data).split(b"\n")
        if not data or len(rest) > _MAX_LINE_BYTES:
            return notes, True
        had = notes.verdict
        for line in lines:
            notes.add(line)
        if notes.verdict is not had:
            deadline = last = min(last, time.monotonic() + _COUNT_SECONDS)


def _parsed(line: bytes) -> tuple[str, str]:
    """Verdict and detail; a line of another form can only be a program's that shares the checker's process."""
    try:
        match json.loads(line):
            case [str(verdict), str(detail)] if verdict in VERDICTS:
                return verdict, detail
    except (ValueError, RecursionError):
        pass
    return "failed", "the program wrote something into the checker's pipe"


def _how(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"signal {-status}"
