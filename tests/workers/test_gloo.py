"""Gloo at an address that is told, not looked up."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

from manta.workers.gloo import gloo_group, own_address

TIMEOUT = timedelta(seconds=20)


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_ranks_meet(address: str) -> None:
    store = HashStore()

    def total(rank: int) -> float:
        group = gloo_group(store, rank, 2, TIMEOUT, address)
        x = torch.full((3,), float(rank + 1))
        group.allreduce([x]).wait()
        return float(x.sum())

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(total, range(2))) == [9.0, 9.0]


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(RuntimeError):
        gloo_group(HashStore(), 0, 2, TIMEOUT, "198.51.100.1")


def test_own_address() -> None:
    assert own_address(0, "198.51.100.1") == "198.51.100.1", "it is rank 0's own"
    assert own_address(1, "127.0.0.1") == "127.0.0.1"
    assert own_address(1, "localhost") in ("127.0.0.1", "::1")
    assert own_address(1, "") == ""
