"""A bad way to an S3 server, for tests: ``python lake_proxy.py PORT URL EVERY``.

About every n-th request runs into trouble, one kind after another: refused (503 SlowDown), the
connection closed before the request is passed on, or after it (the answer is lost), the answer cut
off in its middle, or no answer at all for as long as the caller waits. The rest is passed on.
``GET /troubles`` tells how often each kind was.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import threading
from collections import Counter
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import urlsplit

KINDS = ("refused", "closed", "lost", "cut", "stalled")
PASSED = ("host", "connection", "transfer-encoding", "content-length")


class Way(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    every = 1
    dice = random.Random(1)
    lock = threading.Lock()
    told: ClassVar[Counter[str]] = Counter()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def pass_on(self) -> None:
        """Answer one request, or not."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/troubles":
            self.answer(200, [], json.dumps(self.told).encode())
            return
        kind = self.trouble()
        if kind == "refused":
            self.answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
        elif kind == "closed":
            self.cut_off()
        elif kind == "stalled":
            self.connection.settimeout(60)
            with suppress(OSError):
                self.connection.recv(1)  # until the caller has had enough of it
            self.cut_off()
        else:
            self.forward(body, kind)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on  # noqa: N815 - http.server's names

    def trouble(self) -> str | None:
        """The trouble that this request runs into, if it does."""
        with self.lock:
            if self.dice.random() * self.every >= 1:
                return None
            kind = KINDS[self.told.total() % len(KINDS)]
            self.told[kind] += 1
            return kind

    def forward(self, body: bytes, kind: str | None) -> None:
        """Ask the server, and give its answer as far as it goes."""
        server = HTTPConnection(self.upstream, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in PASSED[1:]}
        server.request(self.command, self.path, body=body, headers=headers)
        got = server.getresponse()
        data = got.read()
        server.close()
        if kind == "lost":
            self.cut_off()
            return
        kept = [(k, v) for k, v in got.getheaders() if k.lower() not in PASSED]
        length = int(got.headers.get("Content-Length") or len(data))
        self.answer(got.status, kept, data[: len(data) // 2] if kind == "cut" else data, length)
        if kind == "cut":
            self.cut_off()

    def answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, length: int | None = None
    ) -> None:
        """Send an answer."""
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def cut_off(self) -> None:
        """Close the connection in the middle of what goes on."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    Way.upstream, Way.every = urlsplit(sys.argv[2]).netloc, int(sys.argv[3])
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Way)
    server.daemon_threads = True
    server.serve_forever()
