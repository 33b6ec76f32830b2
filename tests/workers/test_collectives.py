"""Process groups as tensor-parallel ranks use them: one whose calls are over when they return, as NCCL's."""

from typing import Any

import pytest
import torch
from torch import Tensor

from manta.workers.collectives import ProcessGroupCollectives


class Work:
    def __init__(self) -> None:
        self.was_waited_for = False

    def wait(self) -> None:
        self.was_waited_for = True


class Group:
    """The first of three ranks; each of the others has the same values and ten times as much."""

    def __init__(self, gives_work: bool) -> None:
        self.works: list[Work] = []
        self.gives_work = gives_work
        self.num_aborted = 0

    def name(self) -> str:
        return "nccl"

    def abort(self) -> None:
        self.num_aborted += 1

    def size(self) -> int:
        return 3

    def allreduce(self, tensors: list[Tensor], options: Any) -> Work | None:
        assert not options.asyncOp
        assert tensors[0].is_contiguous()
        tensors[0].mul_(21)
        return self._work()

    def _allgather_base(self, out: Tensor, x: Tensor, options: Any) -> Work | None:
        assert not options.asyncOp
        out.copy_(torch.cat([x, x * 10, x * 10]))
        return self._work()

    def _work(self) -> Work | None:
        if self.gives_work:
            self.works.append(Work())
            return self.works[-1]
        return None


@pytest.mark.parametrize("gives_work", [True, False])
def test_sums_and_gathered_rows(gives_work: bool) -> None:
    group = Group(gives_work)
    collectives = ProcessGroupCollectives(group)
    x = torch.arange(6.0).view(2, 3)
    collectives.all_reduce(x)
    assert torch.equal(x, torch.arange(6.0).view(2, 3) * 21)
    columns = torch.arange(12.0).view(3, 4)[:, 1:3]
    collectives.all_reduce(columns)
    assert torch.equal(columns, torch.arange(12.0).view(3, 4)[:, 1:3] * 21)
    for shape in ((4,), (2, 3), (2, 1, 5)):
        part = torch.randn(shape)
        gathered = collectives.all_gather_last_dim(part)
        assert torch.equal(gathered, torch.cat([part, part * 10, part * 10], dim=-1))
    assert all(work.was_waited_for for work in group.works)
    assert len(group.works) == (5 if gives_work else 0)


def test_a_group_is_left_once() -> None:
    """A rank that could not join the others of a new meeting is asked to a third one, with the group it had first."""
    group = Group(gives_work=False)
    collectives = ProcessGroupCollectives(group)
    collectives.destroy()
    collectives.destroy()
    assert group.num_aborted == 1
