"""The child that runs a test against a proxy of the program, and alone writes the verdict.

Lines on its socket: `loaded`, `held` for each assert that held, JSON `[verdict, detail]`, the first of which stands.
Where an assert of the test fails the others are still tried, for the count alone.
"""

import builtins
import json
import os
import random
import sys
import threading
import traceback
import types
from collections.abc import Callable, Generator
from typing import Any, NoReturn

from shared.eval.sandbox import solver
from shared.eval.sandbox.asserts import FAILED, HELD, count_asserts
from shared.eval.sandbox.channel import Channel, read_all, write_all
from shared.eval.sandbox.values import Decoder, Encoder, NotPlainError, is_mutable


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
        self._num_calls = 0
        self._lock = threading.Lock()
        self._namespace: dict[str, Any] = {}

    def run(self) -> None:
        """From the job to the verdict."""
        job = json.loads(read_all(self._verdicts))
        random.seed(1)
        if self._solver is None:
            candidate = self._load(job["program"], job["entry_point"])
        else:
            self._expect_loaded()
            candidate = self._stand_in(job["prompt"], job["entry_point"], job["test"])
        self._note("loaded")
        try:
            code = compile(count_asserts(job["test"]), "<test>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError) as error:
            self.end("error", f"the test is no Python: {error}")
        self._namespace |= {HELD: lambda: self._note("held"), FAILED: self._fail}
        try:
            exec(code, self._namespace)
            if "check" not in self._namespace:
                self.end("error", "the test defines no check(candidate)")
            self._namespace["check"](candidate)
        except BaseException as error:
            self._fail(error)
        else:
            if self._solver is not None and not self._num_calls:
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
        self._verdict("failed", text)

    # --- the program in a process of its own -------------------------------------------------------------------------

    def _expect_loaded(self) -> None:
        answer = self._receive()
        if answer != b"L":
            self.end("failed", answer[1:].decode("utf-8", "replace"))

    def _stand_in(self, prompt: str, entry_point: str, test: str) -> Callable[..., Any]:
        """Run the prompt for what the test may use of it; its entry point becomes the proxy."""
        module = types.ModuleType("candidate")
        sys.modules["candidate"] = module
        self._namespace = module.__dict__

        def candidate(*arguments: Any, **keywords: Any) -> Any:
            self._num_calls += 1
            try:
                return self._call(0, arguments, keywords)
            except StopIteration as error:  # would silently end a test's map() or zip()
                if "StopIteration" in test:
                    raise
                raise RuntimeError("the program raised StopIteration") from error

        try:
            exec(_compiled_head(prompt), self._namespace)
        except BaseException as error:
            self.end("error", f"the prompt does not run alone: {type(error).__name__}: {error}")
        candidate.__name__ = candidate.__qualname__ = entry_point
        self._namespace[entry_point] = candidate
        return candidate

    def _call(self, which: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        request = Encoder(exact=True)
        try:
            request.encode((which, arguments, keywords))
        except NotPlainError as error:
            self.end("error", f"the test passes {error}, so it needs one process with the program (same_process)")
        with self._lock:
            try:
                assert self._solver is not None
                self._solver.send(request.take())
            except OSError:
                self._gone()
            answer = self._receive()
        how, changed = answer[:1], answer[1:2]
        if how not in (b"R", b"X"):
            self.end("failed", "the program's answer: " + answer[1:].decode("utf-8", "replace"))
        try:
            decoder = Decoder(answer[2:], request.objects, iterator=self._iterate)
            if changed == b"C":
                for value in filter(is_mutable, request.objects):
                    decoder.write_back(value)
            outcome = decoder.decode()
        except (NotPlainError, MemoryError) as error:
            self.end("failed", f"the program's answer: {error}")
        if how == b"X":
            raise self._exception(outcome)
        return outcome

    def _iterate(self, which: int) -> Generator[Any, None, Any]:
        while True:
            try:
                item = self._call(which, (), {})
            except StopIteration as end:
                return end.value
            yield item

    def _receive(self) -> bytes:
        assert self._solver is not None
        try:
            answer = self._solver.receive()
        except (NotPlainError, MemoryError) as error:
            self.end("failed", f"the program's answer: {error}")
        if answer is None:
            self._gone()
        return answer

    def _gone(self) -> NoReturn:
        self.end("killed", "the program's process ended")

    def _exception(self, outline: Any) -> BaseException:
        """An exception as near as may be to the one of the program: of a class that the test can name."""
        try:
            names, shown, arguments, attributes = outline
            for module, name in names:
                kind = self._namespace.get(name, getattr(builtins, name, None))
                if kind is None and module.partition(".")[0] in sys.stdlib_module_names:
                    kind = getattr(sys.modules.get(module), name, None)
                if isinstance(kind, type) and issubclass(kind, BaseException):
                    try:
                        error = kind(*arguments)
                    except Exception:  # made with others
                        error = kind.__new__(kind, *shown)
                    error.args = tuple(shown)
                    error.__dict__.update(attributes)
                    return error
        except (TypeError, ValueError, AttributeError):
            pass
        return RuntimeError(f"the program raised {outline!r:.200}")

    # --- the program in this process ---------------------------------------------------------------------------------

    def _load(self, program: str, entry_point: str) -> Any:
        try:
            self._namespace = solver.load(program)
            return self._namespace[entry_point]
        except BaseException as error:
            self._fail(error)
            os._exit(0)


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
