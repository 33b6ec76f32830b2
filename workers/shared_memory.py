"""Memory that the ranks of one host map together, agreed on through the mesh's store.

Rank 0 makes a memfd: memory with a file descriptor but no name, so nothing is left behind however the ranks end, and
the size of /dev/shm does not matter. The others open it as /proc/<pid>/fd/<fd> of rank 0. That they share a host and
see each other's processes is not assumed but tried: the link must name a random token, and the memory must begin with
it. Each rank says in the store what came of it, and either all use the memory or none does.
"""

import ctypes
import json
import mmap
import os
import secrets
import select
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manta.kernels.barrier_cpu import unsupported_reason

TOKEN_PAGE_BYTES = mmap.PAGESIZE
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class NotSharedError(Exception):
    """The ranks have no memory in common; the message says which rank found so and why."""


class RankProcess:
    """A rank's process, which one can ask whether it has ended even when another has taken its number."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._pidfd)

    def has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))


@dataclass(frozen=True)
class SharedMemory:
    """`num_bytes` at `address`, zero to begin with, and who maps them. Unmapped when the object goes."""

    address: int
    num_bytes: int
    processes: tuple[RankProcess, ...]  # by rank, this one's too
    _mapping: mmap.mmap


def share_memory(store: Any, rank: int, num_ranks: int, num_bytes: int, own_bytes: range) -> SharedMemory:
    """Maps num_bytes together with the other ranks, all of which call this; `store` must be for this one memory.

    The rank itself allocates `own_bytes`, so that a host of several memory nodes puts them near it. Raises
    NotSharedError on every rank if there is a reason on one; RuntimeError if the store does not answer in time.
    """
    memfd, offer = _offer(num_bytes) if rank == 0 else (None, {})
    try:
        _tell(store, "process", rank, {"boot_id": _boot_id(), "pid": os.getpid()} | offer)
        processes = [_hear(store, "process", other) for other in range(num_ranks)]
        shared, problem = None, ""
        try:
            shared = _attach(processes, num_bytes, own_bytes)
        except (NotSharedError, OSError) as error:
            problem = str(error)
        _tell(store, "problem", rank, problem)
        problems = [(other, _hear(store, "problem", other)) for other in range(num_ranks)]
    finally:
        if memfd is not None:
            os.close(memfd)
    reasons = [f"rank {other}: {problem}" for other, problem in problems if problem]
    if reasons or shared is None:
        raise NotSharedError("; ".join(reasons))
    return shared


def _offer(num_bytes: int) -> tuple[int | None, dict[str, Any]]:
    """Rank 0's memory as a file descriptor, and what the others must know of it."""
    token = secrets.token_hex(16)
    try:
        if reason := unsupported_reason():
            raise NotSharedError(reason)
        memfd = os.memfd_create(f"manta-{token}")
    except (NotSharedError, OSError) as error:
        return None, {"refusal": f"no memory to share: {error}"}
    try:
        os.ftruncate(memfd, TOKEN_PAGE_BYTES + num_bytes)
        os.pwrite(memfd, token.encode(), 0)
    except OSError as error:
        os.close(memfd)
        return None, {"refusal": f"no {num_bytes} bytes to share: {error}"}
    return memfd, {"token": token, "fd": memfd}


def _attach(processes: list[dict[str, Any]], num_bytes: int, own_bytes: range) -> SharedMemory:
    """Maps what rank 0 offers and opens every rank's process. Raises NotSharedError, OSError."""
    first = processes[0]
    if "refusal" in first:
        raise NotSharedError(first["refusal"])
    if reason := unsupported_reason():
        raise NotSharedError(reason)
    for rank, process in enumerate(processes):
        if process["boot_id"] != _boot_id():
            raise NotSharedError(f"rank {rank} runs on another host")
    path = f"/proc/{first['pid']}/fd/{first['fd']}"
    try:
        link = os.readlink(path)
    except OSError as error:
        raise NotSharedError(f"another container or user than rank 0's, it seems: {error}") from error
    if first["token"] not in link:
        raise NotSharedError(f"another container than rank 0's, it seems: {path} is {link}, not the memory to share")
    fd = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(fd, TOKEN_PAGE_BYTES + own_bytes.start, len(own_bytes))
        mapping = mmap.mmap(fd, TOKEN_PAGE_BYTES + num_bytes)
    finally:
        os.close(fd)
    if mapping[: len(first["token"])] != first["token"].encode():
        raise NotSharedError(f"{path} does not begin with rank 0's token")
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + TOKEN_PAGE_BYTES
    return SharedMemory(address, num_bytes, tuple(RankProcess(process["pid"]) for process in processes), mapping)


def _boot_id() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip() if _BOOT_ID.is_file() else ""


def _tell(store: Any, what: str, rank: int, value: Any) -> None:
    store.set(f"{what}/{rank}", json.dumps(value))


def _hear(store: Any, what: str, rank: int) -> Any:
    return json.loads(store.get(f"{what}/{rank}"))
