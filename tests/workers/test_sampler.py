"""The sampler against transformers' logits processors, against softmax probabilities, and against itself alone. Both
its forms: the CPU's kernel, and torch's operations, which other devices run."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from manta.kernels import ops
from manta.protos.sampling_pb2 import Sampling
from manta.workers.draws import uniform
from manta.workers.filters import top_p_cutoff
from manta.workers.sampler import Sampler
from manta.workers.sampling_table import SamplingTable
from manta.workers.token_table import TokenTable

VOCAB_SIZE = 23
OFF = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}


@pytest.fixture(autouse=True, params=["kernel", "torch"])
def _form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(ops, "make_row_sampler", lambda device: None)


class Rig:
    """A sampler and the sequences it chooses for: (prompt, output, sampling fields) by slot."""

    def __init__(
        self, sequences: list[tuple[list[int], list[int], dict[str, Any]]], vocab_size: int = VOCAB_SIZE
    ) -> None:
        self.tokens = TokenTable(torch.device("cpu"))
        self.table = SamplingTable(vocab_size)
        self.sampler = Sampler(self.table, self.tokens)
        for slot, (prompt, output, fields) in enumerate(sequences):
            self.tokens.reserve(slot + 1, len(prompt) + len(output))
            self.tokens.write(slot, np.array(prompt + output, np.int32))
            self.table.set(slot, Sampling(**(OFF | fields)), len(prompt))
        self.lengths = np.array([len(prompt) + len(output) for prompt, output, _ in sequences])

    def sample(self, logits: Tensor, slots: list[int] | None = None) -> list[int]:
        index = np.arange(len(self.lengths)) if slots is None else np.array(slots)
        return self.sampler.sample(logits.clone(), index, self.lengths[index]).tolist()


def draws_of(fields: dict[str, Any], logits: Tensor, num_draws: int, context: tuple[list[int], list[int]]) -> Tensor:
    """How often each token is drawn from logits [vocab] over `num_draws` seeds: int64 [vocab]."""
    rig = Rig([(*context, fields)], logits.shape[0])
    rig.table.seed = np.arange(num_draws, dtype=np.uint64)
    for name in ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty"):
        setattr(rig.table, name, np.repeat(getattr(rig.table, name)[:1], num_draws))
    for name in ("repetition_penalty", "penalised", "num_prompt_tokens", "min_tokens"):
        setattr(rig.table, name, np.repeat(getattr(rig.table, name)[:1], num_draws))
    rig.table.stop_token_ids = np.repeat(rig.table.stop_token_ids[:1], num_draws, axis=0)
    rig.tokens.reserve(num_draws, 1)
    for slot in range(1, num_draws):
        rig.tokens.write(slot, np.array(context[0] + context[1], np.int32))
    rig.lengths = np.repeat(rig.lengths, num_draws)
    return torch.bincount(torch.tensor(rig.sample(logits.repeat(num_draws, 1))), minlength=logits.shape[0])


def assert_follows(counts: Tensor, probabilities: Tensor) -> None:
    """Chi-square: counts are draws of `probabilities`. The draws are fixed, so the test is too."""
    assert counts[probabilities == 0].sum() == 0
    kept = probabilities > 0
    expected = probabilities[kept].double() * counts.sum()
    degrees = int(kept.sum()) - 1
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    # Wilson and Hilferty's normal approximation of the chi-square quantile, at four standard deviations.
    limit = degrees * (1 - 2 / (9 * degrees) + 4 * (2 / (9 * degrees)) ** 0.5) ** 3 if degrees else 1e-9
    assert statistic < limit


def processed(fields: dict[str, Any], logits: Tensor, context: tuple[list[int], list[int]]) -> Tensor:
    """What transformers' processors leave of logits [vocab], in vLLM's order."""
    prompt, output = context
    ids = torch.tensor([prompt + output])
    processors: list[Any] = []
    if "min_tokens" in fields:
        processors.append(
            transformers.MinNewTokensLengthLogitsProcessor(len(prompt), fields["min_tokens"], fields["stop_token_ids"])
        )
    if "repetition_penalty" in fields:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"]))
    if fields.get("temperature", 1.0) != 1.0:
        processors.append(transformers.TemperatureLogitsWarper(fields["temperature"]))
    if "min_p" in fields:
        processors.append(transformers.MinPLogitsWarper(fields["min_p"]))
    if "top_k" in fields:
        processors.append(transformers.TopKLogitsWarper(fields["top_k"]))
    if "top_p" in fields:
        processors.append(transformers.TopPLogitsWarper(fields["top_p"]))
    scores = logits[None].clone()
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0]


FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.3},
    "top_k=1": {"top_k": 1},
    "top_k=4": {"top_k": 4},
    "top_p=0.05": {"top_p": 0.05},
    "top_p=0.7": {"top_p": 0.7},
    "min_p=0.2": {"min_p": 0.2},
    "top_k+top_p": {"top_k": 6, "top_p": 0.6},
    "hot+min_p+top_k+top_p": {"temperature": 1.7, "min_p": 0.05, "top_k": 9, "top_p": 0.8},
    "repetition=1.7": {"repetition_penalty": 1.7},
    "repetition=0.6": {"repetition_penalty": 0.6},
    "min_tokens": {"min_tokens": 4, "stop_token_ids": [2, 7]},
    "min_tokens over": {"min_tokens": 3, "stop_token_ids": [2, 7]},
    "all": {
        "temperature": 1.3, "min_p": 0.02, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.2,
        "min_tokens": 4, "stop_token_ids": [2, 7],
    },
}  # fmt: skip
CONTEXT = ([1, 2, 3, 2], [5, 7, 7])


@pytest.mark.parametrize("fields", FILTERS.values(), ids=FILTERS.keys())
def test_draws_follow_what_transformers_leaves(fields: dict[str, Any]) -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 2
    expected = processed(fields, logits, CONTEXT).softmax(dim=-1)
    assert_follows(draws_of(fields, logits, 20_000, CONTEXT), expected)


def test_greedy_takes_the_best_token_after_penalties() -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(4))
    fields = {"temperature": 0.0, "repetition_penalty": 1.5, "min_tokens": 4, "stop_token_ids": [2, 7, 9]}
    expected = processed(fields | {"temperature": 1.0}, logits, CONTEXT).argmax().item()
    assert Rig([(*CONTEXT, fields)]).sample(logits[None]) == [expected]
    assert Rig([(*CONTEXT, {"temperature": 1e-6})]).sample(logits[None]) == [logits.argmax().item()]


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.4), (-1.5, 0.9)])
def test_presence_and_frequency_count_the_output_alone(presence: float, frequency: float) -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(5))
    expected = logits.clone()
    for token in range(VOCAB_SIZE):
        occurrences = CONTEXT[1].count(token)
        expected[token] -= frequency * occurrences + (presence if occurrences else 0.0)
    fields = {"presence_penalty": presence, "frequency_penalty": frequency}
    assert_follows(draws_of(fields, logits, 20_000, CONTEXT), expected.softmax(dim=-1))


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_top_p_over_a_vocabulary_larger_than_its_candidates(top_p: float, scale: float) -> None:
    vocab_size = 6000
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(6)) * scale
    kept = top_p_kept(logits, top_p)
    expected = torch.stack([processed({"top_p": top_p}, row, ([1], [])) for row in logits]) > -torch.inf
    # transformers sums in float32: the token on the edge of top_p may fall on either side
    assert (kept != expected).sum(dim=-1).max() <= 1
    assert torch.equal(kept[2:3], top_p_kept(logits[2:3], top_p))


def top_p_kept(logits: Tensor, top_p: float) -> Tensor:
    weights = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
    return weights >= top_p_cutoff(weights, torch.full((logits.shape[0],), top_p))[:, None]


def test_ties_with_the_last_token_stay() -> None:
    logits = torch.tensor([3.0, 1.0, 3.0, 3.0, 0.0])
    for fields in ({"top_k": 2}, {"top_p": 0.4}):
        assert draws_of(fields, logits, 500, ([1], []))[[0, 2, 3]].min() > 100


def mixed_rig() -> tuple[Rig, Tensor]:
    """Rows of every kind, and logits [rows, vocab] with ties."""
    generator = np.random.default_rng(7)
    fields = [*FILTERS.values(), {"temperature": 0.0}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}]
    sequences = [
        (
            generator.integers(0, VOCAB_SIZE, generator.integers(1, 9)).tolist(),
            generator.integers(0, VOCAB_SIZE, generator.integers(0, 5)).tolist(),
            row | {"seed": int(generator.integers(0, 2**63))},
        )
        for row in fields
    ]
    logits = torch.from_numpy(generator.normal(size=(len(fields), VOCAB_SIZE))).to(torch.bfloat16).float()
    return Rig(sequences), logits


def test_a_row_does_not_depend_on_its_batch() -> None:
    rig, logits = mixed_rig()
    num_rows = logits.shape[0]
    together = rig.sample(logits)
    assert together == [rig.sample(logits[row : row + 1], [row])[0] for row in range(num_rows)]
    order = np.random.default_rng(8).permutation(num_rows).tolist()
    assert [together[row] for row in order] == rig.sample(logits[order], order)
    half = order[: num_rows // 2]
    assert [together[row] for row in half] == rig.sample(logits[half], half)


@pytest.mark.parametrize("_form", ["kernel"], indirect=True)
def test_kernel_and_torch_choose_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, _ = mixed_rig()
    num_rows = len(rig.lengths)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "make_row_sampler", lambda device: None)
        in_torch = Sampler(rig.table, rig.tokens)
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(10))
    slots = np.arange(num_rows)
    for shift in range(50):  # other draws
        expected = in_torch.sample(logits.clone(), slots, rig.lengths + shift).tolist()
        assert rig.sampler.sample(logits.clone(), slots, rig.lengths + shift).tolist() == expected


def test_the_draw_changes_with_seed_and_position_only() -> None:
    logits = torch.zeros(1, 1000)
    tokens = {}
    for seed in (0, 1, 2**64 - 1):
        for length in (1, 2, 50):
            rig = Rig([([1] * length, [], {"seed": seed})], 1000)
            tokens[seed, length] = rig.sample(logits)[0]
            assert tokens[seed, length] == rig.sample(logits)[0]
    assert len(set(tokens.values())) == len(tokens)


def test_extreme_logits_and_parameters() -> None:
    logits = torch.tensor([[-torch.inf, 200.0, -torch.inf, 199.0], [0.0, 0.0, 0.0, 0.0]])
    rig = Rig([([1], [], {"temperature": 0.01, "top_p": 1e-6}), ([1], [], {"top_k": 10**9, "min_p": 1.0})], 4)
    first, second = rig.sample(logits)
    assert first == 1
    assert 0 <= second < 4


def test_a_row_of_nan_gives_some_token_and_leaves_the_others_alone() -> None:
    logits = torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(9))
    for fields in ({}, {"top_k": 3, "top_p": 0.9}, {"temperature": 0.0}):
        rig = Rig([([1], [], {"seed": row} | fields) for row in range(3)])
        before = rig.sample(logits)
        broken = logits.clone()
        broken[1] = torch.nan
        after = rig.sample(broken)
        assert (after[0], after[2]) == (before[0], before[2])
        assert 0 <= after[1] < VOCAB_SIZE


def test_stop_tokens_outside_the_vocabulary_are_ignored() -> None:
    fields = {"temperature": 0.0, "min_tokens": 5, "stop_token_ids": [1, 3, *range(20, 30)]}
    logits = torch.tensor([[0.0, 9.0, 1.0, 8.0]])
    assert Rig([([1], [], fields)], 4).sample(logits) == [2]


def test_uniform_is_uniform_over_seeds_and_over_positions() -> None:
    num = 40_000
    for draws in (
        uniform(np.arange(num, dtype=np.uint64), np.full(num, 17)),
        uniform(np.full(num, 12345, np.uint64), np.arange(num)),
    ):
        assert draws.min() > 0
        assert draws.max() < 1
        counts = np.histogram(draws, bins=100, range=(0, 1))[0]
        assert ((counts - num / 100) ** 2 / (num / 100)).sum() < 160  # 99 degrees of freedom, four standard deviations
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / num**0.5
