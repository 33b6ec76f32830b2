"""Memory of KV blocks comes ahead of the blocks in use, all of it in time, and keeps what is in it."""

import threading

import numpy as np
import pytest
import torch

from manta.kernels.cpu_decoder import memory
from manta.kernels.cpu_decoder.memory import HUGE_PAGE_BYTES
from manta.protos.worker_pb2 import SeqAdd, StepPlan
from manta.workers import pages_ahead
from manta.workers.compute import ComputeThread
from manta.workers.pages_ahead import AHEAD_PAGES, PagesAhead

BLOCK_BYTES = HUGE_PAGE_BYTES // 4
NUM_BLOCKS = 30  # seven pages and a half


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Address -> bytes that were asked for."""
    asked: dict[int, int] = {}

    def record(address: int, num_bytes: int) -> bool:
        assert address not in asked, "asked for a second time"
        asked[address] = num_bytes
        return True

    monkeypatch.setattr(pages_ahead, "populate", record)
    return asked


def cache() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [tuple(torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8) for _ in "kv") for _ in range(3)]  # type: ignore[misc]


def num_bytes_given(given: dict[int, int], tensor: torch.Tensor) -> int:
    """What was asked for of a tensor, which is one piece from its beginning."""
    end = tensor.data_ptr()
    while end in given:
        end += given[end]
    assert sum(tensor.data_ptr() <= address < end for address in given) == sum(
        tensor.data_ptr() <= address < tensor.data_ptr() + tensor.nbytes for address in given
    )
    return end - tensor.data_ptr()


def advance(pages: PagesAhead) -> None:
    for _ in range(1000):
        if not pages.advance():
            return
    raise AssertionError("never ends")


def test_stays_ahead_of_blocks_in_use(given: dict[int, int]) -> None:
    kv_cache = cache()
    pages = PagesAhead(kv_cache)
    for plan, num_used in (
        (StepPlan(), 0),
        (StepPlan(grow=[0, 4, 1, 2]), 5),
        (StepPlan(adds=[SeqAdd(blocks=np.array([9, 3], "<u4").tobytes()), SeqAdd()], grow=[0, 8]), 10),
        (StepPlan(grow=[0, 29]), 30),
    ):
        pages.note(plan)
        advance(pages)
        whole = NUM_BLOCKS * BLOCK_BYTES
        wanted = min(whole, num_used * BLOCK_BYTES + AHEAD_PAGES * HUGE_PAGE_BYTES)
        for layer in kv_cache:
            for tensor in layer:
                assert wanted <= num_bytes_given(given, tensor) <= min(whole, wanted + HUGE_PAGE_BYTES)


def test_a_system_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_ahead, "populate", lambda address, num_bytes: False)
    pages = PagesAhead(cache())
    advance(pages)
    assert not pages.advance()


def test_an_empty_cache() -> None:
    assert not PagesAhead([]).advance()


def test_populated_memory_keeps_its_contents() -> None:
    tensor = memory.zeros((3 * HUGE_PAGE_BYTES,), torch.uint8)
    tensor[5] = 7
    memory.populate(tensor.data_ptr(), tensor.nbytes)
    assert tensor[5] == 7
    assert tensor.sum() == 7


def test_idle_work_comes_after_jobs_and_between_them() -> None:
    thread = ComputeThread()
    order: list[str] = []
    pieces = iter([True, True, False, True, False])
    twice, again = threading.Event(), threading.Event()

    def work() -> bool:
        order.append("idle")
        is_more = next(pieces, False)
        if not is_more:
            (again if twice.is_set() else twice).set()
        return is_more

    thread.when_idle(work)
    assert twice.wait(10)
    assert order == ["idle"] * 3
    thread.call(lambda: order.append("job"))
    assert again.wait(10)
    assert order == ["idle"] * 3 + ["job"] + ["idle"] * 2
    thread.stop()
