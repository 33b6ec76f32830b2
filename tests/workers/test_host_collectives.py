"""Sums and gathers through shared memory: the bits torch gives, whoever comes late, and an error when nobody comes.

The ranks are threads here, which the kernels cannot tell from processes; `test_shared_memory` has processes.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from numba.extending import is_jitted
from torch import Tensor

from manta.kernels import all_reduce_cpu, barrier_cpu
from manta.kernels.all_reduce_cpu import Layout
from manta.workers.collectives import MeshError
from manta.workers.host_collectives import PIECE_BYTES, HostCollectives
from manta.workers.shared_memory import SharedMemory

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATIENCE_S = 100.0
PIECE = PIECE_BYTES // 4  # float32 elements


class NoGroup:
    """Stands where gloo would; calls that reach it are counted."""

    def __init__(self) -> None:
        self.num_calls = 0

    def all_reduce(self, x: Tensor) -> None:
        self.num_calls += 1

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        raise AssertionError("every dtype can be gathered")

    def destroy(self) -> None:
        pass


def make_group(num_ranks: int, timeout_s: float = PATIENCE_S, spin_us: float = 5.0) -> list[HostCollectives]:
    """The ranks' views of memory of this process."""
    layout = Layout(num_ranks, PIECE_BYTES)
    memory: Any = ctypes.create_string_buffer(layout.total_bytes + 4096)
    address = -(-ctypes.addressof(memory) // 4096) * 4096
    shared = SharedMemory(address, layout.total_bytes, (), memory)
    return [HostCollectives(shared, layout, rank, timeout_s, spin_us, NoGroup()) for rank in range(num_ranks)]


def on_all(group: list[HostCollectives], function: Callable[[int, HostCollectives], Any]) -> list[Any]:
    """function(rank, its view), all at once."""
    with ThreadPoolExecutor(len(group)) as pool:
        calls = [pool.submit(function, rank, member) for rank, member in enumerate(group)]
        return [call.result(timeout=PATIENCE_S) for call in calls]


def reference_sum(parts: list[Tensor]) -> Tensor:
    """In rank order in float32, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7])
def test_all_reduce_gives_every_rank_the_same_bits(num_ranks: int, dtype: torch.dtype) -> None:
    group = make_group(num_ranks)
    per_piece = PIECE_BYTES // dtype.itemsize
    sizes = [1, 2, 63, 577, 1025, per_piece - 1, per_piece, per_piece + 1, 3 * per_piece + 5]
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        parts = [(torch.randn(size, generator=generator) * 3.0**rank).to(dtype) for rank in range(num_ranks)]
        sums = [part.clone() for part in parts]
        on_all(group, lambda rank, member, sums=sums: member.all_reduce(sums[rank]))
        for result in sums:
            assert torch.equal(result, reference_sum(parts)), size


def test_infinities_and_nans_arrive() -> None:
    inf, nan = float("inf"), float("nan")
    group = make_group(2)
    for dtype in DTYPES:
        sums = [torch.tensor([inf, inf, nan, -inf], dtype=dtype), torch.tensor([1.0, -inf, 1.0, -inf], dtype=dtype)]
        on_all(group, lambda rank, member, sums=sums: member.all_reduce(sums[rank]))
        for result in sums:
            torch.testing.assert_close(result, torch.tensor([inf, nan, nan, -inf], dtype=dtype), equal_nan=True)


def test_all_reduce_of_what_is_not_contiguous() -> None:
    group = make_group(2)
    wholes = [torch.arange(12.0).reshape(3, 4), torch.ones(3, 4)]
    expected = wholes[0].t()[1:3] + 1.0
    on_all(group, lambda rank, member: member.all_reduce(wholes[rank].t()[1:3]))
    for whole in wholes:
        assert torch.equal(whole.t()[1:3], expected)
    assert torch.equal(wholes[1][:, 3], torch.ones(3))


def test_what_no_kernel_sums_goes_the_other_way() -> None:
    group = make_group(2)
    on_all(group, lambda rank, member: member.all_reduce(torch.ones(3, dtype=torch.float64)))
    assert [member._otherwise.num_calls for member in group] == [1, 1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize(
    "shape", [(1,), (1, 3), (5, 1), (3, 7, 11), (2, 0), (0, 4), (40, 5003), (2, PIECE + 1), (3, PIECE // 2)], ids=str
)
def test_all_gather_is_torch_cat(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    group = make_group(3)
    parts = [torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(3)]
    gathered = on_all(group, lambda rank, member: member.all_gather_last_dim(parts[rank]))
    for result in gathered:
        assert torch.equal(result, torch.cat(parts, dim=-1))


@pytest.mark.parametrize("spin_us", [0.0, 50.0], ids=["sleeping", "spinning"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_nobody_reads_what_is_old_or_not_yet_written(num_ranks: int, spin_us: float) -> None:
    """Calls of all kinds and sizes back to back, with ranks that dawdle at random; each value belongs to one call."""
    group = make_group(num_ranks, spin_us=spin_us)
    common = torch.Generator().manual_seed(5)
    kinds = torch.randint(0, 3, (1500,), generator=common).tolist()
    sizes = [int(10 ** (5.0 * u)) for u in torch.rand(1500, generator=common).tolist()]

    def talk(rank: int, member: HostCollectives) -> list[int]:
        own = torch.Generator().manual_seed(rank)
        wrong = []
        for index, (kind, size) in enumerate(zip(kinds, sizes, strict=True)):
            if torch.rand(1, generator=own) < 0.1:
                time.sleep(float(torch.rand(1, generator=own)) * 3e-4)
            value = index % 101 * num_ranks + rank
            if kind:
                x = torch.full((size if kind == 1 else size % 700 + 1,), float(value))
                member.all_reduce(x)
                expected: Any = sum(index % 101 * num_ranks + other for other in range(num_ranks))
            else:
                x = member.all_gather_last_dim(torch.full((size % 40 + 1, size % 700 + 1), value))
                expected = torch.arange(num_ranks).repeat_interleave(size % 700 + 1) + index % 101 * num_ranks
            if not bool((x == expected).all()):
                wrong.append(index)
        return wrong

    assert on_all(group, talk) == [[]] * num_ranks


def test_the_lower_half_of_the_counter_may_wrap() -> None:
    """A futex compares 32 bits, and a busy group counts so far in days."""
    group = make_group(3, spin_us=0.0)
    rounds_before = 2**32 // 3 - 5
    ctypes.c_uint64.from_address(group[0]._barrier).value = 3 * rounds_before
    for member in group:
        member._turn = rounds_before
    sums = [torch.zeros(4) for _ in group]
    for number in range(20):
        for total in sums:
            total.fill_(number)
        on_all(group, lambda rank, member: member.all_reduce(sums[rank]))
        assert all(torch.equal(total, torch.full((4,), 3.0 * number)) for total in sums)


def test_a_rank_that_does_not_come_is_named() -> None:
    group = make_group(3, timeout_s=0.1)

    def call(rank: int, member: HostCollectives) -> str:
        if rank == 1:
            return ""
        with pytest.raises(MeshError) as caught:
            member.all_reduce(torch.ones(4))
        return str(caught.value)

    said = on_all(group, call)
    assert "tp rank 1 did not come to a collective within 0.1 s" in said
    with pytest.raises(MeshError, match=r"tp rank [02] has left the group"):
        group[1].all_reduce(torch.ones(4))
    with pytest.raises(MeshError, match="tp rank"):
        group[0].all_gather_last_dim(torch.ones(4))


def test_destroy_frees_those_who_wait() -> None:
    group = make_group(2)
    waits = threading.Event()
    with ThreadPoolExecutor(1) as pool:

        def wait() -> None:
            waits.set()
            group[0].all_reduce(torch.ones(4))

        call = pool.submit(wait)
        assert waits.wait(PATIENCE_S)
        group[1].destroy()
        with pytest.raises(MeshError, match="tp rank 1 has left the group"):
            call.result(timeout=PATIENCE_S)
    with pytest.raises(MeshError, match="tp rank 1 has left its group"):
        group[1].all_reduce(torch.ones(4))


def test_who_leaves_after_a_call_does_not_spoil_it() -> None:
    group = make_group(2)

    def call(rank: int, member: HostCollectives) -> Tensor:
        x = torch.ones(3)
        if rank == 0:
            time.sleep(0.02)
        member.all_reduce(x)
        member.destroy()
        return x

    for result in on_all(group, call):
        assert torch.equal(result, torch.full((3,), 2.0))


@pytest.mark.parametrize("other", [torch.ones(5), torch.ones(4).bfloat16(), None], ids=["shape", "dtype", "gather"])
def test_different_calls_do_not_pair(other: Tensor | None) -> None:
    group = make_group(2)

    def call(rank: int, member: HostCollectives) -> str:
        name = "all_gather_last_dim" if rank and other is None else "all_reduce"
        with pytest.raises(MeshError) as caught:
            getattr(member, name)(torch.ones(4) if rank == 0 or other is None else other)
        return str(caught.value)

    assert all("in another collective" in said for said in on_all(group, call))


def test_the_first_call_compiles_all_that_later_ones_need() -> None:
    """A short step at start-up is enough."""
    compiled = [f for module in (all_reduce_cpu, barrier_cpu) for f in vars(module).values() if is_jitted(f)]
    for num_ranks in (2, 3):
        group = make_group(num_ranks)
        on_all(group, lambda rank, member: member.all_reduce(torch.ones(4, dtype=torch.bfloat16)))
        before = [len(function.signatures) for function in compiled]
        assert any(before)
        on_all(group, lambda rank, member: member.all_reduce(torch.ones(PIECE * 5, dtype=torch.bfloat16)))
        on_all(group, lambda rank, member: member.all_gather_last_dim(torch.ones(4)))
        assert [len(function.signatures) for function in compiled] == before
