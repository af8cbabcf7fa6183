"""A running application, as those who ask it see it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from lepton.errors import ServingError
from lepton.serving import running, tables
from lepton.serving.asking import table_of
from lepton.serving.following import FOLLOW_S
from lepton.serving.sequences import LINES
from lepton.telemetry import Carrier

WAIT_S = 120.0
WAKE_S = 60.0
SETTLE_S = 2 * FOLLOW_S
SUCCESSOR_S = 30.0
"""How long one waits for the successor of a replica that died while it was asked."""
MOST_REPEATED = 2
"""How often a request is sent again whose replica is gone; predictions can be repeated."""


class ShortOfMemory(ServingError):  # noqa: N818 - what to do is to replace replicas one by one
    """A version does not fit beside the one that a replica serves."""


@dataclass(frozen=True)
class App:
    """A running application.

    Attributes:
        model: its name.
        url: where it answers, without a trailing slash; the Open Inference Protocol is below it.
        token: sent by :meth:`predict`; default that of ``LEPTON_SERVE_TOKEN``.
        application: what Serve calls it; it may have other models, too.
    """

    model: str
    url: str
    token: str = field(default="", repr=False)
    application: str = ""

    @property
    def infer_url(self) -> str:
        """Where inference requests are posted."""
        return f"{self.url}/v2/models/{self.model}/infer"

    @property
    def grpc_address(self) -> str:
        """Where it speaks gRPC, host:port.

        Raises:
            ServingError: it does not, or is not running.
        """
        told = [r["grpc"] for r in self.replicas() if r.get("grpc")]
        if not told:
            raise ServingError(
                f"model {self.model!r} is not served by gRPC: start it with "
                "service=Service(grpc_port=0)"
            )
        return str(told[0])

    def predict(self, rows: Any, *, trace: Carrier | None = None) -> dict[str, Any]:
        """Ask over HTTP and return outputs by name, NumPy arrays of shape (rows, …).

        Args:
            rows: raw rows: an Arrow table, a pandas frame, or a mapping of names to arrays or
                tensors; columns the model does not take are left out.
            trace: the span that asks.

        Raises:
            ServingError: the rows are not what the model takes; or no answer, or an error
                instead of one.
        """
        headers = dict(trace.headers) if trace else {}
        headers |= self._allowed
        headers |= {"content-type": tables.MEDIA_TYPE, "accept": tables.MEDIA_TYPE}
        headers |= {"x-request-id": uuid.uuid4().hex}
        try:
            described = _sent("GET", f"{self.url}/v2/models/{self.model}", self._allowed).json()
            body = tables.stream_of_rows(table_of(rows, _inputs(described)))
            reply = _sent("POST", self.infer_url, headers, body)
        except (httpx.HTTPError, ValueError, KeyError) as e:
            raise ServingError(f"{self.url} gives no answer: {e}; is it still running?") from e
        if reply.status_code != 200:
            raise ServingError(f"{self.infer_url} answered {reply.status_code}: {reply.text[:500]}")
        return tables.outputs_of_stream(reply.content)

    def generate(
        self, prompt: Sequence[int], *, trace: Carrier | None = None, **parameters: Any
    ) -> Iterator[int]:
        """Ask a sequence model and yield its tokens as they come; leaving off ends its work.

        Args:
            prompt: the tokens to go on from.
            trace: the span that asks.
            parameters: ``max_tokens``, ``temperature``, ``seed``, ``stop`` and ``timeout`` (µs).

        Raises:
            ServingError: it is no sequence model, or gives no answer.
        """
        url = f"{self.url}/v2/models/{self.model}"
        headers = (dict(trace.headers) if trace else {}) | self._allowed
        try:
            name = _inputs(httpx.get(url, headers=headers, timeout=30).json())[0]["name"]
            asked = {name: [int(t) for t in prompt], "parameters": parameters}
            headers["accept"] = LINES
            stream = httpx.stream(
                "POST", f"{url}/generate_stream", json=asked, headers=headers, timeout=120
            )
            with stream as reply:
                if reply.status_code != 200:
                    text = reply.read().decode()
                    raise ServingError(f"{reply.url} answered {reply.status_code}: {text[:500]}")
                yield from _tokens(reply)
        except (httpx.HTTPError, ValueError, KeyError) as e:
            raise ServingError(f"{self.url} gives no answer: {e}; is it still running?") from e

    @property
    def _allowed(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"} if self.token else {}

    def flush(self) -> None:
        """Have every replica commit its inference log and write its spans now.

        Raises:
            ServingError: the application is not running, or the lake did not take the log (the
                replicas keep it and try again).
        """
        if not all(self._broadcast("flush")):
            raise ServingError(
                f"the inference log of {self.model!r} could not be committed; the replicas' log "
                "says why, and they try again"
            )

    def replicas(self) -> list[dict[str, Any]]:
        """Return what each running replica serves, after it looked at the registry.

        Empty where all have gone because nobody asks.

        Raises:
            ServingError: the application is not running.
        """
        return self._broadcast("follow")

    def replace(self, which: str) -> dict[str, Any] | None:
        """Have one replica let go of its version, then load that of the pointer.

        Args:
            which: its ``id``.

        Returns:
            What it serves then; None if it is gone.

        Raises:
            ServingError: the application is not running.
        """
        return next((told for told in self._broadcast("replace", which) if told), None)

    def wish(self, replicas: int) -> None:
        """Have at least so many replicas, as far as the bounds allow; 0 ends that.

        Raises:
            ServingError: the application is not running.
        """
        self._broadcast("wish", replicas)

    def state(self) -> str:
        """Return how the application is, by what Ray Serve knows of its replicas.

        ``starting``: none answers yet. ``ready``: one does. ``asleep``: the last one has gone
        because nobody asks; a request starts one. ``failed``: none could be started. ``draining``:
        it is being closed. ``closed``: there is none.
        """
        return running.status().state(self.application)

    def reached(self) -> str:
        """Return the process id of a replica that the ingress sends requests to; empty for none."""
        with suppress(httpx.HTTPError, ValueError):
            told = httpx.get(f"{self.url}/v2/health/ready", timeout=30).json()
            return str(told.get("replica", ""))
        return ""

    def _broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every replica, for this model; again where one dies meanwhile."""
        end = time.monotonic() + SUCCESSOR_S
        while True:
            try:
                return self._asked(method, *args)
            except DeploymentUnavailableError as e:
                status = running.status().status(self.application)
                if status in ("DEPLOYING", "RUNNING"):
                    return []  # all have gone for want of requests, or none is there yet
                if status != "UNHEALTHY" or time.monotonic() > end:
                    raise ServingError(f"{self.model!r} has no replicas any more: {e}") from e
            except RayActorError as e:
                if time.monotonic() > end:
                    raise ServingError(f"replicas of {self.model!r} die when asked: {e}") from e
            except (RayServeException, TimeoutError, RayError) as e:
                raise ServingError(f"the replicas of {self.model!r} cannot be asked: {e}") from e
            time.sleep(FOLLOW_S)

    def _asked(self, method: str, *args: Any) -> list[Any]:
        handle = serve.get_app_handle(self.application)
        with ThreadPoolExecutor(1) as thread:  # a notebook's own thread runs an event loop
            asked = thread.submit(
                lambda: handle.broadcast(method, self.model, *args).results(timeout_s=WAIT_S)
            )
            return list(asked.result())

    def wait_for(self, seq: int, timeout_s: float = WAIT_S) -> None:
        """Wait until every replica serves the pointer of event ``seq`` or a later one.

        Raises:
            ShortOfMemory: a version does not fit beside the one that a replica serves.
            ServingError: a replica could not load a version, or time ran out.
        """
        began = time.monotonic()
        end = began + timeout_s
        while True:
            found = self.replicas()
            for told in found:
                if told["error"]:
                    kind = ShortOfMemory if told["short"] else ServingError
                    raise kind(f"a replica of {self.model!r} refused the version: {told['error']}")
            if found and all(r["seq"] >= seq for r in found):
                left = began + SETTLE_S - time.monotonic()
                if left <= 0:
                    return
                time.sleep(left)  # a replica just starting is not asked yet, but follows by itself
            if not found:
                self._wake(min(WAKE_S, max(1.0, end - time.monotonic())))
            if time.monotonic() > end:
                raise ServingError(f"replicas of {self.model!r} are behind event {seq}: {found}")

    def _wake(self, timeout_s: float) -> None:
        """Have a replica started where all have gone for want of requests.

        It starts as long as somebody waits for it: who gives up ends that, too.
        """
        with suppress(httpx.HTTPError):  # it is asked again
            httpx.get(f"{self.url}/v2/health/live", timeout=timeout_s)

    def close(self) -> None:
        """Stop the application, with all its models; what its replicas have logged is committed."""
        serve.delete(self.application)


def _sent(
    method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
) -> httpx.Response:
    """Send a request; where a replica was killed under it, send it again.

    The ingress does so itself where the request fits into its buffer.
    """
    how: Any = {"content": body, "headers": headers, "timeout": 60}
    for _ in range(MOST_REPEATED):
        with suppress(httpx.RemoteProtocolError, httpx.ReadError):
            reply = httpx.request(method, url, **how)
            if reply.status_code != 502:
                return reply
    return httpx.request(method, url, **how)


def _inputs(described: Mapping[str, Any]) -> Any:
    if "inputs" not in described:
        raise ServingError(f"the model's metadata cannot be had: {described.get('detail')}")
    return described["inputs"]


def _tokens(reply: httpx.Response) -> Iterator[int]:
    for line in reply.iter_lines():
        told = json.loads(line)
        if "error" in told:
            raise ServingError(f"{reply.url} ended with status {told['status']}: {told['error']}")
        if "token" in told:
            yield told["token"]
