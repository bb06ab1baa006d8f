"""An HTTP server on 127.0.0.1 that runs in the background of a test."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers requests; `state` is the server they were sent to. Nothing is logged."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass


class BackgroundServer:
    """Serves from `with` on until its end, each request in a thread; `url` is its address."""

    def __init__(self, handler, host="127.0.0.1"):
        self._server = ThreadingHTTPServer((host, 0), type("Handler", (handler,), {"state": self}))
        self.url = f"http://{host}:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
