"""Tensors reach their parameters through buffers that are used again only when they have been read."""

import pytest
import torch
from torch import Tensor

from manta.workers.staging import NUM_BUFFERS, Stager

CPU = torch.device("cpu")


class SlowDevice:
    """Buffers whose copies are under way until somebody waits; then they may be written again."""

    def __init__(self) -> None:
        self.num_buffers = 0
        self.under_way: list[Mark] = []
        self.most_under_way = 0

    def pin(self, num_bytes: int) -> Tensor:
        self.num_buffers += 1
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def mark(self) -> "Mark":
        self.under_way.append(Mark(self))
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        return self.under_way[-1]


class Mark:
    def __init__(self, device: SlowDevice) -> None:
        self.device = device

    def synchronize(self) -> None:
        if self in self.device.under_way:
            del self.device.under_way[: self.device.under_way.index(self) + 1]


@pytest.mark.parametrize("shape", [(7,), (1, 1), (13, 5), (64, 3, 2), (3, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_values_arrive_in_pieces_and_are_cast(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    device = SlowDevice()
    stager = Stager(CPU, buffer_bytes=100, pin=device.pin, mark=device.mark)
    source = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    whole = torch.zeros(shape[0] + 2, *shape[1:]).to(dtype)
    for tensor in (source[0], source[1]):
        stager.place(whole[1:-1], tensor)
    stager.finish()
    assert torch.equal(whole[1:-1].float(), source[1].to(dtype).float())
    assert not whole[0].float().any()
    assert not whole[-1].float().any()
    assert device.num_buffers == NUM_BUFFERS
    assert not device.under_way
    assert device.most_under_way <= NUM_BUFFERS


def test_columns_of_a_tensor_arrive_too() -> None:
    device = SlowDevice()
    stager = Stager(CPU, buffer_bytes=64, pin=device.pin, mark=device.mark)
    source, target = torch.arange(120.0).view(10, 12), torch.zeros(10, 4)
    stager.place(target, source[:, 4:8])
    assert device.most_under_way == NUM_BUFFERS
    stager.finish()
    assert torch.equal(target, source[:, 4:8])


def test_a_cpu_takes_tensors_as_they_are() -> None:
    target = torch.zeros(3, 2)
    stager = Stager(CPU)
    stager.place(target, torch.ones(3, 2, dtype=torch.float16))
    stager.finish()
    assert torch.equal(target, torch.ones(3, 2))
