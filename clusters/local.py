#!/usr/bin/env python
"""A Ray cluster of several nodes on this one machine, closed to everybody without its token.

    python clusters/local.py start --nodes 2 --dir /tmp/two-nodes
    eval "$(python clusters/local.py env --dir /tmp/two-nodes)"
    ray job submit -- python -c 'import ray; ray.init(); print(len(ray.nodes()))'
    python clusters/local.py stop --dir /tmp/two-nodes

Invariant: a cluster shares no port, temporary directory, token or process with any other Ray on
the machine, and ``stop`` ends this cluster's processes only. Every node is one ``ray start
--block`` in a session of its own, and every process below it inherits the mark ``MARK``, so
whatever leaves the session (the driver of a job does) is found again. The dashboard listens on
127.0.0.1; Ray's other ports listen on the machine's own address, where the token guards all but
the metrics and Serve's HTTP. Linux only, as are Ray clusters of several nodes on one machine.
"""

import argparse
import json
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
MARK = "LEPTON_LOCAL_CLUSTER"
STATE = "cluster.json"
START_SECONDS = 120
STOP_SECONDS = 20
# Below Linux's ephemeral range (32768 and up), so that no outgoing connection takes one of them.
PORTS = range(20_000, 32_000)
# A caller's own cluster must not leak into this one; RAY_AUTH_TOKEN would beat our token file.
CALLER_ONLY = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
)


def free_ports(count: int) -> list[int]:
    """Return distinct ports on which nothing listens now."""
    ports: list[int] = []
    # Not cryptography: any free port will do.
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise SystemExit(f"no {count} free ports between {PORTS.start} and {PORTS.stop}")


def write_token(path: Path) -> None:
    """Write a fresh token that only this user can read, from its first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def exports(state: dict[str, Any]) -> dict[str, str]:
    """Return the variables by which drivers and ``ray job submit`` find this cluster."""
    return {
        "RAY_ADDRESS": state["address"],
        "RAY_API_SERVER_ADDRESS": state["dashboard"],
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": state["token_path"],
    }


def node_environment(directory: Path) -> dict[str, str]:
    """Return the environment of the cluster's processes."""
    kept = {name: value for name, value in os.environ.items() if name not in CALLER_ONLY}
    here = str(Path(sys.executable).parent)
    # By default a node that is told to end waits 30 s for its work to move elsewhere.
    impatient = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    return (
        impatient
        | kept
        | {
            "PATH": os.pathsep.join([here, kept.get("PATH", os.defpath)]),  # jobs say `python`
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            MARK: str(directory),
        }
    )


def node_command(state: dict[str, Any], index: int, options: argparse.Namespace) -> list[str]:
    """Return the ``ray start`` command of one node; node 0 is the head."""
    ports = free_ports(5)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    command += ["--disable-usage-stats", f"--node-name=node-{index}"]
    command += [f"--temp-dir={state['temp_dir']}/{index}", f"--num-cpus={options.cpus}"]
    command += [f"--object-store-memory={options.object_store_mb << 20}", "--num-gpus=0"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--dashboard-agent-listen-port={ports[0]}"]
    command += [f"--dashboard-agent-grpc-port={ports[1]}"]
    command += [f"--runtime-env-agent-port={ports[2]}", f"--metrics-export-port={ports[3]}"]
    if index > 0:
        return [*command, f"--address={state['address']}"]
    command += ["--head", f"--port={state['address'].rpartition(':')[2]}"]
    command += [f"--dashboard-host={HOST}", f"--ray-client-server-port={ports[4]}"]
    return [*command, f"--dashboard-port={state['dashboard'].rpartition(':')[2]}"]


def start_node(state: dict[str, Any], index: int, options: argparse.Namespace) -> None:
    """Start one node in its own session and record it before anything else can fail."""
    with (options.dir / f"node-{index}.log").open("w") as log:
        process = subprocess.Popen(
            node_command(state, index, options),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=node_environment(options.dir),
            cwd=options.dir,
            start_new_session=True,
        )
    state["nodes"].append({"pid": process.pid, "born": born(process.pid)})
    write_state(options.dir, state)


def alive_nodes(state: dict[str, Any]) -> int:
    """Return how many nodes the cluster counts as alive; 0 while it does not answer."""
    token = Path(state["token_path"]).read_text()
    request = urllib.request.Request(
        f"{state['dashboard']}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
    except (OSError, ValueError, KeyError, TypeError):  # still starting
        return 0
    return sum(node["state"] == "ALIVE" for node in nodes)


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll until the condition holds; return whether it did before the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def start(options: argparse.Namespace) -> None:
    """Start the cluster, wait until all its nodes are alive, and print how to use it."""
    options.dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (options.dir / STATE).exists():
        raise SystemExit(f"{options.dir} holds a cluster already: stop it first")
    (options.dir / "token").unlink(missing_ok=True)
    write_token(options.dir / "token")
    gcs, dashboard = free_ports(2)
    state: dict[str, Any] = {
        "address": f"{HOST}:{gcs}",
        "dashboard": f"http://{HOST}:{dashboard}",
        "token_path": str(options.dir / "token"),
        # One folder a node below it: nodes that share one delete each other's working_dirs.
        # Short, because Ray puts sockets there, and a socket's path has at most 107 bytes.
        "temp_dir": tempfile.mkdtemp(prefix="lepton-ray-", dir="/tmp"),
        "nodes": [],
    }
    try:
        start_node(state, 0, options)
        wait_for_nodes(state, 1, options.dir)
        for index in range(1, options.nodes):
            start_node(state, index, options)
        wait_for_nodes(state, options.nodes, options.dir)
    except BaseException:
        stop(options)
        raise
    show_environment(options)


def wait_for_nodes(state: dict[str, Any], count: int, directory: Path) -> None:
    """Wait until ``count`` nodes are alive; end with a node's last words if one gave up."""

    def settled() -> bool:
        return alive_nodes(state) >= count or not all(map(is_running, state["nodes"]))

    if until(settled, START_SECONDS) and alive_nodes(state) >= count:
        return
    words = "\n".join(
        f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-15:])
        for path in sorted(directory.glob("node-*.log"))
    )
    raise SystemExit(f"the cluster in {directory} did not reach {count} nodes\n{words}")


