"""The progress of long work, on a terminal or in a log."""

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator
from typing import Any

from shared.process import log, rank

FIRST_LINE_SECONDS, MOST_SECONDS = 10.0, 600.0  # between two lines of a log


class Progress:
    """Counts work done; a bar on a terminal, elsewhere log lines that grow rarer: whenever 5 % more time has passed."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note = 0, ""
        self._start = time.monotonic()
        self._next_line = self._start + FIRST_LINE_SECONDS
        self._bar: Any = None
        self._task: Any = None

    def advance(self, amount: int, note: str = "") -> None:
        """Add `amount` units to what is done; `note` is shown beside the speed from now on."""
        self.done += amount
        self.note = f", {note}" if note else ""
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, speed=self.speed())
        elif (now := time.monotonic()) >= self._next_line:
            self._next_line = now + min(max((now - self._start) / 20, FIRST_LINE_SECONDS), MOST_SECONDS)
            if self.total is None:
                log(f"{self.description}: {self.done:,} {self.unit}, {self.speed()}")
            else:
                left_seconds = round((self.total - self.done) / max(self.rate(), 1e-9))
                left = f"{left_seconds:,} s" if left_seconds < 3600 else str(datetime.timedelta(seconds=left_seconds))
                log(
                    f"{self.description}: {self.done:,}/{self.total:,} {self.unit} "
                    f"({self.done / max(self.total, 1):.0%}), {self.speed()}, {left} left"
                )

    def seconds(self) -> float:
        """Since the start."""
        return max(time.monotonic() - self._start, 1e-9)

    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / self.seconds()

    def speed(self) -> str:
        """The rate as it is shown, the note beside it."""
        rate = self.rate()
        return f"{rate:,.0f} {self.unit}/s{self.note}" if rate >= 10 else f"{rate:.2g} {self.unit}/s{self.note}"


@contextlib.contextmanager
def progress(description: str, total: int | None, unit: str) -> Iterator[Progress]:
    """Show the progress of long work on standard error, only from rank 0; `total` is None where nobody knows it."""
    state = Progress(description, total, unit)
    if rank() == 0 and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        ]
        with Bar(*columns, console=Console(stderr=True)) as bar:
            state._bar, state._task = bar, bar.add_task(description, total=total, speed="")
            yield state
    else:
        yield state
    log(f"{description}: {state.done:,} {unit} in {state.seconds():,.1f} s ({state.speed()})")
