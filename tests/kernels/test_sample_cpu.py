"""The CPU's row sampler against a float64 oracle that sorts, against torch's penalties, and against itself on other
threads."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from manta.kernels import sample_cpu, sample_row_cpu, table_call
from manta.kernels.cpu_decoder.team import team_of
from manta.kernels.sample_cpu import RowSampler
from manta.workers import draws as draws_of_workers

Row = NDArray[np.float32]


@dataclass(frozen=True)
class Filters:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


FILTERS = {
    "plain": Filters(),
    "cold": Filters(temperature=0.2),
    "hot": Filters(temperature=3.0),
    "top_k=1": Filters(top_k=1),
    "top_k=5": Filters(top_k=5),
    "top_k=50": Filters(0.7, top_k=50),
    "top_k=900": Filters(top_k=900),
    "top_p=1e-6": Filters(top_p=1e-6),
    "top_p=0.3": Filters(top_p=0.3),
    "top_p=0.9": Filters(0.8, top_p=0.9),
    "top_p=0.9999": Filters(top_p=0.9999),
    "min_p=0.1": Filters(1.5, min_p=0.1),
    "min_p=1e-12": Filters(min_p=1e-12),
    "min_p=1": Filters(min_p=1.0),
    "top_k+min_p": Filters(top_k=20, min_p=0.01),
    "top_k+top_p+min_p": Filters(1.2, top_k=50, top_p=0.9, min_p=0.02),
}


def rows_of(kind: str, vocab_size: int, num_rows: int) -> Row:
    generator = np.random.default_rng([vocab_size, num_rows])
    x = generator.normal(size=(num_rows, vocab_size))
    if kind == "peaked":
        x = x - 2.0 * np.log1p(generator.permuted(np.tile(np.arange(vocab_size), (num_rows, 1)), axis=1)) - 20.0
    elif kind == "flat":
        x = x * 0.01
    elif kind == "ties":
        x = np.round(x * 2) / 2
    elif kind == "masked":
        x = np.where(generator.random(x.shape) < 0.9, -np.inf, x * 3 + 100)
        x[:, vocab_size // 2] = 100.0
    return x.astype(np.float32)


def kept_weights(logits: Row, filters: Filters) -> NDArray[np.float64]:
    """float64 [vocab]: what each token weighs after the filters, by sorting."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / np.float32(filters.temperature))
    cutoff = float(np.float32(filters.min_p))
    if filters.top_k:
        cutoff = max(cutoff, np.sort(weights)[::-1][min(filters.top_k, weights.size) - 1])
    weights[weights < cutoff] = 0.0
    if filters.top_p < 1.0:
        best = np.sort(weights)[::-1]
        before = np.cumsum(best) - best
        num_kept = max(1, int((before < np.float32(filters.top_p) * weights.sum()).sum()))
        weights[weights < best[num_kept - 1]] = 0.0
    return weights


def parameters(num_slots: int, filters: Filters, **others: Any) -> Any:
    """Columns of slots that all sample alike."""
    off = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    columns = {name: np.full(num_slots, value, np.float32) for name, value in off.items()}
    for name in ("temperature", "top_p", "min_p"):
        columns[name] = np.full(num_slots, getattr(filters, name), np.float32)
    for name in ("num_prompt_tokens", "min_tokens"):
        columns[name] = np.zeros(num_slots, np.int64)
    columns["seed"] = np.zeros(num_slots, np.uint64)
    columns["top_k"] = np.full(num_slots, filters.top_k, np.int64)
    columns["stop_token_ids"] = np.full((num_slots, 4), -1, np.int64)
    return SimpleNamespace(**(columns | others))


