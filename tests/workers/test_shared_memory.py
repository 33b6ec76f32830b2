"""Processes of one host share memory where they can, say why where they cannot, and notice when one is killed."""

import contextlib
import errno
import gc
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from manta.workers import shared_memory
from manta.workers.collectives import MeshError
from manta.workers.host_collectives import HostCollectives
from manta.workers.mesh import Mesh, connect_mesh
from tests.support.ranks import run_ranks

TIMEOUT_S = 150.0


def connect(rank: int, num_ranks: int, store: Any) -> Mesh:
    return connect_mesh(
        store=store,
        tp_rank=rank,
        tp_size=num_ranks,
        pp_rank=0,
        pp_size=1,
        device=torch.device("cpu"),
        timeout_s=TIMEOUT_S,
    )


def num_maps() -> int:
    """Mappings of shared memory in this process."""
    return sum("memfd:manta-" in line for line in Path("/proc/self/maps").read_text().splitlines())


def num_fds() -> int:
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            links.append(os.readlink(fd))
    return sum("memfd:manta-" in link or "pidfd" in link for link in links)


def talk(rank: int, port: int, num_ranks: int) -> dict[str, Any]:
    """Two meshes one after the other, and what is left of them."""
    store = TCPStore("localhost", port, is_master=False)
    heard: dict[str, Any] = {"sums": [], "is_shared": []}
    for number in range(2):
        mesh = connect(rank, num_ranks, PrefixStore(str(number), store))
        heard["is_shared"].append(isinstance(mesh._tp, HostCollectives))
        heard["maps"] = num_maps()
        generator = torch.Generator().manual_seed(rank)
        for _ in range(50):
            heard["sums"].append(mesh.all_reduce(torch.randn(3001, generator=generator)))
        heard["gathered"] = mesh.all_gather_last_dim(torch.tensor([[rank, number]])).tolist()
        store.set(f"done/{number}/{rank}", "")
        store.wait([f"done/{number}/{other}" for other in range(num_ranks)])
        mesh.destroy()
        del mesh
    gc.collect()
    heard["left"] = (num_maps(), num_fds(), [name for name in os.listdir("/dev/shm") if "manta" in name])
    return heard


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_processes_share_memory_and_leave_nothing(num_ranks: int) -> None:
    heard = run_ranks(num_ranks, talk, num_ranks)
    generators = [torch.Generator().manual_seed(rank) for rank in range(num_ranks)]
    expected = [sum(torch.randn(3001, generator=generator) for generator in generators) for _ in range(50)]
    for said in heard:
        assert said["is_shared"] == [True, True]
        assert said["maps"] == 1
        assert said["gathered"] == [[value for rank in range(num_ranks) for value in (rank, 1)]]
        assert said["left"] == (0, 0, [])
        for total, wanted in zip(said["sums"], expected * 2, strict=True):
            assert torch.equal(total, wanted)


def lose_a_rank(rank: int, port: int, num_ranks: int) -> tuple[str, str]:
    """The last rank kills itself after some calls; what the others are told, then and at the next call."""
    store = TCPStore("localhost", port, is_master=False)
    mesh = connect(rank, num_ranks, store)
    x = torch.ones(100)
    for _ in range(20):
        mesh.all_reduce(x)
    if rank == num_ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    said = []
    for _ in range(2):
        with pytest.raises(MeshError) as caught:
            mesh.all_reduce(x)
        said.append(str(caught.value))
    store.set(f"done/{rank}", "")
    store.wait([f"done/{other}" for other in range(num_ranks - 1)])  # that another ends is not what this is about
    return said[0], said[1]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_killed_rank_is_named(num_ranks: int) -> None:
    dead = num_ranks - 1
    for rank, said in enumerate(run_ranks(num_ranks, lose_a_rank, num_ranks, silent=[dead])):
        if rank != dead:
            assert said[0] == said[1]
            assert said[0].startswith(f"tp rank {dead} (process ")
            assert said[0].endswith(") has ended")


