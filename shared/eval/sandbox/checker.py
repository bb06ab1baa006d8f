"""The child that runs a test against a proxy of the program, and alone writes the verdict.

Lines on its socket: `loaded`; `held` for each assert that held; `calls` and `callbacks` with the microseconds that
messages took; and JSON `[verdict, detail]`, the first of which stands.
Where an assert of the test fails the others are still tried, for the count alone.
"""

import contextlib
import json
import os
import random
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

from shared.eval.sandbox import prompt, solver
from shared.eval.sandbox.asserts import FAILED, HELD, count_asserts
from shared.eval.sandbox.channel import Channel, GoneError, RefusedError, read_all, write_all
from shared.eval.sandbox.codec import NotPlainError, TooLargeError
from shared.eval.sandbox.exceptions import described
from shared.eval.sandbox.needs import Needs
from shared.eval.sandbox.peer import Peer
from shared.eval.sandbox.policy import OF_PROGRAM, OF_TEST
from shared.eval.sandbox.proxies import Remote, RemoteFunction, give_methods
from shared.eval.sandbox.surroundings import CheckerSurroundings, Surroundings, wanted
from shared.eval.sandbox.table import Table

_SECONDS_PER_NOTE = 0.02  # of messages
# A test with these words may wait for a thread of the program, which is given the turn so often.
_WAITING = ("sleep", "wait", "join")
_SECONDS_BETWEEN_TURNS = 0.005


def main(job_fd: int, calls_fd: int | None = None) -> None:
    """Run one test; in one process with the program where there is no channel to a solver."""
    check = _Check(job_fd, calls_fd)
    try:
        check.run()
    except BaseException:
        check.end("error", "the checker: " + traceback.format_exc(limit=-3))


