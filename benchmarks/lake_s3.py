"""An S3 server for tests, with the troubles of a real one: ``python lake_s3.py PORT``.

Runs in an environment that has ``moto[server]``; needs nothing else. Keys with ``busy`` in them are
refused (503) when a request first comes; of keys with ``lost`` a commit is done, and its answer
lost. Requests are done one at a time: moto compares and sets in two steps, so of two conditional
puts at once both could win.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

Answer = Callable[..., Any]


class Troubled:
    """A WSGI application around moto's."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self._inner = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._seen: set[tuple[str, ...]] = set()

    def __call__(self, environ: dict[str, Any], answer: Answer) -> Iterable[bytes]:
        """Answer one request, whole, before the next."""
        method, path, query = (environ[k] for k in ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING"))
        asked = (method, path, query, environ.get("HTTP_RANGE", ""))
        with self._lock:
            first = asked not in self._seen
            self._seen.add(asked)
            if first and "busy" in f"{path}?{query}":
                return _refused(answer)
            if first and method == "PUT" and "/lost" in path and path.endswith(".json"):
                list(self._inner(environ, lambda *_: None))
                return _refused(answer)
            return list(self._inner(environ, answer))


def _refused(answer: Answer) -> list[bytes]:
    answer("503 Slow Down", [("Content-Type", "application/xml")])
    return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), Troubled(), threaded=True)
