"""Sequences, one token after another: what is asked, what the net is shown, what comes next. Pure.

A net can continue a sequence if it takes one column of whole numbers of shape (length,) and its
first output has scores of the next token, of shape (classes,), or of the token after each place,
(length, classes). It is shown the last ``length`` tokens. A shorter sequence is filled up with
zeros: behind it where there are scores of each place, which those of a causal net do not see;
before it otherwise.

Source of the request's form: the generate extension of KServe's and Triton's HTTP protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import orjson
import pyarrow as pa

from lepton.export import TensorSpec
from lepton.serving.inputs import ARROW, BadRequest, Input, checked

MOST_TOKENS = 4096
MOST_PROMPT = 2**20
TOKENS = 64
EVENTS = "text/event-stream"
LINES = "application/x-ndjson"

_PARAMETERS = ("max_tokens", "temperature", "seed", "stop", "timeout")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What a client wants.

    Attributes:
        prompt: the tokens to go on from; at least one.
        identity: the client's id of it, or an empty string.
        max_tokens: of the answer.
        temperature: 0 takes the most likely token.
        seed: of the choice by chance.
        stop: token that ends the answer, which it is not part of, or None.
        patience_s: seconds after which the client wants no more, or None.
    """

    prompt: tuple[int, ...]
    identity: str = ""
    max_tokens: int = TOKENS
    temperature: float = 0.0
    seed: int | None = None
    stop: int | None = None
    patience_s: float | None = None


def sequence_of(inputs: Sequence[Input], outputs: Sequence[TensorSpec]) -> Input:
    """Return the input that holds the sequence.

    Raises:
        BadRequest: the model gives no sequences.
    """
    (first, *others), scores = inputs, outputs[0].shape
    fits = not others and len(first.shape) == 1 and "INT" in first.datatype
    if not fits or len(scores) not in (1, 2) or (len(scores) == 2 and scores[0] != first.shape[0]):
        raise BadRequest(
            "this model gives no sequences: it would take one input of whole numbers of shape "
            "(length,) and give scores of shape (classes,) or (length, classes)"
        )
    return first


def wish_of(body: bytes, spec: Input) -> Wish:
    """Parse ``{"<input>": [token, …], "parameters": {"max_tokens": …}, "id": …}``.

    Raises:
        BadRequest: it is not like that.
    """
    try:
        told: Any = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise BadRequest(f"the body is not JSON: {e}; {_wanted(spec)}") from e
    if not isinstance(told, dict):
        raise BadRequest(f"the body must be a JSON object; {_wanted(spec)}")
    told = cast("dict[str, Any]", told)
    prompt, parameters = told.get(spec.name), told.get("parameters", {})
    if told.keys() - {spec.name, "parameters", "id"} or not isinstance(parameters, dict):
        raise BadRequest(f"the body has members {sorted(told)}; {_wanted(spec)}")
    parameters = cast("dict[str, Any]", parameters)
    if parameters.keys() - set(_PARAMETERS):
        raise BadRequest(f"parameters are {sorted(parameters)}, known are {', '.join(_PARAMETERS)}")
    identity = told.get("id", "")
    if not isinstance(identity, str) or len(identity) > 256:
        raise BadRequest("'id' must be a string of at most 256 characters")
    timeout = _whole(parameters, "timeout", 0, 2**53)
    return Wish(
        prompt=_prompt(prompt, spec),
        identity=identity,
        max_tokens=_whole(parameters, "max_tokens", 1, MOST_TOKENS) or TOKENS,
        temperature=_temperature(parameters.get("temperature", 0)),
        seed=_whole(parameters, "seed", 0, 2**63 - 1),
        stop=_whole(parameters, "stop", 0, 2**63 - 1),
        patience_s=timeout / 1e6 if timeout else None,
    )


def shown(tokens: Sequence[int], spec: Input, scores: TensorSpec) -> pa.Table:
    """Return the row that the net is shown: the last tokens, filled up with zeros."""
    (length,) = spec.shape
    last = list(tokens[-length:])
    nothing = [0] * (length - len(last))
    row = last + nothing if len(scores.shape) == 2 else nothing + last
    return pa.table({spec.name: checked(pa.array(row, ARROW[spec.datatype]), spec)})


def scores_of(output: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """Return the scores of the next token.

    Args:
        output: of shape (1, classes) or (1, length, classes).
        count: of the tokens so far.
    """
    return output[0] if output.ndim == 2 else output[0, min(count, output.shape[1]) - 1]


def choice(scores: np.ndarray[Any, Any], temperature: float, chance: np.random.Generator) -> int:
    """Return the next token; of equal scores the first.

    Raises:
        ValueError: a score is not a number.
    """
    if np.isnan(scores).any():
        raise ValueError("the net's scores are not numbers")
    if temperature == 0:
        return int(scores.argmax())
    heights = (scores.astype("float64") - float(scores.max())) / temperature
    weights = np.exp(heights)
    return int(chance.choice(len(weights), p=weights / weights.sum()))


def event_of(told: dict[str, Any], form: str) -> bytes:
    """Return a piece of an answer as a server-sent event, or as a line of JSON."""
    text = orjson.dumps(told)
    if form == LINES:
        return text + b"\n"
    return (b"event: error\n" if "error" in told else b"") + b"data: " + text + b"\n\n"


def _prompt(given: Any, spec: Input) -> tuple[int, ...]:
    tokens = cast("list[Any]", given) if isinstance(given, list) else []
    if not 1 <= len(tokens) <= MOST_PROMPT or not all(type(v) is int for v in tokens):
        raise BadRequest(
            f"{spec.name!r} must be a list of 1 to {MOST_PROMPT} whole numbers; {_wanted(spec)}"
        )
    try:
        pa.array(tokens, ARROW[spec.datatype])
    except (pa.ArrowInvalid, OverflowError) as e:
        raise BadRequest(f"{spec.name!r} holds tokens that are not {spec.datatype}: {e}") from e
    return tuple(tokens)


def _whole(parameters: dict[str, Any], name: str, least: int, most: int) -> int | None:
    value = parameters.get(name)
    if value is not None and (type(value) is not int or not least <= value <= most):
        raise BadRequest(f"parameter {name!r} must be a whole number from {least} to {most}")
    return value


def _temperature(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 100:
        raise BadRequest("parameter 'temperature' must be a number from 0 to 100")
    return float(value)


def _wanted(spec: Input) -> str:
    return f'expected {{"{spec.name}": [token, ...], "parameters": {{"max_tokens": {TOKENS}}}}}'