def fail_with(number: int) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


# id: rank, what is replaced there, by what, what rank 0 logs
OBSTACLES: dict[str, tuple[int, str, Any, str]] = {
    "no-memfd": (0, "os.memfd_create", fail_with(errno.ENOSPC), "rank 0: no memory to share: .*No space left"),
    "no-room": (0, "os.ftruncate", fail_with(errno.ENOSPC), r"rank 1: no \d+ bytes to share: .*No space left"),
    "no-pages": (1, "os.posix_fallocate", fail_with(errno.ENOSPC), "rank 1: .*No space left"),
    "other-host": (
        1,
        "_BOOT_ID",
        Path(__file__),
        "rank 0: rank 1 runs on another host; rank 1: rank 0 runs",
    ),
    "other-process": (1, "os.readlink", lambda path: "/dev/null", "rank 1: another container .* not the memory"),
    "hidden-process": (1, "os.readlink", fail_with(errno.EACCES), "rank 1: another container or user .*denied"),
    "no-pidfd": (1, "os.pidfd_open", fail_with(errno.ENOSYS), "rank 1: .*not implemented"),
    "other-system": (0, "unsupported_reason", lambda: "this is MINIX", "rank 0: no memory to share: this is MINIX"),
}


@contextlib.contextmanager
def replaced(name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if name.startswith("os."):
            patch.setattr(os, name.removeprefix("os."), value)
        else:
            patch.setattr(shared_memory, name, value)
        yield


def meet_obstacles(rank: int, port: int) -> dict[str, tuple[bool, float, list[str], int]]:
    """Per obstacle whether memory is shared all the same, a sum, the log, and what stays mapped or open."""
    store = TCPStore("localhost", port, is_master=False)
    results, meshes = {}, []
    for case, (where, name, value, _) in OBSTACLES.items():
        with replaced(name, value) if rank == where else contextlib.nullcontext(), logged() as lines:
            mesh = connect(rank, 2, PrefixStore(case, store))
        meshes.append(mesh)
        total = float(mesh.all_reduce(torch.ones(1)))
        gc.collect()
        results[case] = (isinstance(mesh._tp, HostCollectives), total, list(lines), num_maps() + num_fds())
    store.set(f"done/{rank}", "")
    store.wait(["done/0", "done/1"])
    return results


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("manta.workers.host_collectives")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@pytest.fixture(scope="module")
def met() -> list[dict[str, tuple[bool, float, list[str], int]]]:
    return run_ranks(2, meet_obstacles)


@pytest.mark.parametrize("case", OBSTACLES)
def test_who_cannot_share_uses_gloo_and_says_why(
    case: str, met: list[dict[str, tuple[bool, float, list[str], int]]]
) -> None:
    for rank, results in enumerate(met):
        is_shared, total, lines, num_left = results[case]
        assert not is_shared
        assert total == 2.0
        assert num_left == 0
        assert len(lines) == (rank == 0)
    line = met[0][case][2][0]
    assert line.startswith("WARNING 2 tensor-parallel ranks talk through gloo, which is slower: ")
    assert re.search(OBSTACLES[case][3], line), line


def ask_for_gloo(rank: int, port: int) -> tuple[bool, float]:
    store = TCPStore("localhost", port, is_master=False)
    mesh = connect_mesh(
        store=store, tp_rank=rank, tp_size=2, pp_rank=0, pp_size=1, device=torch.device("cpu"), timeout_s=TIMEOUT_S,
        shared_memory=False,
    )  # fmt: skip
    total = float(mesh.all_reduce(torch.ones(1)))
    store.set(f"done/{rank}", "")
    store.wait(["done/0", "done/1"])
    return isinstance(mesh._tp, HostCollectives), total


def test_gloo_when_asked_for() -> None:
    assert run_ranks(2, ask_for_gloo) == [(False, 2.0)] * 2
