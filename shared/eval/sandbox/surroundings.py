"""State of a process that a test and a program share in plain Python: it crosses with every call and every answer.

Only what the test's text speaks of crosses: how far `random` has drawn, the context of `decimal`, what was printed,
what is read, warnings, and the limits of recursion and of the digits of integers. Which state `random` is in, which
warnings are shown and where the limits are, only the test's side sets.
"""

import contextlib
import decimal
import io
import random
import sys
import warnings
from collections.abc import Iterable
from typing import Any

_MAX_OUTPUT_CHARACTERS = 1 << 20
_MAX_WARNINGS = 10_000
_MAX_WORDS = 1 << 16  # that a call draws from the generator
# What may cross, and the words in a test that ask for it.
NAMES = {
    "random": ("random",),
    "decimal": ("getcontext", "setcontext", "localcontext"),
    "output": ("stdout", "stderr", "capture"),
    "input": ("stdin",),
    "limits": ("setrecursionlimit", "set_int_max_str_digits"),
    "warnings": ("warn",),
}


def wanted(test: str) -> list[str]:
    """What of the surroundings a test speaks of."""
    return [name for name, words in NAMES.items() if any(word in test for word in words)]


class Surroundings:
    """What crosses, of `NAMES`, by methods of one side: `_take_…` what it tells, `_give_…` what it is told."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def take(self) -> Any:
        """The state now, as plain data; None where nothing crosses."""
        return {name: getattr(self, f"_take_{name}", lambda: None)() for name in self.names} if self.names else None

    def give(self, state: Any) -> None:
        """Take over the other side's state; a `ValueError` says that it has another form."""
        if type(state) is not (dict if self.names else type(None)):
            raise ValueError("malformed data")
        with contextlib.suppress(TypeError, ValueError, AttributeError, OSError):
            for name in self.names:
                getattr(self, f"_give_{name}", lambda state: None)((state or {}).get(name))

    def _take_decimal(self) -> Any:
        context = decimal.getcontext()
        return context.prec, context.rounding, context.Emin, context.Emax, context.capitals, context.clamp

    def _give_decimal(self, state: Any) -> None:
        context = decimal.getcontext()
        context.prec, context.rounding, context.Emin, context.Emax, context.capitals, context.clamp = state


class CheckerSurroundings(Surroundings):
    """The test's side: it has the streams."""

    def _take_random(self) -> Any:
        return random.getstate()

    def _give_random(self, num_words: Any) -> None:
        if type(num_words) is int and 0 <= num_words <= _MAX_WORDS:
            random.getrandbits(32 * num_words)

    def _take_limits(self) -> Any:
        return sys.getrecursionlimit(), sys.get_int_max_str_digits()

    def _take_warnings(self) -> Any:
        """The filters, in plain data."""
        return [
            (action, getattr(text, "pattern", text), category, getattr(module, "pattern", module), line)
            for action, text, category, module, line in warnings.filters
        ]

    def _give_warnings(self, new_warnings: Any) -> None:
        for warning in new_warnings:
            warnings.showwarning(warning, type(warning), "<program>", 1)

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


class SolverSurroundings(Surroundings):
    """The program's side: it prints into memory and reads what the test has put there."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        if "output" in self.names:
            sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
            self._streams = (sys.stdout, sys.stderr)
        self._filters: Any = None
        self._warnings: list[Warning] = []
        if "warnings" in self.names:
            warnings.showwarning = self._note_warning

    def _take_random(self) -> Any:
        """How many 32-bit words have been drawn from the generator since it was given; None where that is not known."""
        (*block, place), (*wanted, end) = self._given_random[1], random.getstate()[1]
        twister, count = random.Random(), 0
        twister.setstate((*self._given_random[:2], None))
        while block != wanted and count < _MAX_WORDS:
            count += len(block) - place + 1
            twister.getrandbits(32 * (len(block) - place + 1))  # to the first word of the next block
            *block, place = twister.getstate()[1]
        return count + end - place if block == wanted else None

    def _give_random(self, state: Any) -> None:
        random.setstate(state)
        self._given_random = state

    def _give_limits(self, limits: Any) -> None:
        recursion, digits = limits
        sys.setrecursionlimit(recursion)
        sys.set_int_max_str_digits(digits)

    def _take_warnings(self) -> Any:
        """What the program was warned of since the last message."""
        new_warnings, self._warnings = self._warnings, []
        return new_warnings

    def _give_warnings(self, filters: Any) -> None:
        if filters != self._filters:
            self._filters = filters
            warnings.resetwarnings()
            for action, text, category, module, line in filters:
                warnings.filterwarnings(action, text or "", category, module or "", line, append=True)

    def _note_warning(self, message: Any, *_: Any, **__: Any) -> None:
        if len(self._warnings) < _MAX_WARNINGS:
            self._warnings.append(message)

    def _take_output(self) -> Any:
        printed = []
        for stream in self._streams:
            printed.append(stream.getvalue()[:_MAX_OUTPUT_CHARACTERS])
            stream.seek(0)
            stream.truncate()
        return printed

    def _take_input(self) -> Any:
        return sys.stdin.tell() if isinstance(sys.stdin, io.StringIO) else None

    def _give_input(self, text: Any) -> None:
        if isinstance(text, str):
            sys.stdin = io.StringIO(text)
