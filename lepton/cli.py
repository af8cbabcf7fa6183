"""The command line: thin over the public functions. ``lepton --help`` lists the commands."""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lepton.amounts import shares, workers
from lepton.errors import LeptonError
from lepton.pipeline.keeping import add_changes


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the process's exit status.

    0: done. 1: it failed, with the reason on standard error. 2: wrong usage. 130: interrupted.
    """
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a late call must not start a Ray anew
    signal.signal(signal.SIGTERM, _as_interrupt)
    console = Console()
    try:
        return int(arguments.run(arguments, console) or 0)
    except KeyboardInterrupt:
        return 130
    except (LeptonError, ValueError, TypeError) as e:
        Console(stderr=True).print(f"[bold red]lepton {arguments.command}:[/] ", end="")
        sys.stderr.write(f"{e}\n")
        return 1


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lepton", description=sys.modules["lepton"].__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[..., Any], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        return command

    demo = add(
        "demo", _demo, "the whole loop on handwritten digits, with a worker killed on the way"
    )
    demo.add_argument("--out", default="lepton-demo", help="where everything goes")
    demo.add_argument("--keep", action="store_true", help="leave the service running")

    train = add("train", _train, "run a training script, or a loop on a table")
    train.add_argument("script", help="FILE.py to run, or FILE.py:LOOP / MODULE:LOOP with --table")
    train.add_argument("--table", help="uri of the Delta table")
    train.add_argument("--version", type=int, help="its version; default the newest")
    train.add_argument("--where", help="SQL-like condition on its rows")
    train.add_argument("--batch-size", type=int, default=256)
    train.add_argument("--epochs", type=int, default=1)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--workers", type=workers, default=1, metavar="N or MIN-MAX")
    train.add_argument("--name", help="of the run")
    _home(train)

    _plans(add)
    _moves(add)
    serve = add("serve", _serve, "serve a model's champion, or those of several, until interrupted")
    serve.add_argument("model", nargs="+", help="several share their replicas")
    serve.add_argument(
        "--replicas", type=workers, default=1, metavar="N or MIN-MAX", help="0-N may sleep"
    )
    serve.add_argument("--port", type=int)
    serve.add_argument("--host", help="0.0.0.0 lets other machines ask; see LEPTON_SERVE_TOKENS")
    serve.add_argument(
        "--upgrade", action="store_true", help="replace running replicas, for new code or settings"
    )
    serve.add_argument("--grpc-port", type=int, help="speak gRPC there, too; 0 for a free one")
    _home(serve)

    score = add("score", _score, "answer every row of a table and write the answers to another")
    score.add_argument("model")
    score.add_argument("table", help="uri of the rows")
    score.add_argument("out", help="uri of the table of answers")
    score.add_argument("--version", type=int, help="of the model; default the champion")
    score.add_argument("--where", help="SQL-like condition on the rows")
    score.add_argument("--workers", type=workers, default=1, metavar="N or MIN-MAX")
    _home(score)

    _upkeep(add)
    _views(add)
    ingress = add("ingress", _ingress, "print what a node's `ray start` needs for HAProxy")
    ingress.add_argument(
        "--dir",
        default=f"/tmp/lepton-{os.getuid()}",  # noqa: S108 - a socket's path is short
        help="for its files and sockets, the same on every node",
    )
    doctor = add("doctor", _doctor, "check versions, Ray, GPU and storage, with advice")
    doctor.add_argument("--address", help="of a Ray cluster")
    doctor.add_argument("--deep", action="store_true", help="really start a local Ray")
    _home(doctor)
    return parser


def _plans(add: Any) -> None:
    plan = add("plan", _plan, "predict time and cost of a run, by its workers, from other runs")
    plan.add_argument("runs", nargs="+", metavar="RUN", help="several tell how it scales")
    plan.add_argument("--workers", type=workers, default=(1, 8), metavar="N or MIN-MAX")
    rows = plan.add_mutually_exclusive_group()
    rows.add_argument("--rows", type=int, help="to train on, over all epochs")
    rows.add_argument("--table", help="uri of the table to train on; see --epochs")
    plan.add_argument("--epochs", type=int, default=1, help="over the table")
    plan.add_argument("--deadline", metavar="SPAN", help="such as 2h, 1h30m or 45s")
    plan.add_argument("--price", type=float, help="of a worker (its GPU) for an hour")
    plan.add_argument("--for", dest="write_to", metavar="RUN", help="that says how far off it was")
    _json(plan)
    _home(plan)


def _moves(add: Any) -> None:
    """Commands that move a model's traffic."""
    promote = add("promote", _promote, "promote a model version behind a gate and serve it")
    promote.add_argument("model")
    promote.add_argument("version", type=int, nargs="?", help="default the newest")
    promote.add_argument("--gate", action="append", default=[])
    promote.add_argument("--shadow", type=float, help="share of requests it is asked, unanswering")
    promote.add_argument(
        "--canary",
        type=shares,
        metavar="SHARE[,SHARE]",
        help="share of requests it answers at first; several are steps",
    )
    promote.add_argument("--by", default="", help="header that decides who gets the canary")
    promote.add_argument("--replicas", type=workers, default=1, metavar="N or MIN-MAX")
    _home(promote)

    rollback = add("rollback", _rollback, "give up the canary, or go back to the former champion")
    rollback.add_argument("model")
    rollback.add_argument("--reason", default="by hand")
    _home(rollback)

    abort = add("abort", _abort, "give up the version on trial; the champion stays")
    abort.add_argument("model")
    abort.add_argument("--reason", default="by hand")
    _home(abort)

    pause = add("pause", _pause, "take the share of the version on trial away for a while")
    pause.add_argument("model")
    pause.add_argument("--reason", default="by hand")
    _home(pause)


