"""Log records with their place in the trace: a JSON line each in a file, and by OTLP if asked.

The standard logging module stays what people use. While :func:`keep_logs` is in force, every record
of a ``lepton`` logger knows its trace and span; handlers further up (the root's) may print them as
``%(trace_id)s`` and ``%(span_id)s``. A run keeps what the person's own code logs, too: by the root
logger, and by loggers of the package that its loop is of. Levels are as they were set, and nothing
is attached to the root that would keep ``logging.basicConfig`` from its work. Of two runs at the
same time in one process, each has what is said in its own thread.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

from opentelemetry._logs import Logger, SeverityNumber
from opentelemetry.sdk._logs import (
    LoggerProvider,
    LogRecordProcessor,
    ReadableLogRecord,
    ReadWriteLogRecord,
)

from lepton.telemetry import settings
from lepton.telemetry.context import Carrier, context_of, resource_of
from lepton.telemetry.delivery import delivery_of, prepare
from lepton.telemetry.wire import MOST_TEXT

Told = Callable[[], Mapping[str, Any]]

_text = logging.Formatter()


class RunLog(logging.Handler):
    """Keeps and sends records.

    A record that has ``extra={"carrier": ...}`` belongs to that span, any other to ``carrier``'s.

    Args:
        carrier: of the run, or of whatever the process does.
        told: what else to say about this process, such as its rank, which may change.
        folder: where a file for each rank is kept (``rank-0000.jsonl``); None: nowhere.
    """

    def __init__(self, carrier: Carrier, told: Told, folder: Path | None) -> None:
        super().__init__()
        self._carrier = carrier
        self._told = told
        self._folder = folder
        self._file: tuple[str, int] | None = None
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Keep and send one record."""
        if not self._is_anothers():
            self._take(record)
            self._say(record)

    def filter_of_root(self, record: logging.LogRecord) -> bool:
        """Keep and send what is logged by the root logger itself, and let it pass."""
        if not self._is_anothers():
            with self.lock or nullcontext():
                self._take(record)
        return True

    def _take(self, record: logging.LogRecord) -> None:
        try:
            carrier: Carrier = getattr(record, "carrier", None) or self._carrier
            record.trace_id, record.span_id = carrier.trace_id, carrier.span_id
            told = dict(self._told())
            if self._folder is not None:
                self._keep(self._folder, record, told)
            if settings.otlp("logs") and record.__dict__.get("about") != "logs":
                _send(record, carrier, told)
        except Exception:  # noqa: BLE001 - as logging's own handlers do
            self.handleError(record)

    def _keep(self, folder: Path, record: logging.LogRecord, told: Mapping[str, Any]) -> None:
        """Write one record. Where it cannot be, that is said once; it is sent all the same."""
        try:
            name = f"rank-{told.get('lepton.rank', 0):04d}.jsonl"
            os.write(self._open(folder, name), _line(record, told))
        except OSError:
            if not self._failed:
                self._failed = True
                self.handleError(record)

    def _is_anothers(self) -> bool:
        """Whether what is said here belongs to another run of this process, and not to this one."""
        if self._folder is None or self in (here := _here.get()):
            return False
        return any(h in here for h in logging.getLogger("lepton").handlers)

    def _say(self, record: logging.LogRecord) -> None:
        """Say on stderr what logging would say there if this handler were not."""
        last = logging.lastResort
        if last is None or record.levelno < last.level:
            return
        logger: logging.Logger | None = logging.getLogger(record.name)
        handlers: list[logging.Handler] = []
        while logger is not None:
            handlers += logger.handlers
            logger = logger.parent if logger.propagate else None
        if handlers[0] is self and all(isinstance(h, RunLog) for h in handlers):
            last.handle(record)

    def _open(self, folder: Path, name: str) -> int:
        if self._file is None or self._file[0] != name:
            self.close_file()
            folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_APPEND | os.O_CREAT | os.O_WRONLY
            self._file = (name, os.open(folder / name, flags, 0o644))
        return self._file[1]

    def close_file(self) -> None:
        """Close the file; the next record opens it again."""
        if self._file is not None:
            os.close(self._file[1])
        self._file = None

    def close(self) -> None:
        """Close the file for good."""
        self.close_file()
        super().close()


