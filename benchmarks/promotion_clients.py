"""Clients that ask one address without pause, in a process of their own.

``python -m benchmarks.promotion_clients URL CLIENTS < body`` writes a line for each answer: when
the request was sent and answered (Unix seconds), and by which version; without one where it
failed. It knows no lepton: what the one who promotes computes meanwhile keeps no client waiting.
"""

from __future__ import annotations

import http.client
import os
import sys
import threading
import time
from urllib.parse import urlsplit


def ask(url: str, body: bytes) -> None:
    """Ask on one connection, without end."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
    while True:
        sent, version = time.time(), ""
        try:
            connection.request("POST", where.path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            reply.read()
            version = reply.headers["x-lepton-version"] if reply.status == 200 else ""
        except (OSError, http.client.HTTPException):
            connection.close()
        os.write(1, f"{sent} {time.time()} {version}\n".encode())


def main() -> None:
    """Ask until this process is ended."""
    url, body = sys.argv[1], sys.stdin.buffer.read()
    threads = [threading.Thread(target=ask, args=(url, body)) for _ in range(int(sys.argv[2]))]
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main()
