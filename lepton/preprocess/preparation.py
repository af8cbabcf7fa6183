"""One preparation for training and serving: fitted once, saved as JSON, applied the same way.

A preparation is an immutable tuple of steps. It travels in the checkpoint; the stream applies it
to batches and the replica to requests, and since every step works element by element, both get
the same bits (no train/serve skew).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, NoReturn, cast

import pyarrow as pa

from lepton.preprocess.fitting import Data, Plan, check_columns, fit_steps
from lepton.preprocess.steps import (
    Cast,
    Categories,
    Fill,
    MinMax,
    Standard,
    Step,
    named_type,
)

VERSION = 1

_STEPS: dict[str, type[Step]] = {s.name: s for s in (Cast, Fill, MinMax, Standard, Categories)}


@dataclass(frozen=True, slots=True, eq=False)
class Preparation:
    """Fitted steps, applied in order by calling the preparation with a table.

    Two preparations are equal when their JSON is.
    """

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        for step in self.steps:
            if type(step) not in _STEPS.values():
                raise TypeError(f"{step!r} is not a preparation step: use {sorted(_STEPS)}")

    @classmethod
    def fit(
        cls,
        data: Data,
        *,
        minmax: Sequence[str] = (),
        standard: Sequence[str] = (),
        fill: Mapping[str, bool | int | float | str] | None = None,
        categories: Sequence[str] = (),
        clip: bool = False,
    ) -> Preparation:
        """Fit steps to a table, to a stream of tables or batches, or to a Snapshot, in one pass.

        The outcome depends on the rows and their order, not on how they are cut into batches.
        Every column that a step touches is first cast to the type it has here. Missing values
        (null, NaN) are filled before anything else is fitted.

        Args:
            data: the training rows.
            minmax: numeric columns to scale to [0, 1], as float32.
            standard: numeric columns to scale to mean 0 and deviation 1, as float32.
            fill: per scalar column ``"mean"``, ``"median"``, ``"most_frequent"`` (the smallest of
                equals), or a constant. A median holds the column in memory.
            categories: string or integer columns to turn into codes, in sorted order.
            clip: whether minmax keeps values beyond the fitted range inside [0, 1].

        Raises:
            ValueError: no rows, a column that is missing, has no values, or is of a type that
                the step cannot take.
        """
        plan = Plan(
            minmax=minmax, standard=standard, fill=fill or {}, categories=categories, clip=clip
        )
        return cls(fit_steps(data, plan))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the steps read, in order of first use."""
        return tuple(dict.fromkeys(s.column for s in self.steps))

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the JSON, in hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with its columns prepared; other columns, row count and order stay.

        Raises:
            ValueError: a column is missing or has values or a type that its step cannot take.
        """
        check_columns(table.schema, self.columns)
        return reduce(lambda prepared, step: step(prepared), self.steps, table)

    def only(self, columns: Iterable[str]) -> Preparation:
        """Return the preparation of some columns: a replica has no label, for example."""
        if isinstance(columns, str):
            raise TypeError("columns must be several names, not one string")
        kept = set(columns)
        return Preparation(tuple(s for s in self.steps if s.column in kept))

    def schema(self, input_schema: pa.Schema) -> pa.Schema:
        """Return the schema of a prepared table, from the schema before, without data.

        Raises:
            ValueError: a column is missing or of a type that its step cannot take.
        """
        check_columns(input_schema, self.columns)
        for step in self.steps:
            at = input_schema.get_field_index(step.column)
            field: pa.Field[Any] = input_schema.field(at)
            input_schema = input_schema.set(at, field.with_type(step.result(field.type)))
        return input_schema

    def to_json(self) -> str:
        """Return the preparation as canonical JSON; floats keep every bit."""
        return json.dumps(
            {"v": VERSION, "steps": [_to_dict(s) for s in self.steps]},
            sort_keys=True,
            separators=(",", ":"),
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str) -> Preparation:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: not such JSON, or of a version or with steps that are not known here.
        """
        try:
            read = json.loads(text, parse_constant=_refuse)
        except (json.JSONDecodeError, RecursionError) as e:
            raise ValueError(f"a preparation cannot be read: not JSON: {e}") from e
        if not isinstance(read, dict) or "v" not in read:
            raise ValueError('a preparation cannot be read: no object with a version "v"')
        found = cast("dict[str, Any]", read)
        if type(found["v"]) is not int or found["v"] != VERSION:
            raise ValueError(
                f"the preparation has version {found['v']!r}, this lepton reads version {VERSION}: "
                "update lepton, or fit the preparation again"
            )
        if set(found) != {"v", "steps"} or not isinstance(found["steps"], list):
            raise ValueError('a preparation cannot be read: it must have "v" and a list "steps"')
        return cls(tuple(_from_dict(s) for s in cast("list[Any]", found["steps"])))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Preparation) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())


def _to_dict(step: Step) -> dict[str, Any]:
    read = {f.name: getattr(step, f.name) for f in fields(step)}
    return {"step": step.name} | read | ({"type": str(step.type)} if isinstance(step, Cast) else {})


def _from_dict(read: Any) -> Step:
    if not isinstance(read, dict):
        raise ValueError(f"a preparation cannot be read: {read!r} is not a step")  # noqa: TRY004 - content
    found = cast("dict[str, Any]", read)
    kind = _STEPS.get(str(found.get("step")))
    if kind is None:
        raise ValueError(
            f"the preparation has a step {found.get('step')!r} that this lepton does not know "
            f"({sorted(_STEPS)}): update lepton, or fit the preparation again"
        )
    wanted = {"step", *(f.name for f in fields(kind))}
    if set(found) != wanted:
        raise ValueError(
            f"a preparation cannot be read: a {kind.name} step has {sorted(wanted)}, "
            f"not {sorted(found)}"
        )
    values: dict[str, Any] = {k: v for k, v in found.items() if k != "step"}
    if not isinstance(values["column"], str):
        raise ValueError(f"a preparation cannot be read: no column name: {values['column']!r}")  # noqa: TRY004 - content
    if kind is Cast:
        values["type"] = named_type(str(values["type"]))
    try:
        return kind(**values)
    except TypeError as e:
        raise ValueError(f"a preparation cannot be read: {e}") from e


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"a preparation cannot be read: it has a {constant}")