def seed_of(draw: float) -> int:
    """The seed whose random number at position 0 is the one nearest to `draw`: SplitMix64 backwards, twice."""

    def unshift(x: int, shift: int) -> int:
        y = x
        for _ in range(64 // shift):
            y = x ^ (y >> shift)
        return y

    x = min(int(draw * 2**40), 2**40 - 1) << 24
    for _ in range(2):
        x = unshift(x, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
        x = unshift(x, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
        x = unshift(x, 30)
    return (x - 0x9E3779B97F4A7C15) % 2**64


def choose(logits: Row, draws: NDArray[np.float64], parameters: Any, sampler: RowSampler | None = None) -> list[int]:
    """Tokens of logits [N, vocab]: row i is slot i, and draws[i] its random number."""
    parameters.seed = np.array([seed_of(draw) for draw in draws], np.uint64)
    rows = np.arange(len(logits))
    history = torch.zeros(len(logits), 4, dtype=torch.int32)
    given = torch.from_numpy(logits.copy())
    return (sampler or RowSampler())(given, rows, np.zeros_like(rows), parameters, history).tolist()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_random_numbers_are_those_of_other_devices() -> None:
    generator = np.random.default_rng(5)
    seeds = generator.integers(0, 2**64, 1000, np.uint64)
    positions = generator.integers(0, 2**20, 1000)
    own = [sample_row_cpu.uniform(int(seed.view(np.int64)), int(p)) for seed, p in zip(seeds, positions, strict=True)]
    assert own == draws_of_workers.uniform(seeds, positions).tolist()
    for draw in (0.0, 0.3, 1.0):
        assert abs(sample_row_cpu.uniform(int(np.uint64(seed_of(draw)).view(np.int64)), 0) - draw) < 2**-40


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "ties", "masked"])
@pytest.mark.parametrize("vocab_size", [1, 2, 23, 64, 129, 1000, 20_011])
def test_the_token_is_the_one_at_the_draw(vocab_size: int, kind: str, filters: Filters) -> None:
    """The oracle's own place in the cumulative distribution. Rounding may move a draw, or the edge of top_p, over one
    token's border, which happens about as often as a token's weight is near 1e-6 of the row's."""
    num_rows = 12
    logits = rows_of(kind, vocab_size, num_rows)
    draws = np.random.default_rng(1).random(num_rows)
    draws[:2] = 2.0**-41, 1 - 2.0**-41
    chosen = choose(logits, draws, parameters(num_rows, filters))
    off = 0
    for row, token in enumerate(chosen):
        weights = kept_weights(logits[row], filters)
        cumulative = np.cumsum(weights)
        expected = int(np.searchsorted(cumulative, draws[row] * cumulative[-1], side="right"))
        if token != expected:
            off += 1
            between = np.abs(cumulative[token] - cumulative[expected]) / cumulative[-1]
            assert between < 3e-4, (row, token, expected)
    assert off <= (1 if vocab_size <= 1000 else 3)


@pytest.mark.parametrize("vocab_size", [5, 64, 1000])
def test_every_kept_token_is_drawn_and_no_other(vocab_size: int) -> None:
    """Draws in the middle of each token's share, where rounding does not reach, and draws from all over."""
    for filters in FILTERS.values():
        logits = rows_of("ties", vocab_size, 1)
        shares = kept_weights(logits[0], filters)
        shares /= shares.sum()
        large = np.flatnonzero(shares > 1e-5)
        draws = np.concatenate([(np.cumsum(shares) - shares / 2)[large], np.arange(500) / 500 + 1e-9])
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


def test_rows_go_over_threads_and_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = rows_of("normal", 5000, 33)
    draws = np.random.default_rng(2).random(33)
    columns = parameters(33, Filters(0.9, 40, 0.95))
    columns.temperature[::3] = 0.0
    columns.repetition_penalty[::4] = 1.5
    alone = choose(logits, draws, columns)
    monkeypatch.setattr(sample_cpu, "MIN_SHARED_LOGITS", 0)
    torch.set_num_threads(2)
    team = team_of(2, torch.float32, uses_dot=False)
    jobs = []
    run = team.run
    monkeypatch.setattr(team, "run", lambda job, step: (jobs.append(job), run(job, step)))
    sampler = RowSampler()
    for _ in range(20):
        assert choose(logits, draws, columns, sampler) == alone
    assert len(jobs) == 20
    monkeypatch.setattr(sample_cpu, "running_team", lambda num_threads: None)
    sampler = RowSampler()
    compiled = len(table_call.run_alone.signatures), len(table_call.run_together.signatures)
    assert choose(logits, draws, columns, sampler) == alone
    assert len(jobs) == 20
    assert (len(table_call.run_alone.signatures), len(table_call.run_together.signatures)) == compiled == (1, 1)


def test_parameters_that_have_moved_are_found_again() -> None:
    """Columns grow with the slots: the arrays are others then."""
    logits = rows_of("normal", 100, 40)
    draws, sampler = np.full(40, 0.9), RowSampler()
    columns = parameters(40, Filters())
    assert choose(logits, draws, columns, sampler) == choose(logits, draws, columns)
    columns.top_k = np.ones(40, np.int64)
    assert choose(logits, draws, columns, sampler) == logits.argmax(axis=1).tolist()
    columns.temperature = np.zeros(40, np.float32)
    columns.min_tokens = np.ones(40, np.int64)
    columns.stop_token_ids = np.repeat(np.arange(99)[None], 40, axis=0)
    assert choose(logits, draws, columns, sampler) == [99] * 40


def test_penalties_and_stop_tokens_change_the_logits_as_written() -> None:
    vocab_size = 50
    generator = np.random.default_rng(3)
    logits = torch.from_numpy(rows_of("normal", vocab_size, 4))
    history = torch.from_numpy(generator.integers(0, vocab_size, (4, 30)).astype(np.int32))
    columns = parameters(4, Filters(), num_prompt_tokens=np.array([10, 30, 0, 12]), min_tokens=np.array([0, 0, 99, 18]))
    columns.presence_penalty[:] = 0.5, 0.3, 0.0, -0.4
    columns.frequency_penalty[:] = 0.2, 0.7, 0.1, 0.0
    columns.repetition_penalty[:] = 1.3, 0.8, 1.0, 1.0
    columns.stop_token_ids[:, 0] = 7
    positions = np.array([30, 30, 25, 30])
    expected = logits.double()
    expected[2, 7] = -torch.inf
    for row, end in enumerate(positions):
        output = history[row, columns.num_prompt_tokens[row] : end].tolist()
        for token in set(history[row, :end].tolist()):
            penalty = float(columns.repetition_penalty[row])
            x = expected[row, token]
            x = x / penalty if x > 0 else x * penalty
            x -= columns.frequency_penalty[row] * output.count(token) + columns.presence_penalty[row] * (
                token in output
            )
            expected[row, token] = x
    sampler = RowSampler()
    for _ in range(2):  # what it counts with is clean again
        changed = logits.clone()
        sampler(changed, np.arange(4), positions, columns, history)
        assert torch.allclose(changed.double(), expected, rtol=1e-6, atol=1e-6)


def test_rows_need_not_lie_one_behind_the_other() -> None:
    """Padding columns between rows are neither read nor written."""
    logits = torch.from_numpy(rows_of("normal", 200, 6))
    wide = torch.full((6, 263), torch.nan)
    wide[:, :200] = logits
    history = torch.zeros(6, 4, dtype=torch.int32)
    rows, columns = np.arange(6), parameters(6, Filters(0.6, 0, 0.9), seed=np.arange(6, dtype=np.uint64))
    sampler = RowSampler()
    chosen = sampler(wide[:, :200], rows, rows, columns, history)
    assert torch.equal(chosen, sampler(logits, rows, rows, columns, history))
    assert bool(wide[:, 200:].isnan().all())
