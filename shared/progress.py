"""The progress of long work, on a terminal or in a log."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from shared.process import log, rank


class Progress:
    """Counts work done; a bar on a terminal, a log line every ten seconds elsewhere."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note = 0, ""
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def advance(self, amount: int, note: str = "") -> None:
        """Add `amount` units to what is done; `note` is shown beside the speed from now on."""
        self.done += amount
        self.note = f", {note}" if note else ""
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, speed=self.speed())
        elif (now := time.monotonic()) - self._last_line >= 10:
            self._last_line = now
            left_seconds = (self.total - self.done) / max(self.rate(), 1e-9)
            share = self.done / max(self.total, 1)
            log(
                f"{self.description}: {self.done:,}/{self.total:,} {self.unit} ({share:.0%}), "
                f"{self.speed()}, {left_seconds:,.0f} s left"
            )

    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.monotonic() - self._start, 1e-9)

    def speed(self) -> str:
        """The rate as it is shown, the note beside it."""
        rate = self.rate()
        return f"{rate:,.0f} {self.unit}/s{self.note}" if rate >= 10 else f"{rate:.2g} {self.unit}/s{self.note}"


@contextlib.contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Progress]:
    """Show the progress of long work on standard error, from rank 0 alone."""
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
    seconds = time.monotonic() - state._start
    log(f"{description}: {state.done:,} {unit} in {seconds:,.1f} s ({state.speed()})")
