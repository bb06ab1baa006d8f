"""An HTTP server of a folder on 127.0.0.1, with byte ranges and faults; only the standard library."""

import contextlib
import re
import threading
import time
import urllib.parse
from pathlib import Path

from tests.support.http_server import BackgroundServer, Handler


class FileServer(BackgroundServer):
    """The server; `requests` lists the files that were asked for.

    Faults: `drop_every` n-th answer ends in the middle; `stall_first` answer sends nothing for so many seconds; `down`
    closes every connection; `shift` moves every range; `flipped` names a file of which a byte is another; `ranges` off
    sends whole files. `bytes_per_second` and `delay_seconds` throttle all connections together, and each request.
    """

    def __init__(self, folder, *, delay_seconds=0.0, bytes_per_second=None):
        self.folder, self.requests = Path(folder), []
        self.drop_every, self.stall_first, self.down, self.flipped, self.ranges = 0, 0.0, False, None, True
        self.shift = 0
        self.delay_seconds, self.bytes_per_second = delay_seconds, bytes_per_second
        self.lock, self.free_at = threading.Lock(), 0.0
        super().__init__(_Handler)

    def wait_for_line(self, num_bytes):
        """Sleep as long as a line of `bytes_per_second` needs for these bytes after all earlier ones."""
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + num_bytes / self.bytes_per_second
            until = self.free_at
        time.sleep(max(until - time.monotonic(), 0))


class _Handler(Handler):
    def do_GET(self):
        state = self.state
        name = urllib.parse.unquote(self.path).lstrip("/")
        with state.lock:
            state.requests.append(name)
            number = len(state.requests)
            stall, state.stall_first = state.stall_first, 0.0
        if state.down:
            self.close_connection = True
            return
        time.sleep(state.delay_seconds + stall)
        file = state.folder / name
        if not file.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status, first = bytearray(file.read_bytes()), 200, 0
        if state.flipped == name:
            data[len(data) // 2] ^= 1
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found and state.ranges:
            first, status = int(found[1]) + state.shift, 206
            data = data[first : int(found[2]) + 1 if found[2] else None]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{file.stat().st_size}")
        self.end_headers()
        drops = state.drop_every and number % state.drop_every == 0
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(data) // 2 if drops else len(data), 1 << 18):
                piece = data[at : at + (1 << 18)] if not drops else data[: len(data) // 2][at : at + (1 << 18)]
                if state.bytes_per_second:
                    state.wait_for_line(len(piece))
                self.wfile.write(piece)
        if drops:
            self.close_connection = True
