"""Rows as plain JSON objects, for a person with curl; and the service described by OpenAPI. Pure.

The checks are those of every request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import orjson
import pyarrow as pa

from lepton.serving.inputs import MAX_ROWS, BadRequest, Input, checked, typed
from lepton.serving.protocol import PATIENCE, Inquiry, flat

_PATIENCE = {
    "name": PATIENCE,
    "in": "header",
    "description": "Milliseconds after which no answer is wanted any more: 504 comes then.",
    "schema": {"type": "integer", "minimum": 1},
}
Row = dict[str, Any]


def inquiry_of_rows(body: bytes, inputs: Sequence[Input]) -> Inquiry:
    """Parse ``{"rows": [{column: value, …}, …]}``, with an ``id`` if the client has one.

    A column that the model can fill may be left out or null.

    Raises:
        BadRequest: not such JSON, or the rows are not what the model takes.
    """
    try:
        request: Any = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise BadRequest(f"the body is not JSON: {e}; {_wanted(inputs)}") from e
    rows: Any = request.get("rows") if isinstance(request, dict) else None
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in cast("list[Any]", rows)):
        raise BadRequest(f"the body has no list 'rows' of objects; {_wanted(inputs)}")
    given = cast("list[Row]", rows)
    if not 1 <= len(given) <= MAX_ROWS:
        raise BadRequest(f"there are {len(given)} rows, wanted 1 to {MAX_ROWS}")
    for at, row in enumerate(given):
        _check_names(row, at, inputs)
    columns: dict[str, Any] = {}
    for spec in inputs:
        values = [row.get(spec.name) for row in given]
        shape = [len(given), *spec.shape]
        columns[spec.name] = checked(typed(flat(values, shape, spec.name), spec), spec)
    identity: Any = cast("Row", request).get("id", "")
    if not isinstance(identity, str) or len(identity) > 256:
        raise BadRequest("'id' must be a string of at most 256 characters")
    return Inquiry(rows=pa.table(columns), identity=identity, wanted={}, plain=True, size=len(body))


def _check_names(row: Row, at: int, inputs: Sequence[Input]) -> None:
    unknown = row.keys() - {i.name for i in inputs}
    missing = {i.name for i in inputs if not i.nullable} - row.keys()
    if unknown or missing:
        wrong = f"does not know {sorted(unknown)}" if unknown else f"misses {sorted(missing)}"
        raise BadRequest(f"row {at}: the model {wrong}; {_wanted(inputs)}")


def _wanted(inputs: Sequence[Input]) -> str:
    shapes = {i.name: f"{i.datatype}{list(i.shape) or ''}" for i in inputs}
    return f"expected rows of {orjson.dumps(shapes).decode()}"


def reply_of_rows(
    model: str, version: int, identity: str, outputs: Mapping[str, np.ndarray[Any, Any]]
) -> bytes:
    """Return the answer: an object of outputs for each row."""
    columns = {name: values.tolist() for name, values in outputs.items()}
    count = len(next(iter(outputs.values()))) if outputs else 0
    rows = [{name: values[i] for name, values in columns.items()} for i in range(count)]
    return orjson.dumps({"model": model, "version": version, "id": identity, "rows": rows})


def openapi_of(
    model: str, version: int, inputs: Sequence[Input], outputs: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Describe the service of a model by OpenAPI 3.1, for the version that is champion.

    Args:
        model: its name.
        version: the champion's.
        inputs: what it takes.
        outputs: the shape of one row of each.
    """
    properties = {i.name: _schema(i) for i in inputs}
    needed = [i.name for i in inputs if not i.nullable]
    row = {"type": "object", "properties": properties, "required": needed}
    row |= {"additionalProperties": False}
    answer = {n: _nested({"type": "number"}, shape) for n, shape in outputs.items()}
    tensors = {"type": "array", "items": {"type": "object"}}
    ask = _content({"rows": {"type": "array", "items": row, "minItems": 1, "maxItems": MAX_ROWS}})
    say = _content({"rows": {"type": "array", "items": {"type": "object", "properties": answer}}})
    rows = _post("Answer rows.", ask, say)
    oip = _content({"inputs": tensors}), _content({"outputs": tensors})
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{model}, served by lepton", "version": str(version)},
        "paths": {
            "/predict": rows,
            f"/v2/models/{model}/predict": rows,
            f"/v2/models/{model}/infer": _post("Open Inference Protocol, version 2.", *oip),
        },
    }


def _schema(spec: Input) -> dict[str, Any]:
    kind = {"BOOL": "boolean", "BYTES": "string"}.get(spec.datatype)
    kind = kind or ("number" if spec.datatype.startswith("FP") else "integer")
    schema: dict[str, Any] = {"type": [kind, "null"] if spec.nullable else kind}
    return _nested(schema, spec.shape)


def _nested(schema: dict[str, Any], shape: Sequence[int]) -> dict[str, Any]:
    for size in reversed(shape):
        schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
    return schema


def _content(properties: Mapping[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"content": {"application/json": {"schema": schema}}}


def _post(summary: str, ask: Mapping[str, Any], say: Mapping[str, Any]) -> dict[str, Any]:
    problem = {"content": {"application/problem+json": {"schema": {"type": "object"}}}}
    failures = {
        "400": "The request is wrong; the detail says what was expected.",
        "503": "Overloaded: come again after Retry-After seconds.",
        "504": "The request's time was over.",
    }
    responses: dict[str, Any] = {"200": {"description": "The answers.", **say}}
    for status, words in failures.items():
        responses[status] = {"description": words, **problem}
    return {
        "post": {
            "summary": summary,
            "parameters": [_PATIENCE],
            "requestBody": {"required": True, **ask},
            "responses": responses,
        }
    }
