"""Messages between processes: a length, then so many bytes."""

import os
import struct

from shared.eval.sandbox.codec import MAX_BYTES

_CHUNK = 1 << 20
_ENVELOPE = 1 << 10


class GoneError(Exception):
    """The other side has ended."""


class RefusedError(Exception):
    """The other side's answer is too large or malformed."""


class Channel:
    """One end of a pair of sockets."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, message: bytes) -> None:
        """Send a message; a `GoneError` says that the other end is gone."""
        try:
            write_all(self._descriptor, struct.pack("<Q", len(message)) + message)
        except OSError as error:
            raise GoneError from error

    def receive(self) -> bytes:
        """The next message.

        Raises:
            GoneError: the other end is gone.
            RefusedError: the message is larger than any may be, or than memory.
        """
        (size,) = struct.unpack("<Q", self._read(8))
        if size > MAX_BYTES + _ENVELOPE:
            raise RefusedError("a message too large")
        try:
            return self._read(size)
        except MemoryError as error:
            raise RefusedError(str(error)) from None

    def _read(self, size: int) -> bytes:
        message = bytearray()
        while len(message) < size:
            try:
                chunk = os.read(self._descriptor, min(size - len(message), _CHUNK))
            except ConnectionResetError:  # gone with something of ours unread
                chunk = b""
            if not chunk:
                raise GoneError
            message += chunk
        return bytes(message)


def read_all(descriptor: int) -> bytes:
    """Everything up to the end."""
    chunks = []
    while chunk := os.read(descriptor, _CHUNK):
        chunks.append(chunk)
    return b"".join(chunks)


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
