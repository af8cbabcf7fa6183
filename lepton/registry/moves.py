"""What can be done with a model's versions: each is one event of the log, by compare-and-set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lepton.errors import ConflictError
from lepton.registry.events import (
    ModelState,
    ModelVersion,
    check_alias,
    check_metrics,
    check_name,
    check_tags,
)
from lepton.registry.log import RETRIES, EventLog, actor, now


class Registry(EventLog):
    """Model versions and who answers: reading, and every move of them."""

    def register(
        self,
        model: str,
        *,
        checkpoint: str,
        manifest_sha256: str,
        metrics: Mapping[str, float] | None = None,
        trace_id: str = "",
        **described: Any,
    ) -> ModelVersion:
        """Record the next version of a model, whatever number that is by then.

        Args:
            model: its name.
            checkpoint: uri of the checkpoint's manifest.
            manifest_sha256: hash of that manifest.
            metrics: finite figures to gate on.
            trace_id: the trace under which it is registered.
            described: lineage, signature, size, tags, note, protected and measured of
                :class:`ModelVersion`; JSON only.

        Raises:
            ValueError: no name for a model, or a metric that is not finite.
            RegistryError: the table cannot be read or written.
        """
        check_name(model)
        figures = check_metrics(metrics or {})
        check_tags(described.get("tags", {}))
        for _ in range(RETRIES):
            with self._lock:
                state = self.state(model)
                entry = _following(
                    state,
                    checkpoint=checkpoint,
                    manifest_sha256=manifest_sha256,
                    metrics=figures,
                    trace_id=trace_id,
                    **described,
                )
                if self._commit(state, "registered", version=entry.version, registered=entry):
                    return entry
        raise ConflictError(f"could not register a version of {model!r}: too many writers at once")

    def start_canary(
        self,
        model: str,
        version: int,
        share: float,
        *,
        expect: int | None,
        gate: Sequence[Any] = (),
        by: str = "",
        rule: Mapping[str, Any] | None = None,
        steps: Sequence[float] = (),
        trace_id: str = "",
        traceparent: str = "",
    ) -> ModelState:
        """Give a version a share of requests beside the champion.

        Args:
            model: its name.
            version: the canary's number.
            share: of requests, in (0, 1].
            expect: the pointer's ``seq`` that the caller saw: it must not have moved since, but
                versions may have been registered, described or measured; None acts on the newest.
            gate: results of the gates that it passed.
            by: header whose value decides who gets the canary; empty decides by chance.
            rule: what it has to show, kept for whoever carries on.
            steps: shares that it shall have one after another, kept for the same.
            trace_id: the trace under which this happens.
            traceparent: the span, so that replicas know under what they load a version.

        Raises:
            ConflictError: the pointer has moved since ``expect``.
            RegistryError: not possible in this state; another version may be on trial.
        """
        details: dict[str, Any] = {"by": by.lower(), "rule": dict(rule or {})}
        if len(steps) > 1:
            details["steps"] = list(steps)
        fields: dict[str, Any] = {
            "version": version,
            "share": share,
            "gate": _plain(gate),
            "details": details,
        }
        under = {"trace_id": trace_id, "traceparent": traceparent}
        return self._move(model, expect, "canary", **under, **fields)

    def start_shadow(
        self,
        model: str,
        version: int,
        share: float,
        *,
        expect: int | None,
        gate: Sequence[Any] = (),
        rule: Mapping[str, Any] | None = None,
        trace_id: str = "",
        traceparent: str = "",
    ) -> ModelState:
        """Have a version asked a share of the requests too; arguments as :meth:`start_canary`."""
        details = {"rule": dict(rule or {})}
        fields: dict[str, Any] = {
            "version": version,
            "share": share,
            "gate": _plain(gate),
            "details": details,
        }
        under = {"trace_id": trace_id, "traceparent": traceparent}
        return self._move(model, expect, "shadow", **under, **fields)

    def pause(
        self,
        model: str,
        *,
        expect: int | None,
        reason: str = "",
        trace_id: str = "",
        traceparent: str = "",
    ) -> ModelState:
        """Take the trial's share away for a while; starting the trial again ends the pause."""
        under = {"trace_id": trace_id, "traceparent": traceparent}
        return self._move(model, expect, "paused", reason=reason, **under)

    def alias(
        self,
        model: str,
        alias: str,
        version: int,
        *,
        expect: int | None = None,
        gate: Sequence[Any] = (),
        trace_id: str = "",
    ) -> ModelState:
        """Let a name of one's own mean a version, such as ``challenger``; it can be moved again.

        With ``expect``, neither the pointer nor this alias may have moved since.

        Raises:
            ValueError: no name for an alias.
            ConflictError, RegistryError: as :meth:`start_canary`.
        """
        check_alias(alias)
        fields: dict[str, Any] = {
            "version": version,
            "gate": _plain(gate),
            "details": {"alias": alias},
        }
        return self._move(model, expect, "aliased", trace_id=trace_id, **fields)

    def unalias(
        self, model: str, alias: str, *, expect: int | None = None, trace_id: str = ""
    ) -> ModelState:
        """Take a name of one's own away; raises as :meth:`alias`."""
        details = {"alias": alias}
        return self._move(model, expect, "aliased", details=details, trace_id=trace_id)

    def describe(
        self,
        model: str,
        version: int,
        *,
        tags: Mapping[str, str | None] | None = None,
        note: str | None = None,
        protected: bool | None = None,
        expect: int | None = None,
    ) -> ModelState:
        """Change what people say about a version; what is None stays as it is.

        Args:
            model: its name.
            version: its number.
            tags: to set, by name; None as the value takes a tag away. Others stay.
            note: free text, in place of the one before; the history has that.
            protected: whether it cannot be deleted.
            expect: the pointer's ``seq`` that the caller saw; nothing may have happened since.

        Raises:
            ValueError: a tag is no text, or nothing changes.
            ConflictError, RegistryError: as :meth:`start_canary`.
        """
        asked = {"tags": check_tags(tags or {}) or None, "note": note, "protected": protected}
        details = {name: value for name, value in asked.items() if value is not None}
        if not details:
            raise ValueError(f"nothing to change of {model!r}: give tags, a note or protected")
        return self._move(model, expect, "described", version=version, details=details)

    def measure(
        self,
        model: str,
        version: int,
        table: str,
        metrics: Mapping[str, float],
        *,
        trace_id: str = "",
    ) -> ModelState:
        """Record a version's metrics on one snapshot, in place of former ones on the same.

        Args:
            model: its name.
            version: its number.
            table: ``uri@version`` of the rows judged.
            metrics: finite figures.
            trace_id: the trace under which they were measured.

        Raises:
            ValueError: a metric is not finite, or the table has no version.
            RegistryError: as :meth:`start_canary`.
        """
        if not table.rpartition("@")[2].isdigit():
            raise ValueError(f"table {table!r} must be an address with a version, such as 'lake@3'")
        details = {"table": table, "metrics": check_metrics(metrics)}
        return self._move(
            model, None, "measured", version=version, details=details, trace_id=trace_id
        )

    def delete(
        self, model: str, version: int, *, reason: str = "", expect: int | None = None
    ) -> ModelState:
        """Take a version out of the registry; its events stay, and its number is not given again.

        Its checkpoint stays where it is, and may be thinned out with its run's.

        Raises:
            RegistryError: it is protected, in a role, or an alias means it.
            ConflictError: as :meth:`start_canary`.
        """
        return self._move(model, expect, "deleted", version=version, reason=reason)

    def promote(
        self,
        model: str,
        version: int,
        *,
        expect: int | None,
        gate: Sequence[Any] = (),
        trace_id: str = "",
        traceparent: str = "",
    ) -> ModelState:
        """Make a version the champion; raises as :meth:`start_canary`."""
        under = {"trace_id": trace_id, "traceparent": traceparent}
        return self._move(model, expect, "promoted", version=version, gate=_plain(gate), **under)

    def replaced(
        self,
        model: str,
        version: int,
        *,
        details: Mapping[str, Any],
        reason: str,
        trace_id: str = "",
    ) -> ModelState:
        """Record that replicas took a version up one after another, for want of memory.

        Args:
            model: its name.
            version: its number.
            details: ``replicas``, ``surge`` and ``seconds``.
            reason: what did not fit.
            trace_id: the trace under which it happened.

        Raises:
            RegistryError: as :meth:`start_canary`.
        """
        fields: dict[str, Any] = {"details": details, "reason": reason, "trace_id": trace_id}
        return self._move(model, None, "replaced", version=version, **fields)

    def abort_canary(
        self,
        model: str,
        *,
        expect: int | None,
        reason: str,
        trace_id: str = "",
        traceparent: str = "",
    ) -> ModelState:
        """End the trial of a canary or a shadow; raises as :meth:`start_canary`."""
        under = {"trace_id": trace_id, "traceparent": traceparent}
        return self._move(model, expect, "aborted", reason=reason, **under)

    def rollback(
        self,
        model: str,
        *,
        expect: int | None,
        reason: str,
        trace_id: str = "",
        traceparent: str = "",
    ) -> ModelState:
        """Make the former champion the champion; raises as :meth:`start_canary`."""
        under = {"trace_id": trace_id, "traceparent": traceparent}
        return self._move(model, expect, "rolled_back", reason=reason, **under)

    def withdraw(
        self,
        model: str,
        *,
        expect: int | None,
        reason: str,
        trace_id: str = "",
        traceparent: str = "",
    ) -> ModelState:
        """Take a first champion back, as it could not be served; raises as :meth:`start_canary`."""
        under = {"trace_id": trace_id, "traceparent": traceparent}
        return self._move(model, expect, "withdrawn", reason=reason, **under)


def _following(state: ModelState, **fields: Any) -> ModelVersion:
    return ModelVersion(
        model=state.model,
        version=state.last + 1,
        parent=state.pointer.champion,
        created=now(),
        actor=actor(),
        **fields,
    )


def _plain(gate: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    results: list[dict[str, Any]] = [g if isinstance(g, dict) else asdict(g) for g in gate]
    return tuple(results)