_here: ContextVar[tuple[logging.Handler, ...]] = ContextVar("lepton-logs", default=())
"""Of the runs that this thread is at work for; a thread that is at work for none tells all."""


def keep_logs(
    carrier: Carrier, told: Told, folder: Path | None = None, *, code: str = ""
) -> Callable[[], None]:
    """Keep and send the records of all ``lepton`` loggers; return what ends that.

    Args:
        carrier: the span they belong to.
        told: attributes of this process, such as its rank, asked for with each record.
        folder: where files are kept, one a rank; None: nowhere.
        code: module of the person's code, to whose package's loggers and to the root logger it is
            listened to as well; empty for nobody's.
    """
    prepare()
    handler = RunLog(carrier, told, folder)
    names = {"lepton"} | ({code.partition(".")[0]} if code else set[str]())
    for name in names:
        logging.getLogger(name).addHandler(handler)
    if code:
        logging.getLogger().addFilter(handler.filter_of_root)
    if folder is not None:
        _here.set((*_here.get(), handler))

    def end() -> None:
        _here.set(tuple(h for h in _here.get() if h is not handler))
        for name in names:
            logging.getLogger(name).removeHandler(handler)
        logging.getLogger().removeFilter(handler.filter_of_root)
        handler.close()

    return end


def _line(record: logging.LogRecord, told: Mapping[str, Any]) -> bytes:
    body: dict[str, Any] = {
        "time_ns": int(record.created * 1e9),
        "level": record.levelname,
        "logger": record.name,
        "message": record.getMessage(),
        "trace_id": record.__dict__["trace_id"],
        "span_id": record.__dict__["span_id"],
        "pid": record.process,
        **told,
    }
    if record.exc_info and record.exc_info[0]:
        body["error.type"] = record.exc_info[0].__qualname__
        body["error"] = _text.formatException(record.exc_info)
    return json.dumps(body, default=str).encode() + b"\n"


def _send(record: logging.LogRecord, carrier: Carrier, told: Mapping[str, Any]) -> None:
    error = record.exc_info[1] if record.exc_info else None
    _logger(os.getpid(), record.name).emit(
        timestamp=int(record.created * 1e9),
        observed_timestamp=time.time_ns(),
        context=context_of(carrier.traceparent),
        severity_number=_severity(record.levelno),
        severity_text=record.levelname,
        body=record.getMessage()[:MOST_TEXT],
        attributes=dict(told),
        exception=error,
    )


def _severity(level: int) -> SeverityNumber:
    """OpenTelemetry's number: logging's tens are DEBUG, INFO, WARN, ERROR and FATAL."""
    numbers = (
        SeverityNumber.TRACE,
        SeverityNumber.DEBUG,
        SeverityNumber.INFO,
        SeverityNumber.WARN,
        SeverityNumber.ERROR,
        SeverityNumber.FATAL,
    )
    return numbers[min(max(level // 10, 0), 5)]


@lru_cache(maxsize=32)
def _logger(pid: int, name: str) -> Logger:
    return _provider(pid).get_logger(name)


@lru_cache(maxsize=2)
def _provider(pid: int) -> LoggerProvider:
    provider = LoggerProvider(resource=resource_of(pid), shutdown_on_exit=False)
    provider.add_log_record_processor(_Sent())
    return provider


class _Sent(LogRecordProcessor):
    """Gives records to this process's delivery."""

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        assert log_record.resource is not None  # noqa: S101 - the provider's
        delivery_of("logs").put(
            ReadableLogRecord(
                log_record=log_record.log_record,
                resource=log_record.resource,
                instrumentation_scope=log_record.instrumentation_scope,
                limits=log_record.limits,
            )
        )

    def shutdown(self) -> None:
        """Nothing is held here."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing is held here."""
        return True