def _upkeep(add: Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]) -> None:
    optimize = add("optimize", _optimize, "rewrite a table's small files as fewer large ones")
    optimize.add_argument("table", help="uri of the Delta table")
    optimize.add_argument("--zorder", action="append", metavar="COLUMN", help="sort by it too")
    optimize.add_argument("--dry-run", action="store_true", help="only say which files")
    _home(optimize)
    vacuum = add("vacuum", _vacuum, "list a table's files that no reader, model or run needs")
    vacuum.add_argument("table", help="uri of the Delta table")
    vacuum.add_argument("--retention-hours", type=float, help="default the table's own")
    vacuum.add_argument("--delete", action="store_true", help="delete them, for good")
    _home(vacuum)


def _views(add: Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]) -> None:
    """Commands that look at what there is."""
    for name, about in (
        ("models", "list model versions, their roles and where they are from; say more of one"),
        ("runs", "list training runs and how they went"),
    ):
        command = add(name, _view(name), about)
        if name == "models":
            add_changes(command)
        _json(command)
        _home(command)
    trace = add("trace", _view("trace"), "print a trace as a tree, from the span files")
    trace.add_argument(
        "which", nargs="?", metavar="RUN|TRACE_ID|REQUEST_ID", help="default the newest"
    )
    trace.add_argument("--html", metavar="FILE", help="write it as a page instead")
    trace.add_argument("--perfetto", metavar="FILE", help="write it for ui.perfetto.dev instead")
    trace.add_argument("--to-table", metavar="URI", help="add its spans to a Delta table instead")
    _home(trace)
    why = add("why", _view("why"), "follow an answer back to its model, run and table")
    why.add_argument("request_id", metavar="REQUEST_ID", help="the answer's id")
    _json(why)
    _home(why)
    lineage = add(
        "lineage", _view("lineage"), "tell what a run read and made, as OpenLineage events"
    )
    lineage.add_argument("run_name", metavar="RUN")
    lineage.add_argument("--openlineage", metavar="FILE|URL", help="default standard output")
    _home(lineage)


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _view(name: str) -> Callable[[argparse.Namespace, Console], int | None]:
    """Return the view of that name, loaded when it is called."""

    def show(arguments: argparse.Namespace, console: Console) -> int | None:
        view = getattr(importlib.import_module("lepton.pipeline.views"), name)
        return view(arguments, console)

    return show


def _home(command: argparse.ArgumentParser) -> None:
    command.add_argument("--home", help="default $LEPTON_HOME, else ./lepton-home")


def _demo(arguments: argparse.Namespace, console: Console) -> None:
    from lepton.pipeline.demo import demo

    demo(arguments.out, keep=arguments.keep, console=console)


def _train(arguments: argparse.Namespace, console: Console) -> None:
    path, _, function = arguments.script.partition(":")
    if not function:
        if arguments.home:
            os.environ["LEPTON_HOME"] = arguments.home
        runpy.run_path(path, run_name="__main__")
        return
    if not arguments.table or not arguments.name:
        raise ValueError("a loop needs --table and --name (or give a whole script without ':LOOP')")
    import lepton

    loop = _function(path, function)
    rows = lepton.table(arguments.table, version=arguments.version)
    rows = rows.where(arguments.where) if arguments.where else rows
    stream = rows.stream(
        batch_size=arguments.batch_size, epochs=arguments.epochs, seed=arguments.seed
    )
    run = lepton.train(
        loop, stream, name=arguments.name, workers=arguments.workers, home=arguments.home
    )
    console.print(f"run {run.name}: {run.steps} steps, checkpoint {run.checkpoint.uri}")


def _plan(arguments: argparse.Namespace, console: Console) -> int:
    from lepton.training import outcomes

    if arguments.rows is None and arguments.table is None:
        return outcomes.show(arguments.runs, arguments.home, console)
    return outcomes.predict(arguments, console)


