"""A connection to a collector without TLS: kept open, with nothing between it and the socket.

OpenTelemetry's exporters take whatever has :meth:`Connection.request` as their transport; headers,
compression, tries again and time limits stay theirs. An answer is read by RFC 9112, no more of it
than an OTLP answer needs.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

MOST_BYTES = 2**16
"""Of an answer: a longer one is not OTLP's."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a collector answered, or why it did not; what an exporter asks of a transport.

    Attributes:
        status_code: None if there was no answer.
        reason: the status in words.
        error: what went wrong.
        told: headers by their names in small letters.
        body: without its coding.
    """

    status_code: int | None = None
    reason: str | None = None
    error: Exception | None = None
    told: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""

    def headers(self) -> Mapping[str, str]:
        """Return the headers."""
        return self.told

    def content(self) -> bytes:
        """Return the body."""
        return self.body


class Connection:
    """One connection, for one thread, made when it is needed."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        data: bytes | None = None,
    ) -> Reply:
        """Ask, and wait for the answer.

        Args:
            method: such as POST.
            url: begins with ``http://``.
            headers: of the request.
            timeout: seconds, for all of it.
            data: the body.
        """
        try:
            end = time.monotonic() + (timeout if timeout is not None else 10.0)
            head = _head(method, url, headers or {}, len(data or b""))
            found = self._socket or self._connect(url, end)
            _send(found, head, data or b"", end)
            reply, stays = _read(found, end)
        except (OSError, ValueError) as e:
            self.close()
            return Reply(error=e)
        if not stays:
            self.close()
        return reply

    def is_connection_error(self, exception: Exception | None) -> bool:
        """Whether it is worth another try at once: a kept connection may have been closed."""
        return isinstance(exception, OSError) and not isinstance(exception, TimeoutError)

    def close(self) -> None:
        """Close it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self, url: str, end: float) -> socket.socket:
        where = urlsplit(url)
        address = (where.hostname or "localhost", where.port or 80)
        self._socket = socket.create_connection(address, _left(end))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket


def _head(method: str, url: str, headers: Mapping[str, str], size: int) -> bytes:
    where = urlsplit(url)
    target = (where.path or "/") + (f"?{where.query}" if where.query else "")
    lines = [f"{method} {target} HTTP/1.1", f"Host: {where.netloc.rpartition('@')[2]}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append(f"Content-Length: {size}")
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header of OTEL_EXPORTER_OTLP_HEADERS has a line break in it")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _send(to: socket.socket, head: bytes, body: bytes, end: float) -> None:
    """Send both by one call if they fit, as nearly always; a body may be large: no copy of it."""
    to.settimeout(_left(end))
    sent = to.sendmsg([head, body])
    if sent < len(head):
        to.sendall(head[sent:])
    if sent < len(head) + len(body):
        to.settimeout(_left(end))
        to.sendall(memoryview(body)[max(0, sent - len(head)) :])


def _read(found: socket.socket, end: float) -> tuple[Reply, bool]:
    """Return an answer, and whether the connection can be used again."""
    status, version = 100, ""
    rest, reply = b"", Reply()
    while status < 200:  # those of 1xx announce another one
        head, rest = _until(found, rest, b"\r\n\r\n", end)
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, status_line = first.partition(" ")
        code, _, reason = status_line.partition(" ")
        if not version.startswith("HTTP/1.") or not code.isdigit():
            raise ValueError(f"this is no HTTP: {first[:60]!r}")
        pairs = (line.partition(":") for line in lines)
        told = {name.strip().lower(): value.strip() for name, _, value in pairs}
        status, reply = int(code), Reply(int(code), reason, told=told)
    body, whole = _body(found, rest, reply.told, end)
    stays = whole and version == "HTTP/1.1" and reply.told.get("connection", "").lower() != "close"
    return Reply(status, reply.reason, told=reply.told, body=body), stays


def _body(
    found: socket.socket, rest: bytes, told: Mapping[str, str], end: float
) -> tuple[bytes, bool]:
    """Return a body, and whether its end is known without the connection's."""
    if told.get("transfer-encoding", "").lower() == "chunked":
        parts: list[bytes] = []
        while True:
            line, rest = _until(found, rest, b"\r\n", end)
            size = _size(line.partition(b";")[0].strip(), 16)
            if size == 0:
                _until(found, b"\r\n" + rest, b"\r\n\r\n", end)  # trailers, which say nothing here
                return b"".join(parts), True
            part, rest = _exactly(found, rest, size + 2, end)
            parts.append(part[:size])
    if "content-length" in told:
        return _exactly(found, rest, _size(told["content-length"].encode(), 10), end)[0], True
    return rest, False


def _size(digits: bytes, base: int) -> int:
    size = int(digits, base)
    if size < 0:
        raise ValueError(f"its answer is to be {size} bytes long")
    return size


def _exactly(found: socket.socket, have: bytes, size: int, end: float) -> tuple[bytes, bytes]:
    while len(have) < size:
        have += _more(found, have, end)
    return have[:size], have[size:]


def _until(found: socket.socket, have: bytes, mark: bytes, end: float) -> tuple[bytes, bytes]:
    while mark not in have:
        have += _more(found, have, end)
    before, _, after = have.partition(mark)
    return before, after


def _more(found: socket.socket, have: bytes, end: float) -> bytes:
    if len(have) > MOST_BYTES:
        raise ValueError(f"its answer is longer than {MOST_BYTES} bytes")
    found.settimeout(_left(end))
    more = found.recv(MOST_BYTES)
    if not more:
        raise ConnectionResetError("the collector closed the connection before its answer was over")
    return more


def _left(end: float) -> float:
    """Seconds until a moment; never none, which would be another mode of a socket."""
    return max(0.001, end - time.monotonic())
