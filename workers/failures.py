"""What a failure inside the worker means to whoever called it."""

import grpc
from pydantic import ValidationError

from manta.configs.model import ModelError


class OrderError(RuntimeError):
    """A call came before the one it follows, or a second time."""


def status_of(error: Exception) -> grpc.StatusCode:
    """The status code of a call that raised `error`."""
    from torch import OutOfMemoryError  # here, so that a worker answers before torch is imported

    from manta.configs.capacity import CapacityError
    from manta.workers.block_transfer import TransferError
    from manta.workers.columns import PlanError
    from manta.workers.rank import PlacementError

    if isinstance(error, OrderError):
        return grpc.StatusCode.FAILED_PRECONDITION
    if isinstance(error, TransferError):
        return grpc.StatusCode.ABORTED
    if isinstance(error, ValidationError | ModelError | PlacementError | PlanError):
        return grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, CapacityError | OutOfMemoryError | MemoryError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    return grpc.StatusCode.INTERNAL


def reason_of(error: Exception, step: int) -> str:
    """Why a step failed, in one line."""
    from manta.workers.columns import PlanError

    if isinstance(error, PlanError):  # says everything itself
        return str(error)
    first_line = str(error).strip().partition("\n")[0]
    return f"step {step}: {type(error).__name__}: {first_line}"
