"""Which form of paged attention is chosen, and how FlashInfer is called: by a stand-in that attends as it was told."""

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from manta.kernels import attention, ops, paged_attention_cpu, reference
from manta.kernels.metadata import AttentionMetadata
from tests.support.paging import PagedSequences
from tests.support.tolerances import KERNEL, relative_error


class FakeWrapper:
    """Rebuilds rows from FlashInfer's page lists and attends with the reference; counts its plans."""

    num_plans = 0

    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert workspace.dtype == torch.uint8
        assert kv_layout == "HND"

    def plan(self, query_start: Tensor, begins: Tensor, pages: Tensor, last: Tensor, num_heads: int,
             num_kv_heads: int, dim: int, page_size: int, *, causal: bool, sm_scale: float, window_left: int,
             q_data_type: torch.dtype, kv_data_type: torch.dtype) -> None:  # fmt: skip
        assert causal
        assert {x.dtype for x in (query_start, begins, pages, last)} == {torch.int32}
        assert begins[-1] == pages.shape[0]
        FakeWrapper.num_plans += 1
        self.heads = (num_heads, num_kv_heads, dim)
        self.scale, self.window = sm_scale, None if window_left < 0 else window_left + 1
        counts = begins.diff()
        tables = torch.zeros(len(last), int(counts.max()), dtype=torch.int32)
        for row, (begin, count) in enumerate(zip(begins.tolist(), counts.tolist(), strict=False)):
            tables[row, :count] = pages[begin : begin + count]
        lengths = (counts - 1) * page_size + last
        nothing = torch.zeros(0, dtype=torch.int64)
        self.metadata = AttentionMetadata(
            query_start, lengths, tables, nothing, nothing, 0, 0, int(lengths.max()), page_size
        )

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        assert (q.shape[1], cache[0].shape[1], q.shape[2]) == self.heads
        out = reference.paged_attention(q.flatten(1), *cache, self.metadata, self.scale, self.window)
        return out.view(q.shape)


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor, AttentionMetadata]:
    torch.manual_seed(3)
    sequences = PagedSequences(16, num_blocks=30)
    sequences.step([(0, 30), (1, 16), (2, 15)])
    metadata = sequences.step([(0, 1), (1, 1), (2, 1), (3, 33), (4, 16)])
    keys, values = torch.randn(30, 2, 16, 20), torch.randn(30, 2, 16, 20)
    return torch.randn(52, 200)[:, :120], keys, values, metadata


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Only these of triton and flashinfer are there."""
    find = importlib.util.find_spec

    def find_spec(name: str) -> Any:
        return object() if name in names else None if name in ("triton", "flashinfer") else find(name)

    monkeypatch.setattr(attention, "find_spec", find_spec)


@pytest.mark.parametrize("window", [None, 20])
def test_flashinfer(
    case: tuple[Tensor, Tensor, Tensor, AttentionMetadata], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, "flashinfer")
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=FakeWrapper))
    q, keys, values, metadata = case
    attend, before = attention.on_gpu("flashinfer"), FakeWrapper.num_plans
    expected = reference.paged_attention(q, keys, values, metadata, 0.3, window)
    for _layer in range(3):
        assert relative_error(attend(q, keys, values, metadata, 0.3, window), expected) < KERNEL[torch.float32]
    assert FakeWrapper.num_plans == before + 1
    shorter = PagedSequences(16, num_blocks=30).step([(0, 5)])
    expected = reference.paged_attention(q[:5], keys, values, shorter, 0.3, window)
    assert relative_error(attend(q[:5], keys, values, shorter, 0.3, window), expected) < KERNEL[torch.float32]
    assert FakeWrapper.num_plans == before + 2
    with pytest.raises(ValueError, match="fp8"):
        attend(q, keys, values, metadata, 0.3, window, torch.ones(1), torch.ones(1))


def test_sdpa_without_triton(
    case: tuple[Tensor, Tensor, Tensor, AttentionMetadata], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch)
    expected = reference.paged_attention(*case, 0.3)
    assert relative_error(attention.on_gpu()(*case, 0.3), expected) < KERNEL[torch.float32]


@pytest.mark.parametrize(
    ("form", "batch_invariant", "message"),
    [
        ("flashattention", False, "there are triton, flashinfer, sdpa"),
        ("flashinfer", False, "not installed"),
        ("triton", False, "not installed"),
        (None, True, "not installed"),
        ("sdpa", True, "depends on the batch"),
    ],
)
def test_what_cannot_be_had(
    form: str | None, batch_invariant: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch)
    with pytest.raises(ValueError, match=message):
        attention.on_gpu(form, batch_invariant)


def test_a_cpu_has_its_own_form(case: tuple[Tensor, Tensor, Tensor, AttentionMetadata]) -> None:
    expected = paged_attention_cpu.paged_attention(*case, 0.3)
    assert torch.equal(ops.paged_attention(*case, 0.3), expected)


@pytest.mark.parametrize("form", ["cpu", "sdpa"])
def test_fp8_pages_without_a_kernel_of_their_own(
    form: str, case: tuple[Tensor, Tensor, Tensor, AttentionMetadata], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch)
    q, keys, values, metadata = case
    keys, values = (keys / 0.7).to(torch.float8_e4m3fn), (values / 3.0).to(torch.float8_e4m3fn)
    attend = ops.paged_attention if form == "cpu" else attention.on_gpu("sdpa")
    out = attend(q, keys, values, metadata, 0.3, 20, torch.tensor([0.7]), torch.tensor([3.0]))
    expected = reference.paged_attention(q, keys.float() * 0.7, values.float() * 3.0, metadata, 0.3, 20)
    assert relative_error(out, expected) < KERNEL[torch.float32]


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_triton_is_asked_for_bits_that_do_not_depend_on_the_batch(
    batch_invariant: bool, case: tuple[Tensor, Tensor, Tensor, AttentionMetadata], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from manta.kernels import paged_attention_triton

    asked: list[bool] = []

    def recorded(*_: Any, batch_invariant: bool) -> Tensor:
        asked.append(batch_invariant)
        return torch.zeros(1)

    monkeypatch.setattr(paged_attention_triton, "paged_attention", recorded)
    attention.on_gpu(None, batch_invariant)(*case, 0.3)
    assert asked == [batch_invariant]
