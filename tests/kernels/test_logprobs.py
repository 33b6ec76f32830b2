"""Log-probabilities and ranks of chosen and of best tokens against torch's log_softmax and a stable sort."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from manta.kernels import logprobs_cpu, reference
from tests.support.tolerances import KERNEL

KINDS = [("normal", 20), ("normal", 700), ("ties", 700), ("masked", 500), ("equal", 300), ("far", 300)]
FORMS: dict[str, Callable[..., Any]] = {"cpu": logprobs_cpu.logprobs, "reference": reference.logprobs}


def make_logits(kind: str, num_rows: int, vocab_size: int) -> Tensor:
    torch.manual_seed(vocab_size)
    logits = torch.randn(num_rows, vocab_size) * 4
    match kind:
        case "ties":
            logits = logits.round()
        case "masked":
            logits[torch.rand(logits.shape) < 0.99] = -torch.inf
            logits[:, 7] = 3.0
        case "equal":
            logits = torch.full_like(logits, -2.5)
        case "far":
            logits[:, 10] = 500.0  # the others' weights are 0 in float32
    return logits


def check_logprobs(logits: Tensor, tokens: Tensor, num_best: int, got: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """What a kernel said of logits [N, vocab] and tokens [N], all on the CPU."""
    chosen, ranks, ids, best = got
    expected = logits.log_softmax(dim=-1)
    tolerance = {"rtol": KERNEL[torch.float32], "atol": KERNEL[torch.float32] * 10}
    torch.testing.assert_close(chosen, expected.gather(1, tokens[:, None])[:, 0], **tolerance)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(ids, order[:, :num_best])
    torch.testing.assert_close(best, expected.gather(1, order[:, :num_best]), **tolerance)
    for row, token in enumerate(tokens.tolist()):
        assert ranks[row] == 1 + sum(x > logits[row, token].item() for x in logits[row].tolist())


@pytest.mark.parametrize("num_best", [0, 1, 5, 20])
@pytest.mark.parametrize(("kind", "vocab_size"), [*KINDS, ("normal", 63), ("normal", 64), ("ties", 65)])
@pytest.mark.parametrize("form", FORMS)
def test_logprobs(kind: str, vocab_size: int, num_best: int, form: str) -> None:
    logits = make_logits(kind, 3, vocab_size)
    tokens = torch.tensor([0, vocab_size // 2, 7])
    check_logprobs(logits, tokens, num_best, FORMS[form](logits, tokens, num_best))


def test_many_rows_and_many_best() -> None:
    """Enough for several threads; rows as tensor-parallel ranks have them, longer than the vocabulary."""
    logits = make_logits("normal", 40, 30_100)[:, :30_000]
    tokens = torch.randint(0, 30_000, (40,))
    check_logprobs(logits, tokens, 200, logprobs_cpu.logprobs(logits, tokens, 200))


def test_more_than_allowed_is_refused() -> None:
    with pytest.raises(AssertionError, match="the 257 best of 300 tokens"):
        logprobs_cpu.logprobs(torch.zeros(1, 300), torch.zeros(1, dtype=torch.int64), 257)
