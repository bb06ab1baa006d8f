"""The child that runs a test against a proxy of the program, and alone writes the verdict.

Lines on its socket: `loaded`, `held` for each assert that held, `transport` with microseconds that messages took, and
JSON `[verdict, detail]`, the first of which stands.
Where an assert of the test fails the others are still tried, for the count alone.
"""

import json
import os
import random
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

from shared.eval.sandbox import solver
from shared.eval.sandbox.asserts import FAILED, HELD, SECONDS_PER_NOTE, TRANSPORT, count_asserts
from shared.eval.sandbox.channel import Channel, read_all, write_all
from shared.eval.sandbox.classes import defined
from shared.eval.sandbox.needs import Needs
from shared.eval.sandbox.peer import GoneError, Peer, RefusedError
from shared.eval.sandbox.proxies import ITERATING, TEST_METHODS, Remote, describe_entry_point, make_proxy
from shared.eval.sandbox.surroundings import Surroundings, wanted
from shared.eval.sandbox.values import NotPlainError, Table

# Words of a test that looks at the entry point itself.
_DESCRIPTIVE = ("signature", "inspect", "__doc__", "__annotations__", "cache_", "getattr", "vars(")


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
        self._transport_seconds = 0.0
        self._called = False
        self._lock = threading.RLock()  # a test may call from threads, and a program may call back
        self._namespace: dict[str, Any] = {}

    def run(self) -> None:
        """From the job to the verdict."""
        job = json.loads(read_all(self._verdicts))
        random.seed(1)
        self._needs = Needs(job["test"], job["entry_point"])
        try:
            code = compile(count_asserts(job["test"]), "<test>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError) as error:
            self.end("error", f"the test is no Python: {error}")
        if self._solver is None:
            candidate = self._load(job["program"], job["entry_point"])
        else:
            candidate = self._stand_in(self._solver, job)
        self._note("loaded")
        self._namespace |= {HELD: lambda: self._note("held"), FAILED: self._fail}
        try:
            exec(code, self._namespace)
            if "check" not in self._namespace:
                self.end("error", "the test defines no check(candidate)")
            self._namespace["check"](candidate)
        except BaseException as error:
            self._fail(error)
        else:
            if self._solver is not None and not self._called:
                self._verdict("failed", "the test never called the program")
            else:
                self._verdict("passed", "" if self._solver else "in one process with its test: forgeable")
        os._exit(0)

    def end(self, verdict: str, detail: str) -> NoReturn:
        """Give the verdict, if there is none yet, and end at once, whatever the test would catch."""
        self._verdict(verdict, detail)
        os._exit(0)

    def _note(self, line: str) -> None:
        write_all(self._verdicts, line.encode() + b"\n")

    def _verdict(self, verdict: str, detail: str) -> None:
        # A lone surrogate could not be printed.
        self._note(json.dumps([verdict, detail[:500].encode("utf-8", "replace").decode()]))

    def _fail(self, error: BaseException) -> None:
        """Record a failure; what follows changes it no more."""
        try:
            text = f"{type(error).__name__}: {error}".removesuffix(": ")
        except BaseException:
            text = "an exception without a readable text"
        reason = "" if self._solver is None else self._not_judged(error)
        self._verdict("error" if reason else "failed", f"{reason}: {text}" if reason else text)

    def _not_judged(self, error: BaseException) -> str:
        """Why a failure of this test says nothing about the program; empty where it does."""
        if self._misses_a_name(error):
            return "the test uses a name of the program, so it needs one process with it (same_process)"
        needs = self._needs.one_process
        return f"the test needs one process with the program, for {needs}" if needs else ""

    def _misses_a_name(self, error: BaseException) -> bool:
        """Whether the test's own text reads a name that it never binds; an unset local is the program's doing."""
        if not isinstance(error, NameError) or isinstance(error, UnboundLocalError) or error.name in self._needs.bound:
            return False
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return trace is not None and trace.tb_frame.f_code.co_filename == "<test>"

    # --- the program in a process of its own -------------------------------------------------------------------------

    def _stand_in(self, channel: Channel, job: dict[str, Any]) -> Callable[..., Any]:
        """Run the prompt for what the test may use of it; its entry point becomes the stand-in of the program's."""
        answer = self.attempt(lambda: _first_message(channel))
        if answer != solver.LOADED:
            self.end("failed", answer[1:].decode("utf-8", "replace"))
        entry_point, test = job["entry_point"], job["test"]
        classes = self._run_prompt(job["prompt"])
        table = Table(classes, self._namespace)
        names = wanted(test)
        peer = _ProgramPeer(self, channel, table, Surroundings(names), expects_stop="StopIteration" in test)

        is_looked_at = any(word in test for word in (*_DESCRIPTIVE, f"{entry_point}.", "candidate."))

        def candidate(*arguments: Any, **keywords: Any) -> Any:
            self._called = True
            try:
                return peer.call(0, "call", arguments, keywords)
            finally:
                if is_looked_at:  # a call may have changed its attributes
                    describe_entry_point(candidate, peer)

        table.add(candidate)
        agreed = json.dumps({"classes": list(classes), "surroundings": names}).encode()
        self.attempt(lambda: _first_send(channel, agreed))
        candidate.__name__ = candidate.__qualname__ = entry_point
        if is_looked_at:
            describe_entry_point(candidate, peer)
        self._namespace[entry_point] = candidate
        return candidate

    def _run_prompt(self, prompt: str) -> dict[str, type]:
        """Run the prompt's part of the program. Returns the classes that it defines."""
        module = types.ModuleType("candidate")
        sys.modules["candidate"] = module
        self._namespace = module.__dict__
        try:
            exec(_compiled_head(prompt), self._namespace)
        except BaseException as error:
            self.end("error", f"the prompt does not run alone: {type(error).__name__}: {error}")
        return defined(self._namespace)

    def attempt(self, action: Callable[[], Any], peer: Peer | None = None) -> Any:
        """Do something with the program's process; where that goes wrong, end with the verdict.

        What the test passes and cannot cross is an `error`. What the program answers, and what may be too large only
        because of its earlier answers, is `failed`: a program cannot choose an `error`.
        """
        try:
            with self._lock:
                return action()
        except GoneError:
            self.end("killed", "the program's process ended")
        except RefusedError as error:
            self.end("failed", f"the program's answer: {error}")
        except NotPlainError as error:
            if error.kind is not None and issubclass(error.kind, Remote):
                self.end("failed", "a copy of what stays with the program goes back to it")
            if error.too_large and (self._needs.passes_answers_back or (peer is not None and peer.has_received_much)):
                self.end("failed", f"an argument made of the program's answers: {error}")
            self.end("error", f"the test passes {error}, so it needs one process with the program (same_process)")

    def count_transport(self, seconds: float) -> None:
        """Tell the other side, now and then, of the time that messages took, which is no time of the program's."""
        self._transport_seconds += seconds
        if self._transport_seconds >= SECONDS_PER_NOTE:
            self._note(f"{TRANSPORT} {round(1e6 * self._transport_seconds)}")
            self._transport_seconds = 0.0

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
        self, check: _Check, channel: Channel, table: Table, surroundings: Surroundings, *, expects_stop: bool
    ) -> None:
        super().__init__(
            channel, table, methods=TEST_METHODS, proxy=make_proxy, surroundings=surroundings, exact=True,
            count_transport=check.count_transport,
        )  # fmt: skip
        self._check, self._expects_stop = check, expects_stop

    def call(self, number: int, method: str, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        try:
            return self._check.attempt(lambda: Peer.call(self, number, method, arguments, keywords), self)
        except StopIteration as error:  # of a function it would silently end a test's map() or zip()
            if self._expects_stop or method in ITERATING:
                raise
            raise RuntimeError("the program raised StopIteration") from error

    def refuse(self, error: BaseException) -> None:
        """What the test's own function returned cannot cross."""
        self._check.attempt(lambda: _raise(error), self)


def _raise(error: BaseException) -> NoReturn:
    raise error


def _first_send(channel: Channel, message: bytes) -> None:
    try:
        channel.send(message)
    except OSError as error:
        raise GoneError from error


def _first_message(channel: Channel) -> bytes:
    try:
        message = channel.receive()
    except (NotPlainError, MemoryError) as error:
        raise RefusedError(str(error)) from None
    if message is None:
        raise GoneError
    return message


def _compiled_head(prompt: str) -> types.CodeType:
    """The prompt without the unfinished definition at its end, if that has not even a docstring."""
    lines = prompt.splitlines(keepends=True)
    while True:
        try:
            return compile("".join(lines), "<prompt>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            if not lines:
                raise
            lines.pop()
