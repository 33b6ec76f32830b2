"""Integers on the wire and columns on the host."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)


class PlanError(ValueError):
    """A step plan this worker cannot follow; the message names the step, the slot and what is wrong."""


def decode_uint32(data: bytes, what: str) -> Ints:
    """Little-endian uint32 -> int64 [n]. Raises PlanError naming `what`."""
    if len(data) % 4:
        raise PlanError(f"{what} has {len(data)} bytes, which is no whole number of uint32")
    return np.frombuffer(data, dtype="<u4").astype(np.int64)


def decode_int32(data: bytes, what: str) -> NDArray[np.int32]:
    """Little-endian int32 -> int32 [n]. Raises PlanError naming `what`."""
    if len(data) % 4:
        raise PlanError(f"{what} has {len(data)} bytes, which is no whole number of int32")
    return np.frombuffer(data, dtype="<i4").astype(np.int32, copy=False)


def decode_pairs(data: bytes | Sequence[int], what: str) -> Ints:
    """Little-endian uint32 pairs, or the numbers themselves, -> int64 [n, 2]. Raises PlanError naming `what`."""
    values = decode_uint32(data, what) if isinstance(data, bytes) else np.array(data, np.int64)
    if values.size % 2:
        raise PlanError(f"{what} has {values.size} numbers, which is no whole number of pairs")
    return values.reshape(-1, 2)


def grown(column: NDArray[Scalar], num_rows: int) -> NDArray[Scalar]:
    """The column with at least `num_rows` rows (twice as many as before, if it must grow), new ones zero."""
    if column.shape[0] >= num_rows:
        return column
    larger = np.zeros((max(num_rows, 2 * column.shape[0]), *column.shape[1:]), column.dtype)
    larger[: column.shape[0]] = column
    return larger
