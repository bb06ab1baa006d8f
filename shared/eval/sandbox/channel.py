"""Messages between processes: a length, then so many bytes."""

import os
import struct

from shared.eval.sandbox.codec import MAX_BYTES, NotPlainError

_CHUNK = 1 << 20
_ENVELOPE = 1 << 10


class Channel:
    """One end of a pair of sockets."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, message: bytes) -> None:
        """Send a message.

        Raises:
            OSError: the other end is gone.
        """
        write_all(self._descriptor, struct.pack("<Q", len(message)) + message)

    def receive(self) -> bytes | None:
        """The next message; None where the other end is gone.

        Raises:
            NotPlainError: it is larger than any message may be.
        """
        head = self._read(8)
        if head is None:
            return None
        (size,) = struct.unpack("<Q", head)
        if size > MAX_BYTES + _ENVELOPE:
            raise NotPlainError("a message too large")
        return self._read(size)

    def _read(self, size: int) -> bytes | None:
        message = bytearray()
        while len(message) < size:
            try:
                chunk = os.read(self._descriptor, min(size - len(message), _CHUNK))
            except ConnectionResetError:  # gone with something of ours unread
                return None
            if not chunk:
                return None
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
