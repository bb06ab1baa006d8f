"""Calls between solver and checker. Each may call what the other has let it have a proxy of, also during a call."""

from collections.abc import Callable
from typing import Any

from shared.eval.sandbox.channel import Channel
from shared.eval.sandbox.exceptions import described
from shared.eval.sandbox.surroundings import Surroundings
from shared.eval.sandbox.values import Decoder, Encoder, NotPlainError, Table

CALL, RETURN, RAISE, REFUSED = b"C", b"R", b"X", b"F"


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
        before_call: called before each call of this side.
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
        before_call: Callable[[], None] = lambda: None,
    ) -> None:
        self.table = table
        self.num_received_bytes = self.deepest_received = 0
        self._before_call = before_call
        self._channel, self._methods, self._surroundings, self._exact = channel, methods, surroundings, exact
        self._proxy = proxy

    def call(self, number: int, method: str, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Any:
        """Do something with an object of the other side; calls that come back meanwhile are answered.

        Raises:
            NotPlainError: the arguments cannot cross.
            RefusedError: the answer was too large, or malformed.
            GoneError: the other side has ended.
            BaseException: whatever the call raised.
        """
        self._before_call()
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
        except BaseException as error:  # of what it returned or left behind, too
            self._channel.send(REFUSED + described(error).encode("utf-8", "replace"))

    def _send(self, how: bytes, values: list[Any]) -> None:
        """What has changed, the surroundings, and values, which become known to the other side."""
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
        try:
            self._channel.send(how + encoder.take())
        except OSError as error:
            raise GoneError from error
        self.table.agree([*changed, *range(first_new, self.table.next_number)])

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
            how = message[:1]
            if how not in (CALL, RETURN, RAISE):
                raise RefusedError(message[1:].decode("utf-8", "replace"))
            decoder = Decoder(self.table, message[1:], proxy=lambda *described: self._proxy(self, *described))
            changed = decoder.changes()
            surroundings, count = decoder.decode(), decoder.decode()
            values = [decoder.decode() for _ in range(count)]
        except (NotPlainError, MemoryError, TypeError) as error:
            raise RefusedError(str(error)) from None
        self.num_received_bytes += len(message)
        self.deepest_received = max(self.deepest_received, decoder.deepest)
        self._surroundings.give(surroundings)
        self.table.agree([*changed, *range(decoder.first_new, self.table.next_number)])
        return how, values
