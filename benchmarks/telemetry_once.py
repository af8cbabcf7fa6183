"""One measurement of telemetry's cost, in a process of its own: a line of JSON.

Ways: ``home`` prepares a table and a served model, ``steps`` trains, ``requests`` answers without a
network, ``served`` answers through Ray Serve, ``server`` answers ``wrk`` until killed, ``block``
times every call, ``collector`` takes OTLP and throws it away, ``deaf`` accepts connections and
never answers.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BATCH, SKIPPED, WARM = 256, 1000, 3000
SAMPLED, UNSAMPLED = (f"00-{'12' * 16}-{'34' * 8}-{flag}" for flag in ("01", "00"))


def home(folder: str) -> dict[str, Any]:
    """Write a table, train on some of it, register and promote a version without starting Serve."""
    import numpy as np
    import pyarrow as pa

    import lepton
    from lepton.registry import Registry

    x = np.random.default_rng(0).normal(size=(BATCH * 4000, 16)).astype("float32")
    kind = pa.list_(pa.float32(), 16)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 16).cast(kind)
    rows = pa.table({"x": flat, "y": x.argmax(1).astype("int64")})
    table = lepton.write(rows, f"{folder}/t")
    few = lepton.write(rows.slice(0, 1000), f"{folder}/few")
    stream = few.stream(batch_size=100, lanes=1)
    run = lepton.train(_loop([], 20), stream, name="served", home=folder, progress=False)
    registry = Registry(f"{folder}/registry")
    for name in ("m", "off", "control"):
        lepton.register(run, name, metrics={}, home=folder)
        registry.promote(name, 1, expect=registry.state(name).pointer.seq, gate=[], trace_id="")
    return {"rows": table.count_rows()}


def steps(folder: str, count: int) -> dict[str, Any]:
    """Train; return wall and CPU seconds a step, of the whole process."""
    import torch

    import lepton

    torch.set_num_threads(1)
    table = lepton.table(f"{folder}/t")
    stream = table.stream(batch_size=BATCH, epochs=9, lanes=1, engine="worker")
    times: list[tuple[float, ...]] = []
    name = f"r{os.getpid()}"
    options: dict[str, Any] = {"home": folder, "checkpoint_every": 10**6, "progress": False}
    lepton.train(_loop(times, count), stream, name=name, **options)
    made = len(times) - 1 - SKIPPED
    names = ("wall", "cpu", "threads")
    spent = zip(names, times[SKIPPED], times[-1], strict=True)
    return {n: (end - begin) / made for n, begin, end in spent} | {"steps": made, "calls": _calls()}


def _calls() -> float:
    """Return what a step itself does for telemetry, CPU seconds, by doing that alone often."""
    from lepton import telemetry

    pace = telemetry.Pace(telemetry.Carrier(UNSAMPLED, None))
    pace.close()  # nobody takes the steps away meanwhile
    count, place = 200_000, (0, 1)
    began = time.thread_time()
    for n in range(count):
        asked = time.time_ns()
        got = time.time_ns()
        made = time.time_ns()
        pace.add(telemetry.Paced(n, asked, got, made, BATCH, place))
    return (time.thread_time() - began) / count


def telemetry_threads() -> float:
    """CPU seconds that telemetry's own threads have used."""
    used = 0.0
    for thread in threading.enumerate():
        if thread.name.startswith(("lepton-rounds", "lepton-telemetry", "lepton-spans")):
            spent = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
            used += int(spent.split()[0]) / 1e9
    return used


def _loop(times: list[tuple[float, ...]], count: int) -> Any:
    def loop(worker: Any) -> None:
        import torch
        from torch.nn import functional

        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(16, 128), torch.nn.ReLU(), torch.nn.Linear(128, 16)
        )
        worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.01))
        for made, batch in enumerate(worker.batches()):
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))
            ours = telemetry_threads() if made in (SKIPPED, count) else 0.0
            times.append((time.perf_counter(), time.process_time(), ours))
            if made == count:
                break

    return loop


def requests(folder: str, count: int) -> dict[str, Any]:
    """Answer requests one after another in this process; CPU seconds each, and spans recorded."""
    import pyarrow as pa

    from lepton import telemetry
    from lepton.serving.replica import Replica

    replica: Any = Replica("m", folder)
    replica._answers.add = lambda _: None  # the inference log's thread would be measured, too
    app = replica.__serve_build_asgi_app__()
    body = question(pa)
    asyncio.run(_ask(app, body, SAMPLED, WARM))
    time.sleep(1)  # the first ones were told and sent, and what that needs is loaded
    record, recorded_s = replica._keeper.span, [0.0]

    def timed(request: Any, came: Any) -> Any:
        began = time.thread_time()
        try:
            return record(request, came)
        finally:
            recorded_s[0] += time.thread_time() - began

    replica._keeper.span = timed
    threads = telemetry_threads()
    cpu = asyncio.run(_ask(app, body, SAMPLED, count))
    time.sleep(1)  # until what waits was told and sent
    threads = (telemetry_threads() - threads) / count
    calls = recorded_s[0] / count - _clock_s()
    replica._spans.flush()
    before = _spans(folder)
    unsampled = asyncio.run(_ask(app, body, UNSAMPLED, count // 5))
    replica._spans.flush()
    recorded = _spans(folder) - before
    replica.__del__()
    telemetry.flush(10_000)
    found = {"cpu": cpu, "threads": threads, "calls": calls}
    return found | {"unsampled_cpu": unsampled, "unsampled_spans": recorded}


def _clock_s() -> float:
    """CPU seconds that a pair of looks at the clock adds to what is between them."""
    looks = 20_000
    seen = sum(-time.thread_time() + time.thread_time() for _ in range(looks))
    return seen / looks


def question(pa: Any) -> bytes:
    """Return a request about two rows."""
    from lepton.serving.protocol import request_of

    rows = pa.table({"x": [[0.1] * 16] * 2})
    return request_of(rows, [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}])


async def _ask(app: Any, body: bytes, traceparent: str, count: int) -> float:
    """Return CPU seconds a request."""
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v2/models/m/infer",
        "raw_path": b"/v2/models/m/infer",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"traceparent", traceparent.encode()), (b"host", b"m")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        assert message.get("status", 200) == 200, message

    began = time.process_time()
    for _ in range(count):
        await app(dict(scope), receive, send)
    return (time.process_time() - began) / count


