"""Sums over tensor-parallel ranks in rank order: the same on every rank, and for a token the same in every batch."""

import torch
from torch import Tensor

from manta.workers.layers import sum_in_order
from manta.workers.mesh import Mesh, connect_mesh
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
NUM_RANKS, SIZE = 3, 7


def part(rank: int) -> Tensor:
    """bfloat16 [5, SIZE]; of sizes so different that the order of additions shows."""
    generator = torch.Generator().manual_seed(rank)
    exponents = torch.randint(-3, 4, (5, SIZE), generator=generator)
    return (torch.randn(5, SIZE, generator=generator) * 10.0**exponents).bfloat16()


def sums(rank: int, port: int) -> list[Tensor]:
    mesh = connect_mesh(
        host="localhost", port=port, tp_rank=rank, tp_size=NUM_RANKS, pp_rank=0, pp_size=1, device=CPU, timeout_s=60.0
    )
    found = [sum_in_order(mesh, part(rank)), sum_in_order(mesh, part(rank)[2:3])]
    mesh.all_reduce(torch.zeros(1))  # nobody leaves while another still listens
    mesh.destroy()
    return found


def test_rank_by_rank_in_float32() -> None:
    expected = torch.zeros(5, SIZE)
    for rank in range(NUM_RANKS):
        expected = expected + part(rank).float()
    for whole, alone in run_ranks(NUM_RANKS, sums):
        assert torch.equal(whole, expected.bfloat16())
        assert torch.equal(alone, whole[2:3])


def test_one_rank_has_nothing_to_sum() -> None:
    x = part(0)
    assert sum_in_order(Mesh.single(CPU), x) is x
