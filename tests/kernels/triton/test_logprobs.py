"""Log-probabilities of chosen and of best tokens against torch's log_softmax and a stable sort."""

import pytest
import torch

from tests.support.tolerances import KERNEL
from tests.support.triton_device import DEVICE, INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
from manta.kernels import logprobs_triton, reference

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.mark.parametrize("num_best", [0, 1, 5, 20])
@pytest.mark.parametrize(
    ("kind", "vocab_size"),
    [("normal", 20), ("normal", 700), ("ties", 700), ("masked", 500), ("equal", 300), ("far", 300)],
)
@pytest.mark.parametrize("form", ["triton", "reference"])
def test_logprobs(kind: str, vocab_size: int, num_best: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_triton, "TILE", 64)
    torch.manual_seed(vocab_size)
    logits = torch.randn(3, vocab_size) * 4
    if kind == "ties":
        logits = logits.round()
    elif kind == "masked":
        logits[torch.rand(logits.shape) < 0.99] = -torch.inf
        logits[:, 7] = 3.0
    elif kind == "equal":
        logits = torch.full_like(logits, -2.5)
    elif kind == "far":
        logits[:, 10] = 500.0  # the others' weights are 0 in float32
    tokens = torch.tensor([0, vocab_size // 2, 7])
    given = logits.to(DEVICE), tokens.to(DEVICE), num_best
    chosen, ids, best = logprobs_triton.logprobs(*given) if form == "triton" else reference.logprobs(*given)
    expected = logits.log_softmax(dim=-1)
    tolerance = {"rtol": KERNEL[torch.float32], "atol": KERNEL[torch.float32] * 10}
    torch.testing.assert_close(chosen.cpu(), expected.gather(1, tokens[:, None])[:, 0], **tolerance)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(ids.cpu(), order[:, :num_best])
    torch.testing.assert_close(best.cpu(), expected.gather(1, order[:, :num_best]), **tolerance)


def test_more_than_allowed_is_refused() -> None:
    with pytest.raises(AssertionError, match="the 21 best of 300 tokens"):
        logprobs_triton.logprobs(torch.zeros(1, 300, device=DEVICE), torch.zeros(1, dtype=torch.int64), 21)