def _function(path: str, name: str) -> Any:
    if path.endswith(".py"):
        found: Any = runpy.run_path(path, run_name="lepton_loop").get(name)
    else:
        sys.path.insert(0, "")
        found = getattr(importlib.import_module(path), name, None)
    if not callable(found):
        raise LeptonError(f"{path} has no function {name!r}")
    return found


def _promote(arguments: argparse.Namespace, console: Console) -> None:
    from lepton.promotion import promote

    app = promote(
        arguments.model,
        arguments.version,
        gate=arguments.gate,
        shadow=arguments.shadow,
        canary=arguments.canary,
        by=arguments.by,
        replicas=arguments.replicas,
        home=arguments.home,
        on_change=console.print,
    )
    _stay(app.infer_url, console)


def _stay(url: str, console: Console) -> None:
    """A local Ray ends with this process, so wait; a cluster serves on without it."""
    if os.environ.get("RAY_ADDRESS"):
        console.print(f"serving at {url}")
        return
    console.print(f"serving at {url}; Ctrl-C ends it (set RAY_ADDRESS to serve on a cluster)")
    signal.pause()


def _rollback(arguments: argparse.Namespace, console: Console) -> None:
    from lepton.promotion import rollback

    state = rollback(arguments.model, reason=arguments.reason, home=arguments.home)
    console.print(f"{arguments.model}: champion is version {state.pointer.champion}")


def _abort(arguments: argparse.Namespace, console: Console) -> None:
    from lepton.promotion import abort

    state = abort(arguments.model, reason=arguments.reason, home=arguments.home)
    console.print(f"{arguments.model}: champion is version {state.pointer.champion}")


def _pause(arguments: argparse.Namespace, console: Console) -> None:
    from lepton.promotion import pause

    state = pause(arguments.model, reason=arguments.reason, home=arguments.home)
    console.print(f"{arguments.model}: version {state.pointer.trial} gets no requests now")


def _serve(arguments: argparse.Namespace, console: Console) -> None:
    from lepton.lake import home_of
    from lepton.serving import Service, serve_all

    apps = serve_all(
        arguments.model,
        home_of(arguments.home),
        replicas=arguments.replicas,
        port=arguments.port,
        service=Service(host=arguments.host, grpc_port=arguments.grpc_port),
        upgrade=arguments.upgrade,
    )
    if arguments.grpc_port is not None:
        console.print(f"gRPC at {apps[arguments.model[0]].grpc_address}")
    _stay(" and ".join(app.infer_url for app in apps.values()), console)


def _ingress(arguments: argparse.Namespace, _: Console) -> None:
    """Print lines for a shell: ``eval "$(lepton ingress)"``."""
    from lepton.cluster import ingress_settings

    for name, value in ingress_settings(Path(arguments.dir)).items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")


def _score(arguments: argparse.Namespace, console: Console) -> None:
    from lepton.lake import table
    from lepton.serving import score

    rows = table(arguments.table)
    found = score(
        arguments.model,
        rows.where(arguments.where) if arguments.where else rows,
        arguments.out,
        version=arguments.version or "champion",
        workers=arguments.workers,
        home=arguments.home,
    )
    console.print(f"answers of {rows} are in {found}")


def _optimize(arguments: argparse.Namespace, console: Console) -> None:
    from lepton.lake import home_of
    from lepton.lake.maintenance import optimize
    from lepton.telemetry import Carrier

    done = optimize(
        arguments.table,
        zorder=arguments.zorder,
        dry_run=arguments.dry_run,
        trace=Carrier("", f"{home_of(arguments.home)}/traces"),
    )
    console.print(
        f"{done.uri}@{done.version}: {len(done.removed)} files of {done.removed_bytes} bytes "
        + ("may be rewritten" if done.dry_run else f"became {len(done.added)}")
    )


def _vacuum(arguments: argparse.Namespace, console: Console) -> None:
    from lepton.lake import home_of
    from lepton.lake.maintenance import vacuum
    from lepton.registry.protection import needed_versions
    from lepton.telemetry import Carrier

    needed = needed_versions(arguments.table, arguments.home)
    done = vacuum(
        arguments.table,
        retention_hours=arguments.retention_hours,
        protect=needed,
        dry_run=not arguments.delete,
        trace=Carrier("", f"{home_of(arguments.home)}/traces"),
    )
    for version, users in needed.items():
        console.print(f"version {version} stays for {', '.join(users)}")
    for path in done.removed:
        console.print(path, markup=False, soft_wrap=True)
    what = "would go; --delete deletes them" if done.dry_run else "deleted"
    console.print(f"{len(done.removed)} files of {done.removed_bytes} bytes {what}")


def _doctor(arguments: argparse.Namespace, console: Console) -> int:
    from lepton.doctor import check, render

    checks = check(arguments.home, arguments.address, deep=arguments.deep)
    console.print(render(checks))
    return 1 if any(c.level == "fail" for c in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