class _Check:
    def __init__(self, job_fd: int, calls_fd: int | None) -> None:
        self._verdicts = job_fd
        self._solver = None if calls_fd is None else Channel(calls_fd)
        self._peer: _ProgramPeer | None = None
        self._namespace: dict[str, Any] = {}
        self._state: list[str] = []  # variables of the prompt that only a program gives something to hold

    def run(self) -> None:
        """From the job to the verdict."""
        job = json.loads(read_all(self._verdicts))
        random.seed(1)
        solver.allow_frames_below()
        self.needs = Needs(job["test"])
        try:
            code = compile(count_asserts(job["test"]), "<test>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError) as error:
            self.end("error", f"the test is no Python: {error}")
        if self._solver is None:
            candidate = self._load(job["program"], job["entry_point"])
        else:
            candidate = self._stand_in(self._solver, job)
        self.note("loaded")
        self._namespace |= {HELD: lambda: self.note("held"), FAILED: self._fail}
        try:
            exec(code, self._namespace)
            if "check" in self._namespace:
                self._namespace["check"](candidate)
        except BaseException as error:
            self._fail(error)
        else:
            self._verdict(*self._judged())
        os._exit(0)

    def end(self, verdict: str, detail: str) -> NoReturn:
        """Give the verdict, if there is none yet, and end at once, whatever the test would catch."""
        self._verdict(verdict, detail)
        os._exit(0)

    def note(self, line: str) -> None:
        """Tell the other side."""
        write_all(self._verdicts, line.encode() + b"\n")

    def _verdict(self, verdict: str, detail: str) -> None:
        # A lone surrogate could not be printed.
        self.note(json.dumps([verdict, detail[:500].encode("utf-8", "replace").decode()]))

    def _judged(self) -> tuple[str, str]:
        """The verdict of a test that ran to its end."""
        if self._peer is None:
            return "passed", "in one process with its test: forgeable"
        if not self._peer.was_called:
            is_check = "check" in self._namespace
            return "failed" if is_check else "error", "the test never called the program"
        return ("error", self._peer.doubts[0]) if self._peer.doubts else ("passed", "")

    def _fail(self, error: BaseException) -> None:
        """Record a failure; what follows changes it no more."""
        text = described(error)
        reason = "" if self._peer is None else self._not_judged(error, self._peer)
        self._verdict("error" if reason else "failed", f"{reason}: {text}" if reason else text)

    def _not_judged(self, error: BaseException, peer: Peer) -> str:
        """Why a failure of this test says nothing about the program; empty where it does."""
        if peer.table.number(error) is None and _is_raised_in_test(error):
            if isinstance(error, ModuleNotFoundError):
                return "the test imports what the sandbox does not have"
            # An unset local is the program's doing.
            if type(error) is NameError and error.name not in self.needs.bound:
                return "the test uses a name of the program, so it needs one process with it (same_process)"
        needs = self.needs.one_process or next((name for name in self._state if name in self.needs.read), "")
        return f"the test needs one process with the program, for {needs}" if needs else ""

    # --- the program in a process of its own -------------------------------------------------------------------------

    def _stand_in(self, channel: Channel, job: dict[str, Any]) -> Any:
        """Run the prompt for what the test may use of it; its entry point becomes the stand-in of the program's."""
        entry_point = job["entry_point"]
        shared = self._run_prompt(job["prompt"])
        checksums = {name: prompt.checksums(v) if isinstance(v, type) else {} for name, v in shared.items()}
        names = wanted(job["test"])
        proposed = json.dumps({"checksums": checksums, "surroundings": names}).encode()
        self.attempt(lambda: channel.send(proposed))
        differences = self.attempt(lambda: _differences(channel.receive()))
        if isinstance(differences, str):
            self.end("failed", differences)
        shared = {name: shared[name] for name in differences if name in shared}
        candidate = shared.get(entry_point) or RemoteFunction()
        table = Table([candidate, *shared.values()])
        peer = self._peer = _ProgramPeer(
            self, channel, table, CheckerSurroundings(names), "StopIteration" in job["test"]
        )
        if isinstance(candidate, RemoteFunction):
            candidate.bind(peer, 0, {"__name__": entry_point, "__qualname__": entry_point})
        for name, value in shared.items():
            if isinstance(value, type):
                peer.give_methods(value, differences[name], is_entry_point=value is candidate)
        if any(word in job["test"] for word in _WAITING):
            threading.Thread(target=peer.give_turns, daemon=True).start()
        self._namespace[entry_point] = candidate
        return candidate

    def _run_prompt(self, text: str) -> dict[str, Any]:
        """Run the prompt's part of the program. Returns what it defines that both sides have."""
        module = types.ModuleType(prompt.MODULE)
        sys.modules[prompt.MODULE] = module
        self._namespace = module.__dict__
        try:
            exec(_compiled_head(text), self._namespace)
        except BaseException as error:
            self.end("error", f"the prompt does not run alone: {type(error).__name__}: {error}")
        self._state = prompt.empty_names(self._namespace)
        return prompt.defined(self._namespace)

    def attempt(self, action: Callable[[], Any], has_received: bool = False) -> Any:
        """Do something with the program's process; where that goes wrong, end with the verdict.

        What the test passes and cannot cross is an `error`. What the program answers, and what may be too large only
        because of its earlier answers, is `failed`: a program cannot choose an `error`.
        """
        try:
            return action()
        except GoneError:
            self.end("killed", "the program's process ended")
        except RefusedError as error:
            self.end("failed", f"the program's answer: {error}")
        except NotPlainError as error:
            if error.kind is not None and issubclass(error.kind, Remote):
                self.end("failed", "a copy of what stays with the program goes back to it")
            if isinstance(error, TooLargeError) and has_received:
                self.end("failed", f"an argument after the program's answers: {error}")
            self.end("error", f"the test passes {error}, so it needs one process with the program (same_process)")

    # --- the program in this process ---------------------------------------------------------------------------------

    def _load(self, program: str, entry_point: str) -> Any:
        try:
            self._namespace = solver.load(program)
            return self._namespace[entry_point]
        except BaseException as error:
            self._fail(error)
            os._exit(0)


class _ProgramPeer(Peer):
    """The checker's side of the channel. Whatever goes wrong in a call, of the entry point or of anything that the
    program has answered, ends the check at once: a test that catches exceptions does not catch that."""

    def __init__(
        self, check: _Check, channel: Channel, table: Table, surroundings: Surroundings, expects_stop: bool
    ) -> None:
        super().__init__(channel, table, surroundings, exact=True)
        self.was_called = False
        self.doubts: list[str] = []
        self._check, self._expects_stop = check, expects_stop
        self._transport_seconds = {OF_TEST: 0.0, OF_PROGRAM: 0.0}

    def call(self, number: int, method: str, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        self.was_called |= method == "call"
        call = super().call
        try:
            return self._check.attempt(lambda: call(number, method, arguments, keywords), self.has_received)
        except StopIteration as error:  # of a function it would silently end a test's map() or zip()
            if self._expects_stop or method in ("next", "send"):
                raise
            raise RuntimeError("the program raised StopIteration") from error

    def refuse(self, error: BaseException) -> None:
        """What the test's own function returned cannot cross."""
        self._check.attempt(lambda: _raise(error), self.has_received)

    def doubt(self, reason: str) -> None:
        self.doubts.append(reason)

    def give_methods(self, kind: type, names: list[str], *, is_entry_point: bool) -> None:
        """Have a class of the prompt do as the program's class does, where the prompt leaves it open.

        Instances are made by the program, too. Where it makes what the test expects, it decides what that is.
        """
        open_names = [name for name in names if prompt.is_open(kind, name.removeprefix("="))]
        deciding = prompt.deciding_names(kind)
        if "__init__" in names and "__init__" not in open_names:
            open_names.append("__init__")
            if not is_entry_point:
                deciding.add("__init__")
        give_methods(self, kind, open_names, deciding)

    def give_turns(self) -> None:
        """Let threads of the program call the test's functions while the test does something else."""
        while True:
            time.sleep(_SECONDS_BETWEEN_TURNS)
            with contextlib.suppress(RuntimeError):  # an object has changed while it was looked at
                if self.table.exported:
                    self.call(0, "turn")

    def count_transport(self, seconds: float, *, is_own: bool) -> None:
        """Tell the worker, now and then, of the time that messages took, which is no time of the program's."""
        kind = OF_TEST if is_own else OF_PROGRAM
        self._transport_seconds[kind] += seconds
        if self._transport_seconds[kind] >= _SECONDS_PER_NOTE:
            self._check.note(f"{kind} {round(1e6 * self._transport_seconds[kind])}")
            self._transport_seconds[kind] = 0.0


def _raise(error: BaseException) -> NoReturn:
    raise error


def _is_raised_in_test(error: BaseException) -> bool:
    """Whether the test's own text raised it, by no call."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename == "<test>"


def _differences(message: bytes) -> dict[str, list[str]] | str:
    """What the program has of the prompt's classes and objects, and by which names the classes differ; or why it did
    not load."""
    try:
        answer = json.loads(message)
        if isinstance(answer, str):
            return answer
        return {str(name): [str(inner) for inner in names] for name, names in answer.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise RefusedError(f"malformed data: {error}") from None


def _compiled_head(text: str) -> types.CodeType:
    """The prompt without the unfinished definition at its end, if that has not even a docstring."""
    lines = text.splitlines(keepends=True)
    while True:
        try:
            return compile("".join(lines), "<prompt>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            if not lines:
                raise
            lines.pop()
