"""The Open Inference Protocol, version 2, over gRPC: its messages, and their way to and from HTTP.

Source: the protocol's "GRPC" section (kserve/open-inference-protocol). The messages are told to
protobuf here, field by field, so that nothing has to be generated; in a pool of their own, so that
a client's generated ones may be in the same process.

A gRPC inference request becomes an HTTP one with raw tensors, and the answer to that one a gRPC
answer: whatever HTTP checks, records and refuses is so for gRPC too. Pure: bytes in, bytes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from lepton.serving.binary import raw_of
from lepton.serving.inputs import BadRequest, dtype_of

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

_KINDS: Mapping[str, Any] = {
    "double": 1, "float": 2, "int64": 3, "uint64": 4, "int32": 5, "bool": 8, "string": 9,
    "bytes": 12, "uint32": 13,
}  # fmt: skip
_MESSAGE = 11
_TENSOR = "name:string datatype:string shape:*int64"
_MESSAGES: Mapping[str, str] = {  # name:type in the order of their numbers; * repeats, % maps
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live:bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready:bool",
    "ModelReadyRequest": "name:string version:string",
    "ModelReadyResponse": "ready:bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name:string version:string extensions:*string",
    "ModelMetadataRequest": "name:string version:string",
    "ModelMetadataResponse": "name:string versions:*string platform:string "
    "inputs:*ModelMetadataResponse.TensorMetadata outputs:*ModelMetadataResponse.TensorMetadata",
    "ModelMetadataResponse.TensorMetadata": _TENSOR,
    "InferParameter": "bool_param:|bool int64_param:|int64 string_param:|string "
    "double_param:|double uint64_param:|uint64",
    "InferTensorContents": "bool_contents:*bool int_contents:*int32 int64_contents:*int64 "
    "uint_contents:*uint32 uint64_contents:*uint64 fp32_contents:*float fp64_contents:*double "
    "bytes_contents:*bytes",
    "ModelInferRequest": "model_name:string model_version:string id:string "
    "parameters:%InferParameter inputs:*ModelInferRequest.InferInputTensor "
    "outputs:*ModelInferRequest.InferRequestedOutputTensor raw_input_contents:*bytes",
    "ModelInferRequest.InferInputTensor": f"{_TENSOR} parameters:%InferParameter "
    "contents:InferTensorContents",
    "ModelInferRequest.InferRequestedOutputTensor": "name:string parameters:%InferParameter",
    "ModelInferResponse": "model_name:string model_version:string id:string "
    "parameters:%InferParameter outputs:*ModelInferResponse.InferOutputTensor "
    "raw_output_contents:*bytes",
    "ModelInferResponse.InferOutputTensor": f"{_TENSOR} parameters:%InferParameter "
    "contents:InferTensorContents",
    "ModelStreamInferResponse": "error_message:string infer_response:ModelInferResponse",
}
_CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def _described() -> Any:
    """The file that the messages would be generated from."""
    file: Any = descriptor_pb2.FileDescriptorProto(
        name="lepton/open_inference.proto", package=PACKAGE, syntax="proto3"
    )
    made: dict[str, Any] = {}
    for name, fields in _MESSAGES.items():
        outer, _, inner = name.rpartition(".")
        holder: Any = made[outer].nested_type if outer else file.message_type
        message = made[name] = holder.add(name=inner)
        for number, field in enumerate(fields.split(), start=1):
            _add(message, name, number, *field.split(":"))
    return file


def _add(message: Any, owner: str, number: int, name: str, kind: str) -> None:
    field = message.field.add(name=name, number=number, label=3 if kind[0] in "*%" else 1)
    if kind[0] == "|":
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    bare = kind.lstrip("*%|")
    if kind[0] == "%":
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add(entry, "", 1, "key", "string")
        _add(entry, "", 2, "value", bare)
        bare = f"{owner}.{entry.name}"
    if bare in _KINDS:
        field.type = _KINDS[bare]
    else:
        field.type, field.type_name = _MESSAGE, f".{PACKAGE}.{bare}"


def _made() -> dict[str, Any]:
    pool: Any = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(_described().SerializeToString())
    get: Any = message_factory.GetMessageClass
    return {name: get(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in _MESSAGES}


MESSAGES: Mapping[str, Any] = _made()
"""Message classes by name."""


def body_of(request: Any, timeout_s: float | None = None) -> tuple[bytes, int]:
    """Return a ``ModelInferRequest`` as the body of an HTTP request with raw tensors.

    Args:
        request: as it came.
        timeout_s: after which the client wants no answer any more.

    Returns:
        The body, and the length of its JSON in bytes.

    Raises:
        BadRequest: raw contents that are not one for each input, or contents of another type.
    """
    given, raw = list(request.inputs), list(request.raw_input_contents)
    if raw and len(raw) != len(given):
        raise BadRequest(
            f"there are {len(raw)} raw_input_contents for {len(given)} inputs: send one for each, "
            "in the same order, or none"
        )
    pieces = raw or [_raw(tensor) for tensor in given]
    parameters = _plain(request.parameters) | {"binary_data_output": True}
    if timeout_s is not None:
        parameters["timeout"] = max(1, int(timeout_s * 1e6))
    told: dict[str, Any] = {
        "id": request.id,
        "parameters": parameters,
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": _plain(tensor.parameters) | {"binary_data_size": len(piece)},
            }
            for tensor, piece in zip(given, pieces, strict=True)
        ],
    }
    if request.outputs:
        told["outputs"] = [
            {"name": o.name, "parameters": _plain(o.parameters) | {"binary_data": True}}
            for o in request.outputs
        ]
    text = orjson.dumps(told)
    return b"".join((text, *pieces)), len(text)


def parameters_of(request: Any) -> dict[str, Any]:
    """Return a request's parameters as plain values."""
    return _plain(request.parameters)


def answer_of(body: bytes, length: int) -> Any:
    """Return the ``ModelInferResponse`` for an HTTP answer whose outputs are all raw.

    Args:
        body: as it came.
        length: of its JSON in bytes.
    """
    told = orjson.loads(body[:length])
    answer = MESSAGES["ModelInferResponse"](
        model_name=told["model_name"], model_version=told["model_version"], id=told["id"]
    )
    at = length
    for tensor in told["outputs"]:
        answer.outputs.add(name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"])
        end = at + tensor["parameters"]["binary_data_size"]
        answer.raw_output_contents.append(body[at:end])
        at = end
    return answer


def _raw(tensor: Any) -> bytes:
    """The values of a tensor that came typed, as raw bytes."""
    name = _CONTENTS.get(tensor.datatype)
    filled = [field.name for field, _ in tensor.contents.ListFields()]
    if name is None or filled not in ([name], []):
        raise BadRequest(
            f"input {tensor.name!r} of datatype {tensor.datatype!r} has its values in "
            f"{filled or 'none'}, wanted {name or 'raw_input_contents'}"
        )
    values: Sequence[Any] = getattr(tensor.contents, name)
    if tensor.datatype == "BYTES":
        return b"".join(len(v).to_bytes(4, "little") + v for v in values)
    try:
        return raw_of(np.array(list(values), dtype_of(tensor.datatype)))
    except OverflowError as e:
        raise BadRequest(f"input {tensor.name!r}: values are not {tensor.datatype}: {e}") from e


def _plain(parameters: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        chosen = value.WhichOneof("parameter_choice")
        if chosen is not None:
            found[name] = getattr(value, chosen)
    return found
