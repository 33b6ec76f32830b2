"""Recorded traffic: times, lengths and above all which tokens of which prompts are equal."""

import json
from pathlib import Path

import numpy as np
import pytest

from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.samples import Sample
from manta.cluster.bench.trace import BLOCK_LEN, TraceShape, read_trace, trace_samples

VOCABULARY = np.arange(50, 5000, dtype=np.int32)
MOONCAKE = [
    {"timestamp": 2000, "input_length": 1300, "output_length": 40, "hash_ids": [0, 1, 2]},
    {"timestamp": 2000, "input_length": 1600, "output_length": 1, "hash_ids": [0, 1, 3, 4]},
    {"timestamp": 5500, "input_length": 512, "output_length": 7, "hash_ids": [0]},
    {"timestamp": 9000, "input_length": 700, "output_length": 500, "hash_ids": [9, 1]},
    {"timestamp": 9001, "input_length": 1300, "output_length": 40, "hash_ids": [0, 1, 2]},
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:46.6805900,8000,0"""


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    file = tmp_path / "mooncake.jsonl"
    file.write_text("\n".join(map(json.dumps, MOONCAKE)) + "\n")
    return file


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE)
    return file


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Equal leading tokens."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _common_blocks(a: list[int], b: list[int]) -> int:
    return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0, 0.01])
def test_equal_hash_ids_are_equal_tokens(mooncake: Path, scale: float) -> None:
    samples = trace_samples(mooncake, VOCABULARY, 10, TraceShape(length_scale=scale), seed=0)
    block_len = max(1, round(BLOCK_LEN * scale))
    for row, sample in zip(MOONCAKE, samples, strict=True):
        assert len(sample.token_ids) == min(round(row["input_length"] * scale), block_len * len(row["hash_ids"]))
        for other_row, other in zip(MOONCAKE, samples, strict=True):
            blocks = _common_blocks(row["hash_ids"], other_row["hash_ids"])
            shorter = min(len(sample.token_ids), len(other.token_ids))
            assert _common(sample.token_ids, other.token_ids) == min(blocks * block_len, shorter)
    # A block is the same at another place, too: hash 1 comes first after 0 and then after 9.
    block = slice(block_len, min(2 * block_len, len(samples[3].token_ids)))
    assert (samples[0].token_ids[block] == samples[3].token_ids[block]).all()


def test_tokens_look_random(mooncake: Path) -> None:
    tokens = trace_samples(mooncake, VOCABULARY, 10, TraceShape(), seed=0)[1].token_ids
    assert len(set(tokens.tolist())) > 0.8 * len(tokens)
    assert tokens.min() >= 50
    assert tokens.max() < 5000
    assert abs(tokens.mean() - VOCABULARY.mean()) < 4 * VOCABULARY.std() / np.sqrt(len(tokens))


def test_seed_decides(mooncake: Path, azure: Path) -> None:
    def tokens(file: Path, seed: int) -> list[list[int]]:
        return [s.token_ids.tolist() for s in trace_samples(file, VOCABULARY, 9, TraceShape(), seed)]

    for file in (mooncake, azure):
        assert tokens(file, 1) == tokens(file, 1)
        assert tokens(file, 1) != tokens(file, 2)


def _shapes(samples: list[Sample]) -> list[tuple[float | None, int, int]]:
    return [(sample.arrival_s, len(sample.token_ids), sample.output_len) for sample in samples]


def test_azure(azure: Path) -> None:
    samples = trace_samples(azure, VOCABULARY, 5, TraceShape(), 0)
    assert [(length, output) for _, length, output in _shapes(samples)] == [(374, 44), (396, 109), (8000, 1)]
    assert [sample.arrival_s for sample in samples] == pytest.approx([0, 4.314579, 60], abs=1e-6)
    assert _common(samples[0].token_ids, samples[1].token_ids) == 0


def test_times_and_lengths_are_bent(azure: Path, mooncake: Path) -> None:
    shape = TraceShape(time_scale=0.5, length_scale=0.1, max_input_len=300, max_output_len=10)
    samples = trace_samples(azure, VOCABULARY, 2, shape, 0)
    assert [(length, output) for _, length, output in _shapes(samples)] == [(37, 4), (40, 10)]
    assert samples[1].arrival_s == pytest.approx(2.157, abs=1e-3)
    assert len(trace_samples(azure, VOCABULARY, 3, shape, 0)[2].token_ids) == 300
    assert [s.arrival_s for s in trace_samples(mooncake, VOCABULARY, 5, TraceShape(2.0), 0)] == pytest.approx(
        [0, 0, 7, 14, 14.002]
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a,b\n1,2\n", "TIMESTAMP"),
        ('{"timestamp": 1}\n', "input_length"),
        ("{not json", "neither"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "yesterday"),
        ("", "no request"),
    ],
)
def test_other_files_are_one_sentence(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    with pytest.raises(BenchError, match=part) as error:
        trace_samples(file, VOCABULARY, 5, TraceShape(), 0)
    assert "\n" not in str(error.value)
    with pytest.raises(BenchError, match="No such file"):
        list(read_trace(tmp_path / "missing"))