def born(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def is_running(node: dict[str, int]) -> bool:
    """Tell whether a recorded process still runs (a recycled number is another process)."""
    return node["born"] is not None and born(node["pid"]) == node["born"]


def members(state: dict[str, Any], directory: Path) -> list[int]:
    """Return the process numbers of everything that runs in this cluster."""
    # A number cannot be given out again while a session of that number has members.
    sessions = {node["pid"] for node in state["nodes"] if born(node["pid"]) in (None, node["born"])}
    mark = f"{MARK}={directory}".encode()
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or born(int(entry.name)) is None:
            continue
        try:
            pid = int(entry.name)
            if os.getsid(pid) in sessions or mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return [pid for pid in found if pid != os.getpid()]


def send(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to each process that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def stop(options: argparse.Namespace) -> None:
    """End every process of the cluster, workers before the head, and keep its logs.

    Raises:
        SystemExit: a process survived even SIGKILL.
    """
    path = options.dir / STATE
    if not path.exists():
        print(f"no cluster in {options.dir}")
        return
    state = json.loads(path.read_text())
    for node in reversed(state["nodes"]):
        if is_running(node):
            send([node["pid"]], signal.SIGTERM)
            until(lambda node=node: not is_running(node), STOP_SECONDS)

    def ended() -> bool:
        left = members(state, options.dir)
        send(left, signal.SIGKILL)
        return not left

    if not until(ended, STOP_SECONDS):
        raise SystemExit(f"still running: {members(state, options.dir)}")
    keep_logs(Path(state["temp_dir"]), options.dir / "logs")
    (options.dir / "token").unlink(missing_ok=True)
    path.unlink()


def keep_logs(temp_dir: Path, target: Path) -> None:
    """Move the logs beside the cluster's state and remove Ray's temporary directory."""
    shutil.rmtree(target, ignore_errors=True)
    for logs in temp_dir.glob("*/session_latest/logs"):
        name = f"node-{logs.relative_to(temp_dir).parts[0]}"
        shutil.copytree(logs, target / name, ignore_dangling_symlinks=True)
    shutil.rmtree(temp_dir, ignore_errors=True)


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Write what ``stop`` and ``env`` need, whole or not at all."""
    partial = directory / f"{STATE}.partial"
    partial.write_text(json.dumps(state, indent=1))
    partial.replace(directory / STATE)


def read_state(directory: Path) -> dict[str, Any]:
    """Read the state of a started cluster."""
    try:
        return json.loads((directory / STATE).read_text())
    except FileNotFoundError:
        raise SystemExit(f"no cluster in {directory}: start one first") from None


def show_environment(options: argparse.Namespace) -> None:
    """Print the lines that point a shell at the cluster."""
    for name, value in exports(read_state(options.dir)).items():
        print(f"export {name}={shlex.quote(value)}")


def show_processes(options: argparse.Namespace) -> None:
    """Print how many nodes are alive and the cluster's process numbers, as JSON."""
    state = read_state(options.dir)
    pids = members(state, options.dir)
    print(json.dumps({"alive_nodes": alive_nodes(state), "processes": pids}))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="A Ray cluster of several nodes on one machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    words = {
        "start": (start, "start a cluster and print how to use it"),
        "stop": (stop, "end every process of the cluster"),
        "env": (show_environment, "print the export lines again"),
        "status": (show_processes, "print alive nodes and process numbers"),
    }
    for name, (function, text) in words.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--dir", type=lambda value: Path(value).resolve(), required=True)
        command.set_defaults(run=function)
    starter = commands.choices["start"]
    starter.add_argument("--nodes", type=int, default=2, help="nodes, head included")
    starter.add_argument("--cpus", type=int, default=2, help="logical CPUs of each node")
    starter.add_argument("--object-store-mb", type=int, default=256, help="of each node")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = parse()
    chosen.run(chosen)
