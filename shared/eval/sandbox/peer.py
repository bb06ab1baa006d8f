"""Calls between solver and checker. Each may call what the other has let it have a proxy of, also during a call."""

import time
from typing import Any

from shared.eval.sandbox.channel import Channel, GoneError, RefusedError
from shared.eval.sandbox.codec import Decoder, Encoder, NotPlainError
from shared.eval.sandbox.exceptions import described
from shared.eval.sandbox.proxies import PROGRAM_METHODS, TEST_METHODS
from shared.eval.sandbox.surroundings import Surroundings
from shared.eval.sandbox.table import Table
from shared.eval.sandbox.turn import Turn

CALL, RETURN, RAISE, REFUSED = b"C", b"R", b"X", b"F"
# The system's share of a message: two processes are woken. Measured, 60 to 100 µs on two idle processors.
_SECONDS_PER_MESSAGE = 125e-6


class Peer:
    """One side of the channel. Its threads take turns.

    Args:
        channel: to the other side.
        table: the objects that both know.
        surroundings: state of the process that crosses with every message.
        exact: of the test's side: see `Encoder` and `Decoder`. Such a side also says which objects it has given up, and
            lets the other only call its own.
    """

    def __init__(self, channel: Channel, table: Table, surroundings: Surroundings, *, exact: bool) -> None:
        self.table = table
        self.has_received = False
        self._channel, self._surroundings, self._exact = channel, surroundings, exact
        self._methods = TEST_METHODS if exact else PROGRAM_METHODS
        self._turn = Turn()

    def call(self, number: int, method: str, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        """Do something with an object of the other side; calls that come back meanwhile are answered.

        Raises:
            NotPlainError: the arguments cannot cross.
            RefusedError: the answer was too large, or malformed.
            GoneError: the other side has ended.
            BaseException: whatever the call raised.
        """
        named = [part for pair in (keywords or {}).items() for part in pair]
        with self._turn:
            self._send(CALL, [number, method, len(arguments), *arguments, *named])
            how, values = self._receive()
            while how == CALL:
                self.answer(values)
                how, values = self._receive()
        (outcome,) = values
        if how == RAISE:
            raise outcome
        return outcome

    def serve(self) -> None:
        """Answer calls until the other side has ended."""
        with self._turn:
            while True:
                try:
                    how, values = self._receive()
                except GoneError:
                    return
                if how == CALL:
                    self.answer(values)

    def answer(self, request: list[Any]) -> None:
        """Do what the other side asks for, and send how it ended."""
        with self._turn.lent():
            try:
                number, method, count, *rest = request
                if method not in self._methods or (number not in self.table.exported):
                    raise AttributeError("the test's objects can only be called")
                arguments, named = rest[:count], rest[count:]
                keywords = dict(zip(named[::2], named[1::2], strict=True))
                outcome, how = self._methods[method](self.table.objects[number], *arguments, **keywords), RETURN
            except BaseException as error:
                outcome, how = error, RAISE
        try:
            self._send(how, [outcome])
        except GoneError:
            raise
        except BaseException as error:  # of what it returned or left behind, too
            self.refuse(error)

    def refuse(self, error: BaseException) -> None:
        """Say that an answer cannot cross."""
        self._channel.send(REFUSED + described(error).encode("utf-8", "replace"))

    def doubt(self, reason: str) -> None:
        """Note that the program decides something that the test goes by."""

    def count_transport(self, seconds: float, *, is_own: bool) -> None:
        """Note the seconds that a message took both sides; `is_own`: it belongs to a call of this side."""

    def _send(self, how: bytes, values: list[Any]) -> None:
        """What has changed, the surroundings, and values, which become known to the other side."""
        start = time.perf_counter()
        first_new = self.table.next_number
        encoder = Encoder(self.table, exact=self._exact)
        try:
            changed = self.table.changed()
            for number in changed:
                encoder.change(number)
            if self._exact:  # what is given up may have changed before
                released = self.table.unreferenced()
                self.table.forget(released)
                encoder.release(released)
            for value in (self._surroundings.take(), *values):
                encoder.encode(value)
        except BaseException:
            self.table.forget_from(first_new)
            raise
        self.table.agree([*changed, *range(first_new, self.table.next_number)])
        self._channel.send(how + encoder.take())
        self._count(start, is_own=how == CALL)

    def _count(self, start: float, *, is_own: bool) -> None:
        """Count a message that this side has packed or unpacked since then; the other side takes as long."""
        self.count_transport(_SECONDS_PER_MESSAGE + 2 * (time.perf_counter() - start), is_own=is_own)

    def _receive(self) -> tuple[bytes, list[Any]]:
        """How the other side answers, and with which values.

        Raises:
            RefusedError: it could not send its answer, or what it sent is malformed.
            GoneError: it has ended.
        """
        try:
            message = self._channel.receive()
            self.has_received = True
            start = time.perf_counter()
            how = message[:1]
            if how not in (CALL, RETURN, RAISE):
                raise RefusedError(message[1:].decode("utf-8", "replace"))
            decoder = Decoder(self.table, message, self, exact=self._exact, start=1)
            surroundings, *values = decoder.decode()
            if how != CALL and (len(values) != 1 or (how == RAISE and not isinstance(values[0], BaseException))):
                raise NotPlainError("malformed data")
            self._surroundings.give(surroundings)
        except (NotPlainError, MemoryError, ValueError) as error:
            raise RefusedError(str(error)) from None
        self.table.agree([*decoder.changed, *range(decoder.first_new, self.table.next_number)])
        if not self._exact:
            self.table.note_unreachable()
        self._count(start, is_own=how != CALL)
        return how, values
