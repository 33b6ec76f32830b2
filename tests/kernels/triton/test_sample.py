"""The GPU's sampler against a float64 oracle that sorts, against the uniforms of the host, and against the CPU's."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("numba", reason="numba is not installed", exc_type=ImportError)
from manta.kernels import sample_cpu
from manta.workers.draws import uniform
from tests.kernels.test_sample_cpu import FILTERS, Filters, Row, kept_weights, parameters, rows_of, seed_of
from tests.support.triton_device import DEVICE, INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
import triton
import triton.language as tl

from manta.kernels import row_search_triton, sample_row_triton, sample_triton
from manta.kernels.sample_penalties_triton import make_counts
from manta.kernels.sampling_rows import SamplingRows

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and lists that overflow, with few tokens."""
    monkeypatch.setattr(sample_triton, "TILE", 128)


def choose(logits: Row, draws: NDArray[np.float64], columns: Any) -> list[int]:
    """Tokens of logits [N, vocab]: row i is slot i, and draws[i] its random number."""
    columns.seed = np.array([seed_of(draw) for draw in draws], np.uint64)
    rows = np.arange(len(logits))
    history = torch.zeros(len(logits), 4, dtype=torch.int32, device=DEVICE)
    given = torch.from_numpy(logits.copy()).to(DEVICE)
    return sample_triton.RowSampler()(given, rows, np.zeros_like(rows), columns, history).tolist()


@triton.jit
def _uniform_kernel(seeds, positions, out):  # type: ignore[no-untyped-def]
    at = tl.program_id(0)
    tl.store(out + at, sample_row_triton.uniform(tl.load(seeds + at), tl.load(positions + at)))


def test_random_numbers_are_those_of_other_devices() -> None:
    generator = np.random.default_rng(5)
    seeds = generator.integers(0, 2**64, 100, np.uint64)
    positions = generator.integers(0, 2**20, 100)
    out = torch.zeros(100, dtype=torch.float64, device=DEVICE)
    given = [torch.from_numpy(x).to(DEVICE) for x in (seeds.view(np.int64), positions)]
    _uniform_kernel[(100,)](*given, out)
    assert out.tolist() == uniform(seeds, positions).tolist()


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize(
    ("kind", "vocab_size"),
    [("normal", 1), ("normal", 128), ("normal", 331), ("peaked", 331), ("flat", 331), ("ties", 331), ("masked", 331)],
)
def test_the_token_is_the_one_at_the_draw(vocab_size: int, kind: str, filters: Filters) -> None:
    """As for the CPU: rounding may move a draw, or the edge of top_p, over one token's border."""
    num_rows = 3
    logits = rows_of(kind, vocab_size, num_rows)
    draws = np.random.default_rng(1).random(num_rows)
    draws[:2] = 2.0**-41, 1 - 2.0**-41
    off = 0
    for row, token in enumerate(choose(logits, draws, parameters(num_rows, filters))):
        cumulative = np.cumsum(kept_weights(logits[row], filters))
        expected = int(np.searchsorted(cumulative, draws[row] * cumulative[-1], side="right"))
        if token != expected:
            off += 1
            assert np.abs(cumulative[token] - cumulative[expected]) / cumulative[-1] < 3e-4, (row, token, expected)
    assert off <= 1