def _spans(folder: str) -> int:
    files = Path(folder, "traces").glob("*.jsonl")
    return sum(path.read_bytes().count(b'"lepton.request"') for path in files)


def served(folder: str, count: int) -> dict[str, Any]:
    """Answer requests through Ray Serve; CPU seconds a request of the replica's process."""
    import httpx
    import pyarrow as pa

    from lepton import cluster, promote

    cluster.connect()
    app = promote("m", home=folder)
    body = question(pa)
    mark = f"LEPTON_BENCH={os.environ['LEPTON_BENCH']}".encode()
    with httpx.Client() as client:

        def ask(n: int) -> float:
            began = time.perf_counter()
            for _ in range(n):
                headers = {"traceparent": SAMPLED}
                reply = client.post(app.infer_url, content=body, headers=headers, timeout=30)
                assert reply.status_code == 200, reply.text
            return (time.perf_counter() - began) / n

        ask(300)
        before = _cpu_of_replica(mark)
        wall = ask(count)
        cpu = (_cpu_of_replica(mark) - before) / count
    app.close()
    cluster.disconnect()
    return {"cpu": cpu, "wall": wall}


def _cpu_of_replica(mark: bytes) -> float:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            named = (path / "cmdline").read_bytes().startswith(b"ray::ServeReplica")
            if named and mark in (path / "environ").read_bytes():
                fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except OSError:
            continue
    raise AssertionError("no replica runs")


def block(folder: str, seconds: int) -> dict[str, Any]:
    """Call everything a caller calls, a thousand times a second; the longest call, and the end."""
    from lepton import telemetry

    log = logging.getLogger("lepton.bench")
    log.propagate = True
    logging.getLogger("lepton").addHandler(logging.NullHandler())
    logging.lastResort = None
    run = telemetry.Carrier(SAMPLED, f"{folder}/traces")
    telemetry.keep_logs(run, lambda: {"lepton.rank": 0}, Path(folder, "logs"))
    labels = {"lepton.model": "m"}
    telemetry.measuring()
    longest: list[float] = []
    without: list[float] = []
    blocked: list[float] = []
    pauses: list[float] = [0.0]
    gc.callbacks.append(_pauses_into(pauses))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pauses[0] = 0.0
        queued = _queued_s()
        began = time.perf_counter()
        telemetry.record("lepton.request", run, time.time_ns(), attributes=labels)
        telemetry.measure("lepton.serving.request.rows", 2, labels, trace=SAMPLED)
        log.warning("one of many")
        longest.append(time.perf_counter() - began)
        without.append(longest[-1] - pauses[0])
        blocked.append(longest[-1] - (_queued_s() - queued))
        time.sleep(0.001)
    began = time.perf_counter()
    telemetry.flush()
    ended = time.perf_counter() - began
    longest.sort()
    p999 = longest[-len(longest) // 1000 - 1]
    found = {"max": longest[-1], "without_gc": max(without), "blocked": max(blocked)}
    return found | {"p999": p999, "end": ended}


def _queued_s() -> float:
    """Seconds this thread was ready to run and had no processor: others on this machine had it."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def _pauses_into(total: list[float]) -> Any:
    """Add up what garbage collections take: their time depends on the whole heap."""
    began = [0.0]

    def note(phase: str, _: Any) -> None:
        if phase == "start":
            began[0] = time.perf_counter()
        else:
            total[0] += time.perf_counter() - began[0]

    return note


def collector() -> None:
    """Take OTLP and throw it away, until killed; print the port first."""

    class Requests(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    print(server.server_port, flush=True)
    server.serve_forever()


def deaf() -> None:
    """Accept connections and never answer, until killed; print the port first."""
    server = socket.create_server(("127.0.0.1", 0))
    print(server.getsockname()[1], flush=True)
    kept: list[socket.socket] = []
    while True:
        kept.append(server.accept()[0])


if __name__ == "__main__":
    way, *given = sys.argv[1:]
    if way == "server":
        from benchmarks.telemetry_load import serve

        serve(*given)
    if way in ("collector", "deaf"):
        {"collector": collector, "deaf": deaf}[way]()
    ways: dict[str, Any] = {
        "home": home, "steps": steps, "requests": requests, "served": served, "block": block,
    }  # fmt: skip
    print(json.dumps(ways[way](given[0], *map(int, given[1:]))))
