"""The head of a safetensors file: 8 bytes of its length, JSON, then the tensors."""

import json
from typing import NamedTuple

import torch

LENGTH_BYTES = 8
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor: its bytes are begin : end of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_length(first: bytes, file_bytes: int) -> int:
    """Bytes of the JSON, of the file's first eight. Raises ValueError."""
    length = int.from_bytes(first, "little")
    if len(first) < LENGTH_BYTES or length > file_bytes - LENGTH_BYTES:
        raise ValueError("it has no header")
    return length


def parse_header(text: bytes) -> dict[str, Entry]:
    """By name of the tensor. Raises ValueError, KeyError, TypeError, AttributeError or OverflowError if malformed."""
    begin = LENGTH_BYTES + len(text)
    return {
        name: Entry(
            entry["dtype"],
            tuple(entry["shape"]),
            begin + entry["data_offsets"][0],
            begin + entry["data_offsets"][1],
        )
        for name, entry in json.loads(text).items()
        if name != "__metadata__"
    }


MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
