"""Requests from recorded traffic: when they came, how long they were, and which parts of their prompts were equal.

Two formats: Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens; Patel et al., Splitwise, ISCA 2024) and Mooncake's
JSON lines (timestamp in ms, input_length, output_length, hash_ids; Qin et al., FAST 2025), where equal hash ids stand
for equal blocks of 512 prompt tokens.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

import numpy as np

from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.samples import Sample

BLOCK_LEN = 512


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request. Without `hash_ids` its prompt is like no other."""

    arrival_s: float
    input_len: int
    output_len: int
    hash_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class TraceShape:
    """How a trace is bent to the machine: gaps and lengths are multiplied, then lengths cut to the limits."""

    time_scale: float = 1.0
    length_scale: float = 1.0
    max_input_len: int | None = None
    max_output_len: int | None = None


def trace_samples(path: Path, vocabulary: np.ndarray, num_prompts: int, shape: TraceShape, seed: int) -> list[Sample]:
    """The first `num_prompts` requests. Raises BenchError.

    Equal hash ids give equal tokens, at any length scale. Each token depends on (seed, block, position) alone.
    """
    rows = list(islice(read_trace(path), num_prompts))
    if not rows:
        raise BenchError(f"--dataset-path {path} holds no request")
    block_len = max(1, round(BLOCK_LEN * shape.length_scale))
    samples = []
    for number, row in enumerate(rows):
        length = _scaled(row.input_len, shape.length_scale, shape.max_input_len)
        if not row.hash_ids:
            blocks = np.array([[~number]])  # no recorded id is negative
            ids = _block_tokens(vocabulary, blocks, length, seed)
        else:
            length = min(length, block_len * len(row.hash_ids))
            ids = _block_tokens(vocabulary, np.array(row.hash_ids)[:, None], block_len, seed)
        output_len = _scaled(row.output_len, shape.length_scale, shape.max_output_len)
        arrival_s = (row.arrival_s - rows[0].arrival_s) * shape.time_scale
        samples.append(Sample(ids[:length], output_len, arrival_s=arrival_s))
    return samples


def read_trace(path: Path) -> Iterator[TraceRow]:
    """The rows of either format, in the order of their arrival. Raises BenchError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            start = file.read(1)
            file.seek(0)
            yield from _read_mooncake(file) if start == "{" else _read_azure(file)
    except OSError as error:
        raise BenchError(f"cannot read --dataset-path {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise BenchError(
            f"--dataset-path {path} is neither an Azure trace (CSV with TIMESTAMP,ContextTokens,GeneratedTokens) nor a "
            f"Mooncake trace (JSON lines with timestamp, input_length, output_length, hash_ids): {error!r}"
        ) from None


def _read_azure(lines: Iterator[str]) -> Iterator[TraceRow]:
    first: datetime | None = None
    for row in csv.DictReader(lines):
        time = datetime.fromisoformat(row["TIMESTAMP"])
        first = first or time
        yield TraceRow((time - first).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _read_mooncake(lines: Iterator[str]) -> Iterator[TraceRow]:
    for line in lines:
        if line.strip():
            row = json.loads(line)
            hash_ids = [int(hash_id) for hash_id in row["hash_ids"]]
            yield TraceRow(int(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]), hash_ids)


def _scaled(length: int, scale: float, limit: int | None) -> int:
    scaled = max(1, round(length * scale))
    return scaled if limit is None else min(scaled, limit)


def _block_tokens(vocabulary: np.ndarray, blocks: np.ndarray, block_len: int, seed: int) -> np.ndarray:
    """int32 [num_blocks * block_len] of `blocks` [num_blocks, 1]: SplitMix64 (Steele et al., 2014) as a hash."""
    with np.errstate(over="ignore"):
        keys = _mix(blocks.astype(np.uint64) + _mix(np.array([[seed]], np.uint64)))
        words = _mix(keys + np.arange(1, block_len + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    tokens: np.ndarray = vocabulary[(words % np.uint64(len(vocabulary))).astype(np.int64)].ravel()
    return tokens


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value
