"""Which side may write, and which of its threads."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


class Turn:
    """Permission to write, which a side has while the other waits: one thread's at a time.

    A thread that is called lends it while the call runs, so that others may call the other side meanwhile, and takes it
    back for the answer: after all calls that were begun since, for the other side is waiting for them in their order.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._holder: int | None = None
        self._num_waiting = 0
        self._loans: list[object] = []

    def __enter__(self) -> None:
        with self._free:
            if self._holder == threading.get_ident():  # a method that is run by what a message says
                raise RuntimeError("a call while a message is read")
            self._num_waiting += 1
            self._free.wait_for(lambda: self._holder is None)
            self._num_waiting -= 1
            self._holder = threading.get_ident()

    def __exit__(self, *_: Any) -> None:
        with self._free:
            self._holder = None
            self._free.notify_all()

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Let other threads write, until the body has ended and they have done so."""
        loan = object()
        with self._free:
            self._loans.append(loan)
            self._holder = None
            self._free.notify_all()
        try:
            yield
        finally:
            with self._free:
                self._free.wait_for(lambda: self._holder is None and self._num_waiting == 0 and self._loans[-1] is loan)
                self._loans.remove(loan)
                self._holder = threading.get_ident()
                self._free.notify_all()
