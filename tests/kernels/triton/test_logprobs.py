"""Log-probabilities and ranks by the GPU's kernel, as those by the others are tested."""

import pytest
import torch

from tests.kernels.test_logprobs import KINDS, check_logprobs, make_logits
from tests.support.triton_device import DEVICE, INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
from manta.kernels import logprobs_triton

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.mark.parametrize("num_best", [0, 1, 5, 20, 40])
@pytest.mark.parametrize(("kind", "vocab_size"), KINDS)
def test_logprobs(kind: str, vocab_size: int, num_best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_triton, "TILE", 64)
    num_best = min(num_best, vocab_size)
    logits = make_logits(kind, 3, vocab_size)
    tokens = torch.tensor([0, vocab_size // 2, 7])
    got = logprobs_triton.logprobs(logits.to(DEVICE), tokens.to(DEVICE), num_best)
    check_logprobs(logits, tokens, num_best, tuple(x.cpu() for x in got))


def test_more_than_allowed_is_refused() -> None:
    with pytest.raises(AssertionError, match="the 257 best of 300 tokens"):
        logprobs_triton.logprobs(torch.zeros(1, 300, device=DEVICE), torch.zeros(1, dtype=torch.int64), 257)
