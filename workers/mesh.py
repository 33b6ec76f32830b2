"""The ranks of one replica: tp_size ranks split every layer, pp_size stages split the layers.

Process groups are held by the mesh itself, so one process may hold several and nothing reads a global rank. NCCL
carries tensors of CUDA ranks, but for small sums; tensor-parallel CPU ranks of one host share memory; gloo carries the
rest.
"""

from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from manta.workers import symmetric
from manta.workers.collectives import Collectives, MeshError, ProcessGroupCollectives, end_group
from manta.workers.gloo import gloo_group, own_address

SPARE_PENDING_SENDS = 8


@dataclass(frozen=True, slots=True)
class Incoming:
    """A tensor that another rank sends; the receive has begun."""

    _x: Tensor
    _work: Any

    def wait(self) -> Tensor:
        """The tensor, when it is there: on the host with gloo, in the stream with NCCL."""
        self._work.wait()
        return self._x


@dataclass(eq=False)
class Mesh:
    """Where a rank stands among the ranks of its replica, and what it says to them.

    Every method is a collective or a matched send and receive: all ranks concerned call it in the same order.
    """

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    device: torch.device
    _tp: Collectives | None = None  # None if tp_size is 1
    _groups: dict[str, Any] = field(default_factory=dict)  # by name: see connect_mesh
    _store: Any = None  # must outlive the groups
    _pending_sends: deque[tuple[Any, Tensor]] = field(default_factory=deque)  # work and the tensor it still reads

    @staticmethod
    def single(device: torch.device) -> "Mesh":
        """One rank alone, without process groups."""
        return Mesh(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, device=device)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums x over the tp ranks in place and returns it."""
        if self._tp is not None:
            self._tp.all_reduce(x)
        return x

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        """[..., n] of each tp rank -> [..., tp_size * n] on all of them, in rank order."""
        return x if self._tp is None else self._tp.all_gather_last_dim(x)

    def send_hidden(self, x: Tensor) -> None:
        """Sends x [T, hidden] to the next stage; returns at once unless that one is far behind. x must not change."""
        self._send(self._groups["hidden"], x, self.pp_rank + 1)

    def recv_hidden(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """Hidden states [num_tokens, hidden_size] of the previous stage."""
        x = torch.empty(num_tokens, hidden_size, dtype=dtype, device=self.device)
        self.recv_hidden_to(x)
        return x

    def recv_hidden_to(self, x: Tensor) -> None:
        """The same into x, contiguous; what was launched before still reads what is there."""
        self._groups["hidden"].recv([x], self.pp_rank - 1, 0).wait()

    def send_tokens(self, x: Tensor) -> None:
        """Sends sampled ids int64 [n] from the last stage to the first one, as `send_hidden` does."""
        self._send(self._groups["tokens"], x, 0)

    def expect_tokens(self, n: int) -> Incoming:
        """Begins to receive sampled ids int64 [n] of the last stage and returns at once.

        With NCCL a send stays on its device until its receive has begun. One that waited for the next plan could hold
        up whatever waits for that whole device, and would be taken for a failure when plans stay away for long.
        """
        x = torch.empty(n, dtype=torch.int64, device=self.device)
        return Incoming(x, self._groups["tokens"].recv([x], self.pp_size - 1, 0))

    def recv_tokens(self, n: int) -> Tensor:
        """Sampled ids int64 [n] of the last stage."""
        return self.expect_tokens(n).wait()

    def destroy(self) -> None:
        """Ends the groups. Calls that are under way fail, other ranks' and those of another thread."""
        for group in self._groups.values():
            end_group(group)
        if self._tp is not None:
            self._tp.destroy()

    def take_over(self, other: "Mesh") -> None:
        """Goes on with the groups of another mesh, which stands at the same place among other ranks."""
        assert (self.tp_rank, self.pp_rank) == (other.tp_rank, other.pp_rank)
        self._tp, self._groups, self._store = other._tp, other._groups, other._store
        self._pending_sends = deque()

    def _send(self, group: Any, x: Tensor, to_stage: int) -> None:
        x = x.contiguous()
        self._pending_sends.append((group.send([x], to_stage, 0), x))
        # Gloo marks a send as complete only in wait(). With no more than pp_size + 1 steps in flight, a send as old as
        # the limit has been received long ago, and waiting for it costs nothing.
        limit = self.pp_size + SPARE_PENDING_SENDS
        while self._pending_sends and (len(self._pending_sends) > limit or self._pending_sends[0][0].is_completed()):
            self._pending_sends.popleft()[0].wait()


def open_store() -> tuple[TCPStore, int]:
    """Opens the rendezvous store on a free port of this host. Returns it and the port; rank 0 alone does this."""
    store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
    return store, int(store.port)


