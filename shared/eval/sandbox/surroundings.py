"""State of a process that a test and a program share in plain Python: it crosses with every call and every answer.

Only what the test's text speaks of crosses: `random`, the context of `decimal`, what was printed, what is read, and the
limits of recursion and of the digits of integers, which only the test's side sets.
"""

import contextlib
import decimal
import io
import random
import sys
from collections.abc import Iterable
from typing import Any

_MAX_OUTPUT_CHARACTERS = 1 << 20
# What may cross, and the words in a test that ask for it.
NAMES = {
    "random": ("random",),
    "decimal": ("getcontext", "setcontext", "localcontext"),
    "output": ("stdout", "stderr", "capture"),
    "input": ("stdin",),
    "limits": ("setrecursionlimit", "set_int_max_str_digits"),
}


def wanted(test: str) -> list[str]:
    """What of the surroundings a test speaks of."""
    return [name for name, words in NAMES.items() if any(word in test for word in words)]


class Surroundings:
    """What crosses, from the test's side: it has the streams.

    Args:
        names: what crosses, of `NAMES`.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def take(self) -> Any:
        """The state now, as plain data; None where nothing crosses."""
        return {name: getattr(self, f"_take_{name}")() for name in self.names} if self.names else None

    def give(self, state: Any) -> None:
        """Take over the other side's state."""
        if isinstance(state, dict):
            with contextlib.suppress(TypeError, ValueError, AttributeError, OSError):
                for name in self.names:
                    getattr(self, f"_give_{name}")(state.get(name))

    def _take_random(self) -> Any:
        return random.getstate()

    def _give_random(self, state: Any) -> None:
        random.setstate(state)

    def _take_decimal(self) -> Any:
        context = decimal.getcontext()
        return context.prec, context.rounding, context.Emin, context.Emax, context.capitals, context.clamp

    def _give_decimal(self, state: Any) -> None:
        context = decimal.getcontext()
        context.prec, context.rounding, context.Emin, context.Emax, context.capitals, context.clamp = state

    def _take_limits(self) -> Any:
        return sys.getrecursionlimit(), sys.get_int_max_str_digits()

    def _give_limits(self, limits: Any) -> None:
        return

    def _take_output(self) -> Any:
        return None

    def _give_output(self, printed: Any) -> None:
        for stream, text in zip((sys.stdout, sys.stderr), printed, strict=True):
            if stream is not None and text:
                stream.write(text)

    def _take_input(self) -> Any:
        """What the stream still holds, where the test has put one there."""
        if sys.stdin is None or sys.stdin is sys.__stdin__:
            return None
        place = sys.stdin.tell()
        text = sys.stdin.read()
        sys.stdin.seek(place)
        return text

    def _give_input(self, num_read: Any) -> None:
        if type(num_read) is int and sys.stdin is not None and sys.stdin is not sys.__stdin__:
            sys.stdin.read(num_read)


class ProgramSurroundings(Surroundings):
    """What crosses, from the program's side: it prints into memory and reads what the test has put there."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        if "output" in self.names:
            sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
            self._streams = (sys.stdout, sys.stderr)

    def _take_limits(self) -> Any:
        return None

    def _give_limits(self, limits: Any) -> None:
        recursion, digits = limits
        sys.setrecursionlimit(recursion)
        sys.set_int_max_str_digits(digits)

    def _take_output(self) -> Any:
        printed = []
        for stream in self._streams:
            printed.append(stream.getvalue()[:_MAX_OUTPUT_CHARACTERS])
            stream.seek(0)
            stream.truncate()
        return printed

    def _give_output(self, printed: Any) -> None:
        return

    def _take_input(self) -> Any:
        return sys.stdin.tell() if isinstance(sys.stdin, io.StringIO) else None

    def _give_input(self, text: Any) -> None:
        if isinstance(text, str):
            sys.stdin = io.StringIO(text)