@pytest.mark.parametrize("filters", ["plain", "top_k=50", "top_k=900", "top_p=0.9", "top_p=0.9999", "min_p=0.1"])
@pytest.mark.parametrize("kind", ["normal", "peaked"])
def test_large_vocabularies_give_the_tokens_of_the_cpu(
    kind: str, filters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists and rows of many tiles, with the tiles of real launches."""
    monkeypatch.setattr(sample_triton, "TILE", row_search_triton.TILE)
    logits = rows_of(kind, 20_011, 6) * 3
    columns, draws = parameters(6, FILTERS[filters]), np.random.default_rng(2).random(6)
    tokens = choose(logits, draws, columns)
    history = torch.zeros(6, 4, dtype=torch.int32)
    rows = np.arange(6)
    expected = sample_cpu.RowSampler()(torch.from_numpy(logits.copy()), rows, np.zeros_like(rows), columns, history)
    off = np.flatnonzero(np.array(tokens) != expected.numpy())
    assert off.size <= 1
    for row in off:  # beside each other in the distribution
        cumulative = np.cumsum(kept_weights(logits[row], FILTERS[filters]))
        assert np.abs(cumulative[tokens[row]] - cumulative[expected[row]]) / cumulative[-1] < 3e-4


def test_every_kept_token_is_drawn_and_no_other() -> None:
    for filters in (FILTERS[name] for name in ("plain", "top_k=5", "top_p=0.3", "min_p=0.1", "top_k+top_p+min_p")):
        logits = rows_of("ties", 200, 1)
        shares = kept_weights(logits[0], filters)
        shares /= shares.sum()
        large = np.flatnonzero(shares > 1e-5)[::5]
        draws = np.concatenate([(np.cumsum(shares) - shares / 2)[large], np.arange(5) / 5 + 1e-9])
        chosen = choose(np.repeat(logits, draws.size, axis=0), draws, parameters(draws.size, filters))
        assert chosen[: large.size] == large.tolist(), filters
        assert shares[chosen].min() > 0, filters


@pytest.mark.parametrize("vocab_size", [3, 64, 150])
@pytest.mark.parametrize("filters", [Filters(), Filters(top_k=2), Filters(0.5, 30, 0.9, 0.1)])
def test_rows_without_a_distribution_give_the_last_token(vocab_size: int, filters: Filters) -> None:
    logits = rows_of("normal", vocab_size, 8)
    draws = np.full(8, 0.5)
    before = choose(logits, draws, parameters(8, filters))
    logits[1, 0] = logits[2, -1] = np.nan
    logits[3] = np.nan
    logits[4, 1] = np.inf
    logits[5] = -np.inf
    after = choose(logits, draws, parameters(8, filters))
    assert after[1:6] == [vocab_size - 1] * 5
    assert [after[row] for row in (0, 6, 7)] == [before[row] for row in (0, 6, 7)]


def test_greedy_rows_take_the_first_of_the_best() -> None:
    logits = rows_of("ties", 500, 6)
    logits[2] = -np.inf
    logits[3] = np.nan
    columns = parameters(6, Filters(temperature=0.0))
    tokens = choose(logits, np.full(6, 0.5), columns)
    assert tokens[:3] == logits[:3].argmax(axis=1).tolist()
    assert 0 <= tokens[3] < 500
    assert tokens[4:] == logits[4:].argmax(axis=1).tolist()


@pytest.mark.parametrize("vocab_size", [50, 5000])
def test_penalties_and_stop_tokens_change_the_logits_as_written(vocab_size: int) -> None:
    generator = np.random.default_rng(3)
    logits = rows_of("normal", vocab_size, 5)
    history = torch.from_numpy(generator.integers(0, vocab_size, (5, 2400)).astype(np.int32))
    history[:, 40:] %= 23  # some tokens come often
    columns = parameters(
        5, Filters(temperature=0.0),
        num_prompt_tokens=np.array([10, 30, 0, 12, 700]), min_tokens=np.array([0, 0, 99, 18, 5]),
    )  # fmt: skip
    columns.presence_penalty[:] = 0.5, 0.3, 0.0, -0.4, 0.0
    columns.frequency_penalty[:] = 0.2, 0.7, 0.1, 0.0, 0.0
    columns.repetition_penalty[:] = 1.3, 0.8, 1.0, 1.0, 1.0
    columns.stop_token_ids[:, 0] = 7
    columns.stop_token_ids[2, 2] = vocab_size - 1
    positions = np.array([30, 30, 25, 30, 2400])
    expected = torch.from_numpy(logits).double()
    expected[2, 7] = expected[2, -1] = -torch.inf
    for row, end in enumerate(positions):
        output = history[row, columns.num_prompt_tokens[row] : end].tolist()
        for token in set(history[row, :end].tolist()):
            penalty = float(columns.repetition_penalty[row])
            x = expected[row, token]
            x = x / penalty if x > 0 else x * penalty
            count = output.count(token)
            x -= columns.frequency_penalty[row] * count + columns.presence_penalty[row] * (count > 0)
            expected[row, token] = x
    given = torch.from_numpy(logits.copy()).to(DEVICE)
    tokens = sample_triton.RowSampler()(given, np.arange(5), positions, columns, history.to(DEVICE))
    torch.testing.assert_close(given.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert tokens.tolist() == expected.argmax(dim=1).tolist()


def test_rows_that_are_not_there_and_rows_of_other_slots() -> None:
    """A padded batch gives the real rows the tokens they get alone; slots are not rows."""
    logits = rows_of("normal", 300, 3)
    columns = parameters(9, Filters(0.9, 40, 0.95))
    columns.seed = np.arange(9, dtype=np.uint64)
    columns.frequency_penalty[5] = 1.5
    slots, positions = np.array([7, 5, 2]), np.array([4, 9, 2])
    history = torch.randint(0, 300, (9, 10), dtype=torch.int32, device=DEVICE)
    alone = []
    for i in ([0], [1], [2]):
        given = torch.from_numpy(logits[i]).to(DEVICE)
        alone += sample_triton.RowSampler()(given, slots[i], positions[i], columns, history).tolist()
    rows = SamplingRows.of(slots, positions, columns, DEVICE)
    floats = torch.zeros(rows.floats.shape[0], 5, device=DEVICE)
    ints = torch.full((rows.ints.shape[0], 5), -1, device=DEVICE)
    floats[:, :3], ints[:, :3] = rows.floats, rows.ints
    padded = torch.full((5, 300), torch.nan, device=DEVICE)
    padded[:3] = torch.from_numpy(logits)
    counts = make_counts(2, 300, DEVICE)  # fewer programs than rows
    assert sample_triton.sample(padded, SamplingRows(floats, ints), history, counts).tolist() == [*alone, 0, 0]
    assert not counts.any()
    none = np.zeros(0, np.int64)
    assert sample_triton.RowSampler()(padded[:0], none, none, columns, history).shape == (0,)
