"""A connection to a collector: whatever comes back over a real socket is read, or said to be wrong.

And what OpenTelemetry's client leaves out: redirects, rejected items, a wish to be left alone.
"""

import socket
import threading
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from lepton.telemetry import delivery, exporters
from lepton.telemetry.connection import MOST_BYTES, Connection, Reply
from lepton.telemetry.delivery import Delivery
from tests.unit.collector import Collector


class Scripted:
    """Answers the requests of each connection with the given bytes, then closes it.

    Attributes:
        came: what was asked, a request an item.
    """

    def __init__(self, *connections: Sequence[bytes]) -> None:
        self.came: list[bytes] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/v1/traces"
        self._thread = threading.Thread(target=self._run, args=(connections,), daemon=True)
        self._thread.start()

    def _run(self, connections: Sequence[Sequence[bytes]]) -> None:
        for answers in connections:
            with self._server.accept()[0] as found:
                for answer in answers:
                    self.came.append(_request(found))
                    found.sendall(answer)

    def close(self) -> None:
        self._thread.join(30)
        self._server.close()


def _request(found: socket.socket) -> bytes:
    have = b""
    while b"\r\n\r\n" not in have:
        have += found.recv(1000)
    head, _, body = have.partition(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < size:
        body += found.recv(1000)
    return head + b"\r\n\r\n" + body


def _asked(connection: Connection, scripted: Scripted, data: bytes = b"spans") -> Reply:
    return connection.request("POST", scripted.url, headers={"x-key": "1"}, timeout=30, data=data)


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes"
CHUNKED = b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nye\r\n1;x=y\r\ns\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (PLAIN, b"yes"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN, b"yes"),
        (CHUNKED, b"yes"),
        (b"HTTP/1.1 200 OK\r\ncontent-length:0\r\nx:\r\n\r\n", b""),
    ],
    ids=["length", "announced", "chunked", "empty"],
)  # fmt: skip
def test_a_connection_is_kept_between_answers(answer: bytes, body: bytes) -> None:
    scripted, connection = Scripted([answer, answer]), Connection()
    replies = [_asked(connection, scripted) for _ in range(2)]
    connection.close()
    scripted.close()

    assert [(r.status_code, r.content(), r.error) for r in replies] == [(200, body, None)] * 2
    asked = b"POST /v1/traces HTTP/1.1\r\nHost: 127.0.0.1"
    assert all(c.startswith(asked) and c.endswith(b"\r\n\r\nspans") for c in scripted.came)
    assert all(b"\r\nx-key: 1\r\n" in c for c in scripted.came)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
    ids=["told", "old", "without a length"],
)
def test_a_connection_that_is_to_be_closed_is_not_used_again(answer: bytes) -> None:
    scripted, connection = Scripted([answer], [answer]), Connection()
    assert [_asked(connection, scripted).status_code for _ in range(2)] == [200, 200]
    scripted.close()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", ConnectionError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nye", ConnectionError),
        (b"SSH-2.0-server\r\n\r\n", ValueError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", ValueError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\nye", ValueError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\nye", ValueError),
        (b"HTTP/1.1 200 OK\r\nx: " + b"x" * 3 * MOST_BYTES, ValueError),
    ],
    ids=["none", "half", "no HTTP", "no length", "less than nothing", "a part of that", "endless"],
)
def test_what_is_no_answer_is_an_error_and_the_next_one_begins_anew(
    answer: bytes, kind: type[Exception]
) -> None:
    good = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
    scripted, connection = Scripted([answer], [good]), Connection()
    error = _asked(connection, scripted).error
    again = _asked(connection, scripted)
    connection.close()
    scripted.close()

    assert isinstance(error, kind)
    assert connection.is_connection_error(error) is (kind is ConnectionError)
    assert again.status_code == HTTPStatus.ACCEPTED


def test_nobody_waits_without_end_and_no_header_is_two() -> None:
    connection = Connection()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        slow = connection.request("POST", url, timeout=0.05, data=b"x")
        split = connection.request("POST", url, headers={"a": "b\r\nc: d"}, timeout=30)
    assert isinstance(slow.error, TimeoutError)
    assert not connection.is_connection_error(slow.error)
    assert "line break" in str(split.error)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    found = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
    monkeypatch.setattr(delivery, "PAUSE_S", 0.01)
    yield found
    found.close()


def _delivery() -> Delivery:
    found = Delivery("traces", exporters.spans, most=50, batch=10, delay_s=0.01)
    for _ in range(10):
        found.put(b"")
    return found


def test_spans_that_a_collector_rejects_are_counted_and_said_once(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    answer = ExportTraceServiceResponse()
    answer.partial_success.rejected_spans = 3
    answer.partial_success.error_message = "too old"
    collector.answer = answer.SerializeToString()
    waiting = _delivery()
    assert not waiting.flush(30)
    assert waiting.dropped == 3
    said = [r.getMessage() for r in caplog.records]
    assert sum("rejected" in line and "(too old), 3 at first" in line for line in said) == 1


def test_a_redirect_is_no_success(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    collector.status, collector.headers = 307, {"Location": "https://elsewhere/v1/traces"}
    waiting = _delivery()
    assert not waiting.flush(30)
    assert waiting.dropped == 10
    assert "it is at https://elsewhere/v1/traces" in caplog.text


def test_what_a_collector_cannot_read_is_not_sent_again(collector: Collector) -> None:
    collector.status = 400
    waiting = _delivery()
    assert not waiting.flush(30)
    assert (waiting.dropped, collector.requests) == (10, 1)


@pytest.mark.parametrize(
    ("told", "wait_s"), [("7", 7), ("-1", 0), ("1e9", exporters.LONGEST_WAIT_S), ("soon", 0)]
)
def test_a_busy_collector_is_left_alone_as_long_as_it_wants(
    collector: Collector, told: str, wait_s: float
) -> None:
    collector.status, collector.headers = 429, {"Retry-After": told}
    heard = exporters.Heard(Connection(), "logs")
    heard.request("POST", f"{collector.url}/v1/logs", data=b"", timeout=30)
    heard.close()
    assert exporters.answered.pop("logs").wait_s == wait_s


def test_a_clock_that_is_put_back_makes_no_request_longer() -> None:
    asked: list[float] = []

    class Kept(Connection):
        def request(self, method: str, url: str, **given: Any) -> Reply:
            asked.append(given["timeout"])
            return Reply(503, "Busy")

    heard = exporters.Heard(Kept(), "logs", 10)
    for left in (3600.0, 2.0):
        heard.request("POST", "http://127.0.0.1:9", timeout=left)
    assert asked == [10, 2]
    assert exporters.answered.pop("logs").error == "status 503 Busy"


def test_it_is_said_what_went_wrong(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = Scripted(*[[b""]] * 20)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", scripted.url.removesuffix("/v1/traces"))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    monkeypatch.setattr(delivery, "PAUSE_S", 0.01)
    waiting = _delivery()
    assert not waiting.flush(30)
    assert waiting.dropped == 10
    assert "closed the connection before its answer was over" in caplog.records[0].getMessage()
    assert {r.__dict__["about"] for r in caplog.records} == {"traces"}


def test_a_busy_collector_gets_everything_in_the_end(collector: Collector) -> None:
    collector.status, collector.headers = 503, {"Retry-After": "0.01"}
    waiting = _delivery()
    assert collector.wait_for(lambda c: c.requests >= 2)
    collector.status = 200
    assert waiting.flush(30)
    assert waiting.dropped == 0
