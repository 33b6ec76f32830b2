"""Copies that plans ask for, layer by layer and by one launch for all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from manta.kernels import ops
from manta.kernels.metadata import KVCache
from manta.workers.block_copy import BlockCopies
from manta.workers.columns import PlanError
from tests.support.plans import step_plan
from tests.support.triton_device import DEVICE

NUM_BLOCKS = 6


def make_cache() -> KVCache:
    generator = torch.Generator().manual_seed(3)
    shape = (NUM_BLOCKS, 2, 4, 8)
    return [tuple(torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2)) for _ in range(3)]  # type: ignore[misc]


@pytest.fixture(params=["by layer", "one launch"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the kernel, where there is one."""
    names: list[str] = []
    if request.param == "by layer":
        monkeypatch.setattr(ops, "make_block_copier", lambda _: None)
        return names
    pytest.importorskip("triton", reason="triton is not installed")
    from manta.kernels.block_copy_triton import BlockCopier

    class Noting(BlockCopier):
        def _launch(self, mode: str, pairs: Tensor, buffer: Tensor) -> None:
            names.append(mode)
            super()._launch(mode, pairs, buffer)

    make: Any = Noting
    monkeypatch.setattr(ops, "make_block_copier", make)
    return names


@pytest.mark.parametrize(
    ("pairs", "calls"),
    [
        ([(1, 4)], ["copy"]),
        ([(0, 3), (0, 5), (2, 1)], ["copy"]),
        ([(0, 1), (1, 0), (2, 5)], ["gather", "scatter"]),  # sources are read before any of them is written
        ([(3, 4), (4, 5)], ["gather", "scatter"]),
    ],
)
def test_blocks_become_what_their_sources_were(
    pairs: list[tuple[int, int]], calls: list[str], launches: list[str]
) -> None:
    kv_cache, before = make_cache(), make_cache()
    BlockCopies(kv_cache).apply(step_plan(1, copies=pairs))
    index = torch.arange(NUM_BLOCKS)
    for source, target in pairs:
        index[target] = source
    for layer, was in zip(kv_cache, before, strict=True):
        for pages, old in zip(layer, was, strict=True):
            assert torch.equal(pages, old[index.to(DEVICE)])
    assert launches in ([], calls)


def test_a_plan_without_copies_launches_nothing(launches: list[str]) -> None:
    BlockCopies(make_cache()).apply(step_plan(1))
    assert launches == []


@pytest.mark.parametrize(
    ("pairs", "message"), [([(1, 6)], "block 6 of 6"), ([(6, 1)], "block 6 of 6"), ([(0, 1), (2, 1)], "a block twice")]
)
def test_copies_that_cannot_be_done(pairs: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(PlanError, match=f"step 1: copies .*{message}"):
        BlockCopies(make_cache()).apply(step_plan(1, copies=pairs))
