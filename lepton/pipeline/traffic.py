"""Real HTTP clients that keep asking, and what came back."""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import orjson
import pyarrow as pa

from lepton.serving import App
from lepton.serving.protocol import outputs_of_reply, request_of
from lepton.telemetry import Carrier

CLIENTS = 4
PAUSE_S = 0.04


@dataclass
class Traffic:
    """Requests under way from several clients; use as a context manager.

    Attributes:
        sent: requests answered or failed so far. failed: those not answered with 200.
        versions: how many answers each version gave.
        latencies_ms: of each answer. errors: what went wrong, at most a few.
        answers: row index to the newest answer: class, its probability, version.
    """

    app: App
    rows: pa.Table
    trace: Carrier
    sent: int = 0
    failed: int = 0
    versions: dict[str, int] = field(default_factory=dict[str, int])
    latencies_ms: list[float] = field(default_factory=list[float])
    errors: list[str] = field(default_factory=list[str])
    answers: dict[int, tuple[int, float, str]] = field(
        default_factory=dict[int, tuple[int, float, str]]
    )
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list[threading.Thread])

    def __enter__(self) -> Traffic:
        described = httpx.get(f"{self.app.url}/v2/models/{self.app.model}", timeout=30).json()
        for client in range(CLIENTS):
            thread = threading.Thread(target=self._ask, args=(client, described["inputs"]))
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, requests: int) -> None:
        """Wait until so many requests have been made."""
        while self.sent < requests and any(t.is_alive() for t in self._threads):
            time.sleep(0.05)

    def _ask(self, client: int, inputs: list[dict[str, Any]]) -> None:
        at = client
        headers = self.trace.headers
        with httpx.Client(timeout=30, headers=headers) as http:
            while not self._stop.is_set():
                row = at % len(self.rows)
                body = request_of(self.rows.slice(row, 1), inputs, uuid.uuid4().hex)
                began = time.perf_counter()
                try:
                    reply = http.post(self.app.infer_url, content=body)
                except httpx.HTTPError as e:
                    self._note(row, None, 0.0, f"{type(e).__name__}: {e}")
                else:
                    error = "" if reply.status_code == 200 else reply.text[:200]
                    self._note(row, reply, (time.perf_counter() - began) * 1e3, error)
                at += CLIENTS
                self._stop.wait(PAUSE_S)

    def _note(self, row: int, reply: httpx.Response | None, ms: float, error: str) -> None:
        with self._lock:
            self.sent += 1
            if error or reply is None:
                self.failed += 1
                self.errors = [*self.errors[:4], error]
                return
            body = orjson.loads(reply.content)
            version = body["model_version"]
            self.versions[version] = self.versions.get(version, 0) + 1
            self.latencies_ms.append(ms)
            scores = next(iter(outputs_of_reply(reply.content).values()))[0]
            odds = np.exp(scores - scores.max())
            best = int(scores.argmax())
            self.answers[row] = (best, float(odds[best] / odds.sum()), version)