def connect_mesh(
    *,
    tp_rank: int,
    tp_size: int,
    pp_rank: int,
    pp_size: int,
    device: torch.device,
    timeout_s: float,
    store: Store | None = None,
    host: str = "",
    port: int = 0,
    shared_memory: bool = True,
    meeting: str = "",
    join_timeout_s: float | None = None,
) -> Mesh:
    """Joins the replica's ranks that come to the `meeting`; returns when all have, `join_timeout_s` later at most
    (`timeout_s` if it is not given).

    Rank 0 passes the `store` it opened, the others its `host` and `port`. `timeout_s` also bounds every later
    collective. Without `shared_memory` ranks of one host use gloo or NCCL as those of several do; all say the same.
    Raises MeshError.
    """
    if tp_size == pp_size == 1:
        return Mesh.single(device)
    timeout = timedelta(seconds=timeout_s)
    rank = pp_rank * tp_size + tp_rank
    try:
        if store is None:
            store = TCPStore(host, port, is_master=False, timeout=timeout)
        store.set_timeout(timeout)
        if meeting:
            store = PrefixStore(meeting, store)
        _await_all(
            store, rank, tp_size * pp_size, timeout if join_timeout_s is None else timedelta(seconds=join_timeout_s)
        )
        address = own_address(rank, host)
        groups = {
            # Stages of one tp rank; one group a direction, so that NCCL's sends cannot wait for each other.
            "hidden": _group(store, f"hidden/{tp_rank}", pp_rank, pp_size, device, timeout, address),
            "tokens": _group(store, f"tokens/{tp_rank}", pp_rank, pp_size, device, timeout, address),
        }
        _connect_stages(groups["hidden"], groups["tokens"], pp_rank, pp_size, device)
        tp = _tp_collectives(
            store, tp_rank, tp_size, pp_rank, pp_size, device, timeout, address, shared_memory, meeting
        )
    except (RuntimeError, OSError) as error:
        where = f"{host}:{port}" if host else "its own store"
        raise MeshError(
            f"rank {rank} (tp {tp_rank} of {tp_size}, stage {pp_rank} of {pp_size}) could not join through {where} "
            f"within {timeout_s:g} s: {error}"
        ) from error
    groups = {name: group for name, group in groups.items() if group is not None}
    return Mesh(tp_rank, tp_size, pp_rank, pp_size, device, tp, groups, store)


def _await_all(store: Store, rank: int, num_ranks: int, timeout: timedelta) -> None:
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(num_ranks)], timeout)


def _connect_stages(hidden: Any, tokens: Any, pp_rank: int, pp_size: int, device: torch.device) -> None:
    """Sends a number on every way there is: NCCL connects two ranks in their first call, with memory of its own, and
    what cannot be reached is to be known now."""
    if pp_size == 1:
        return
    number = torch.full((1,), pp_rank, dtype=torch.int64, device=device)
    works = []
    if pp_rank > 0:
        hidden.recv([torch.empty_like(number)], pp_rank - 1, 0).wait()
    if pp_rank < pp_size - 1:
        works.append(hidden.send([number], pp_rank + 1, 0))
    if pp_rank == 0:
        tokens.recv([torch.empty_like(number)], pp_size - 1, 0).wait()
    elif pp_rank == pp_size - 1:
        works.append(tokens.send([number], 0, 0))
    for work in works:
        work.wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tp_collectives(
    store: Store,
    tp_rank: int,
    tp_size: int,
    pp_rank: int,
    pp_size: int,
    device: torch.device,
    timeout: timedelta,
    address: str,
    shared_memory: bool,
    meeting: str,
) -> Collectives | None:
    group = _group(store, f"tp/{pp_rank}", tp_rank, tp_size, device, timeout, address)
    if group is None:
        return None
    collectives = ProcessGroupCollectives(group)
    if not shared_memory:
        return collectives
    if device.type == "cuda":
        from manta.workers.torch_symmetric import TorchPeerMemory

        scope = PrefixStore(f"symmetric/{pp_rank}", store)
        memory = TorchPeerMemory(f"manta/tp/{pp_rank}/{meeting}", scope, tp_rank, tp_size, group, device)
        return symmetric.connect(memory, collectives, rank=tp_rank, num_ranks=tp_size, device=device)
    from manta.workers import host_collectives  # compiles for the CPU; not needed elsewhere

    return host_collectives.connect(
        PrefixStore(f"memory/{pp_rank}", store),
        rank=tp_rank,
        num_ranks=tp_size,
        num_ranks_on_host=tp_size * pp_size,
        timeout_s=timeout.total_seconds(),
        otherwise=collectives,
    )


def _group(
    store: Store, name: str, rank: int, size: int, device: torch.device, timeout: timedelta, address: str
) -> Any:
    """A process group of its own under `name`; None if this rank would be alone in it."""
    if size == 1:
        return None
    scope = PrefixStore(name, store)
    if device.type != "cuda":
        return gloo_group(scope, rank, size, timeout, address)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(scope, rank, size, options)
