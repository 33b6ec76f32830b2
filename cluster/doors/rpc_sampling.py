"""Sampling fields of a gRPC request in the validator's words."""

from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor

from manta.cluster.doors.errors import RequestError
from manta.protos import inference_pb2 as pb

_EARLY_STOPPING: dict[int, bool | str] = {
    pb.SamplingParams.OFF: False,
    pb.SamplingParams.ON: True,
    pb.SamplingParams.NEVER: "never",
}


def read_sampling(sampling: pb.SamplingParams) -> dict[str, Any]:
    """The fields that are set, under the names of configs.sampling.SamplingParams. Raises RequestError."""
    return {field.name: _plain(field, value) for field, value in sampling.ListFields()}


def _plain(field: FieldDescriptor, value: Any) -> Any:
    if field.name == "structured_outputs":
        return _constraint(value)
    if field.name == "early_stopping":
        check_enum(value, pb.SamplingParams.EarlyStopping, "early_stopping")
        return _EARLY_STOPPING[value]
    if field.name == "logit_bias":
        return {token: _shortest(bias) for token, bias in value.items()}
    if isinstance(value, float):
        return _shortest(value)
    return value if isinstance(value, int) else list(value)  # protobuf's containers are types of their own


def _shortest(value: float) -> float:
    """The number that the client wrote: 0.7 for the 0.699999988... that 32 bits make of it, as over HTTP."""
    return float(str(np.float32(value)))


def _constraint(value: pb.StructuredOutputs) -> dict[str, Any]:
    name = value.WhichOneof("constraint")
    if name is None:
        return {}
    return {name: list(value.choice.texts) if name == "choice" else getattr(value, name)}


def check_enum(value: int, kind: Any, param: str) -> None:
    """Numbers that no name stands for pass through protobuf. Raises RequestError."""
    if value not in kind.values():
        names = ", ".join(kind.keys())
        raise RequestError(f"{param}: {value} is not one of the {kind.DESCRIPTOR.name} values: {names}", param)
