"""An event loop for `asyncio` that waits for nothing but other threads: programs have no sockets to wait for."""

import asyncio
import threading
from typing import Any


class _Waiting:
    """In the place of a selector: what the loop waits with, until something is to be run or a thread wakes it."""

    def __init__(self) -> None:
        self._woken = threading.Event()

    def select(self, timeout: float | None) -> list[Any]:
        """Wait so many seconds; None for as long as it takes."""
        self._woken.wait(timeout)
        self._woken.clear()
        return []

    def wake(self) -> None:
        """End the wait."""
        self._woken.set()


class EventLoop(asyncio.BaseEventLoop):
    """Callbacks, timers, tasks and executors. What needs a file, a socket or a process is not implemented."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _Waiting()

    def _process_events(self, events: list[Any]) -> None:
        """There are none but those that the loop keeps itself."""

    def _write_to_self(self) -> None:
        self._selector.wake()


def install() -> None:
    """Make it the loop of this process and its children."""
    policy: Any = asyncio.DefaultEventLoopPolicy
    policy._loop_factory = EventLoop
    for name in ("SelectorEventLoop", "EventLoop"):
        setattr(asyncio, name, EventLoop)
