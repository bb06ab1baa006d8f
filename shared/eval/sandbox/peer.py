"""Calls between solver and checker. Each may call what the other has let it have a proxy of, also during a call."""

import time
from collections.abc import Callable
from typing import Any

from shared.eval.sandbox import library
from shared.eval.sandbox.channel import Channel
from shared.eval.sandbox.exceptions import described
from shared.eval.sandbox.surroundings import Surroundings
from shared.eval.sandbox.values import MAX_BYTES, MAX_DEPTH, Decoder, Encoder, NotPlainError, Table

CALL, RETURN, RAISE, REFUSED = b"C", b"R", b"X", b"F"
# The system's share of a message: two processes are woken. Measured, 60 to 100 µs on two idle processors.
_SECONDS_PER_MESSAGE = 125e-6


class GoneError(Exception):
    """The other side has ended."""


class RefusedError(Exception):
    """The other side's answer is too large, too deep or malformed."""


class Peer:
    """One side of the channel.

    Args:
        channel: to the other side.
        table: the objects that both know.
        methods: what the other side may do with an object of this one, by name.
        proxy: makes the proxy of an object of the other side, of this peer, its number and what is said of it.
        surroundings: state of the process that crosses with every message.
        exact: refuse what is no plain data; see `Encoder`. Such a side also says which objects it has given up.
        count_transport: told, after each message, the seconds that it took both sides to pack, pass on and unpack.
    """

    def __init__(
        self,
        channel: Channel,
        table: Table,
        *,
        methods: dict[str, Callable[..., Any]],
        proxy: Callable[..., Any],
        surroundings: Surroundings,
        exact: bool,
        count_transport: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.table = table
        self._num_received_bytes = self._deepest_received = 0
        self._count_transport = count_transport
        self._channel, self._methods, self._surroundings, self._exact = channel, methods, surroundings, exact
        self._proxy = proxy

    @property
    def has_received_much(self) -> bool:
        """Whether answers so far may be what makes a later argument too large or too deep."""
        return self._num_received_bytes > MAX_BYTES // 8 or self._deepest_received > MAX_DEPTH // 8

    def call(self, number: int, method: str, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        """Do something with an object of the other side; calls that come back meanwhile are answered.

        Raises:
            NotPlainError: the arguments cannot cross.
            RefusedError: the answer was too large, or malformed.
            GoneError: the other side has ended.
            BaseException: whatever the call raised.
        """
        named = [part for pair in (keywords or {}).items() for part in pair]
        self._send(CALL, [number, method, len(arguments), *arguments, *named])
        while True:
            how, values = self._receive()
            if how == CALL:
                self.answer(values)
            elif len(values) != 1 or (how == RAISE and not isinstance(values[0], BaseException)):
                raise RefusedError("malformed data")
            elif how == RAISE:
                raise values[0]
            else:
                return values[0]

    def serve(self) -> None:
        """Answer calls until the other side has ended."""
        while True:
            try:
                how, values = self._receive()
            except GoneError:
                return
            if how == CALL:
                self.answer(values)

    def answer(self, request: list[Any]) -> None:
        """Do what the other side asks for, and send how it ended."""
        try:
            number, method, count, *rest = request
            if number not in self.table.exported:
                raise LookupError("no object to call")
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
        self._deliver(REFUSED + described(error).encode("utf-8", "replace"))

    def _send(self, how: bytes, values: list[Any]) -> None:
        """What has changed, the surroundings, and values, which become known to the other side."""
        start = time.perf_counter()
        first_new = self.table.next_number
        released = self.table.unreferenced() if self._exact else []
        for number in released:
            self.table.forget(number)
        encoder = Encoder(self.table, exact=self._exact)
        try:
            changed = self.table.changed()
            encoder.changes(released, changed)
            for value in (self._surroundings.take(), len(values), *values):
                encoder.encode(value)
        except BaseException:
            self.table.forget_from(first_new)
            raise
        self.table.agree([*changed, *range(first_new, self.table.next_number)])
        self._deliver(how + encoder.take())
        self._count(start)

    def _deliver(self, message: bytes) -> None:
        try:
            self._channel.send(message)
        except OSError as error:
            raise GoneError from error

    def _count(self, start: float) -> None:
        """Count a message that this side has packed or unpacked since then; the other side takes as long."""
        self._count_transport(_SECONDS_PER_MESSAGE + 2 * (time.perf_counter() - start))

    def _receive(self) -> tuple[bytes, list[Any]]:
        """How the other side answers, and with which values.

        Raises:
            RefusedError: it could not send its answer, or what it sent is malformed.
            GoneError: it has ended.
        """
        try:
            message = self._channel.receive()
            if message is None:
                raise GoneError
            start = time.perf_counter()
            how = message[:1]
            if how not in (CALL, RETURN, RAISE):
                raise RefusedError(message[1:].decode("utf-8", "replace"))
            decoder = Decoder(
                self.table,
                message[1:],
                proxy=lambda *described: self._proxy(self, *described),
                named=library.named if self._exact else library.any_named,
            )
            changed = decoder.changes()
            surroundings, count = decoder.decode(), decoder.decode()
            values = [decoder.decode() for _ in range(count)]
        except (NotPlainError, MemoryError, TypeError) as error:
            raise RefusedError(str(error)) from None
        self._num_received_bytes += len(message)
        self._deepest_received = max(self._deepest_received, decoder.deepest)
        self._surroundings.give(surroundings)
        self.table.agree([*changed, *range(decoder.first_new, self.table.next_number)])
        if not self._exact:
            self.table.note_unreachable()
        self._count(start)
        return how, values
