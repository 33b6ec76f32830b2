"""Which sums go through memory that ranks read of each other: ranks agree, whatever fails on whichever of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from manta.workers import symmetric
from manta.workers.collectives import Collectives
from manta.workers.mesh import connect_mesh
from manta.workers.symmetric import LARGE_BYTES, SMALL_BYTES, SymmetricCollectives, connect
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
NUM_RANKS = 2
BOTH = ("one_shot", "two_shot")
ALL = (*BOTH, "multimem")


@dataclass(frozen=True)
class Fault:
    """What goes wrong, on which ranks (all of them unless told), with which form and dtype (with all)."""

    what: str
    ranks: tuple[int, ...] = (0, 1)
    form: str = ""
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Case:
    """The forms there are, what goes wrong, the forms chosen for small and for larger tensors, what the log says."""

    forms: tuple[str, ...]
    fault: Fault | None
    chosen: tuple[str, str | None] | None
    reason: str = ""
    without: tuple[torch.dtype, ...] = ()  # dtypes for which none is chosen

    @property
    def choices(self) -> dict[torch.dtype, tuple[str, str | None]]:
        if self.chosen is None:
            return {}
        return {dtype: self.chosen for dtype in symmetric.DTYPES if dtype not in self.without}


CASES = {
    "all": Case(BOTH, None, BOTH),
    "multicast": Case(ALL, None, ("one_shot", "multimem")),
    "no memory on one": Case(BOTH, Fault("allocate", (1,)), None, "NCCL alone; it fails on another rank"),
    "no memory": Case(BOTH, Fault("allocate"), None, "NCCL alone; no such memory"),
    "no way between them": Case(BOTH, Fault("connect"), None, "NCCL alone; no peer access"),
    "no connection on one": Case(BOTH, Fault("connect", (0,)), None, "NCCL alone; no peer access"),
    "forms that differ": Case(ALL, Fault("absent", (1,), "multimem"), BOTH),
    "no such dtype": Case(
        BOTH, Fault("raise", dtype=torch.float16), BOTH, "float16: not implemented", without=(torch.float16,)
    ),
    "wrong sums on one": Case(
        BOTH, Fault("wrong", (1,), "one_shot"), ("two_shot", "two_shot"), "one_shot of float32: ranks get"
    ),
    "small ones only": Case(
        BOTH, Fault("wrong", form="two_shot"), ("one_shot", None), "two_shot of float32: ranks get different bits"
    ),
    "twice the sums": Case(
        BOTH, Fault("twice", form="two_shot"), ("one_shot", None), "two_shot of float32: sums are not those of NCCL"
    ),
    "wrong when large": Case(BOTH, Fault("wrong when large", form="two_shot"), ("one_shot", None), "two_shot"),
    "bits that differ": Case(BOTH, Fault("bits", (1,), "one_shot"), ("two_shot", "two_shot"), "different bits"),
    "stale buffers": Case(BOTH, Fault("stale", form="one_shot"), ("two_shot", "two_shot"), "not those of NCCL"),
}


class FakeMemory:
    """Forms that sum over gloo and note that they did, and a fault."""

    def __init__(self, group: Collectives, rank: int, names: tuple[str, ...], fault: Fault | None) -> None:
        self.group = group
        self.names = names
        self.fault = fault if fault is not None and rank in fault.ranks else None
        self.calls: list[str] = []
        self.last: Tensor | None = None

    def allocate(self, num_bytes: int) -> None:
        assert num_bytes == LARGE_BYTES
        if self._has("allocate"):
            raise RuntimeError("no such memory\nin a second line")

    def connect(self) -> None:
        if self._has("connect"):
            raise RuntimeError("no peer access")

    def forms(self) -> Mapping[str, Callable[[Tensor], None]]:
        return {name: self._form(name) for name in self.names if not self._has("absent", name)}

    def _form(self, name: str) -> Callable[[Tensor], None]:
        def run(x: Tensor) -> None:
            self.calls.append(name)
            if self._has("raise", name, x.dtype):
                raise NotImplementedError("not implemented")
            before = x.clone()
            self.group.all_reduce(x)
            large = x.nbytes == LARGE_BYTES
            if self._has("wrong", name, x.dtype) or (large and self._has("wrong when large", name, x.dtype)):
                x.copy_(before)
            if self._has("twice", name, x.dtype):
                x.mul_(2)
            if self._has("bits", name, x.dtype):
                bits = x.view(torch.uint8)
                bits[0] ^= 1
            if self._has("stale", name, x.dtype) and self.last is not None and self.last.shape == x.shape:
                x.copy_(self.last)
            self.last = x.clone()

        return run

    def _has(self, what: str, form: str = "", dtype: torch.dtype | None = None) -> bool:
        fault = self.fault
        if fault is None or fault.what != what:
            return False
        return fault.form in ("", form) and fault.dtype in (None, dtype)


def try_cases(rank: int, port: int) -> dict[str, Any]:
    """What one rank chose in each case, and which forms it took for tensors of some sizes, whose sums it checks."""
    mesh = connect_mesh(
        host="localhost", port=port, tp_rank=rank, tp_size=NUM_RANKS, pp_rank=0, pp_size=1, device=CPU, timeout_s=60.0,
        shared_memory=False,
    )  # fmt: skip
    gloo = mesh._tp
    assert gloo is not None
    results = {}
    for name, case in CASES.items():
        memory = FakeMemory(gloo, rank, case.forms, case.fault)
        reports: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(symmetric.logger, "info", lambda text, *values, to=reports: to.append(text % values))
            collectives = connect(memory, gloo, rank=rank, num_ranks=NUM_RANKS, device=CPU)
        chosen = collectives._choices if isinstance(collectives, SymmetricCollectives) else {}
        choices = {dtype: (choice.small[0], choice.large and choice.large[0]) for dtype, choice in chosen.items()}
        memory.calls.clear()
        for num_bytes in (16, SMALL_BYTES, SMALL_BYTES + 16, LARGE_BYTES, LARGE_BYTES + 16, 12, 0):
            x = torch.full((num_bytes // 4,), rank + 1.0)
            collectives.all_reduce(x)
            assert bool((x == 3.0).all())
        every_other = torch.full((8, 8), rank + 1.0)[:, ::2]
        collectives.all_reduce(every_other)
        assert bool((every_other == 3.0).all())
        assert collectives.all_gather_last_dim(torch.tensor([[rank]])).tolist() == [[0, 1]]
        results[name] = (choices, memory.calls, reports)
    mesh.all_reduce(torch.zeros(1))
    mesh.destroy()
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(NUM_RANKS, try_cases)


@pytest.mark.parametrize("name", CASES)
def test_ranks_choose_the_same(name: str, results: list[dict[str, Any]]) -> None:
    expected = CASES[name].choices
    for rank in range(NUM_RANKS):
        choices, calls, reports = results[rank][name]
        assert choices == expected
        small, large = expected.get(torch.float32, (None, None))
        assert calls == [form for form in (small, small, large, large) if form is not None]
        assert len(reports) == (rank == 0)
    report = results[0][name][2][0]
    assert report.startswith("2 tensor-parallel ranks sum through ")
    assert CASES[name].reason in report
    assert ("symmetric memory" in report) == bool(expected)


def test_a_process_that_has_no_such_memory_says_so() -> None:
    from manta.workers.torch_symmetric import TorchPeerMemory

    memory = TorchPeerMemory("manta/test", None, 0, 2, None, CPU)
    with pytest.raises(RuntimeError, match="does not support device type cpu"):
        memory.allocate(LARGE_BYTES)
