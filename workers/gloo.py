"""Process groups of CPU ranks: gloo, on the address at which the other ranks reach this host."""

import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

_ANY_PORT = 9  # nothing is sent there


def own_address(rank: int, host: str) -> str:
    """Where this host is reached by those who reach `host`, the address of rank 0; "" if that one is not known.

    A host has several addresses, and its name, which gloo looks up by itself, may stand for 127.0.1.1. Raises OSError.
    """
    if rank == 0 or not host:
        return host
    family, kind, protocol, _, address = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as one:
        one.connect(address)  # looks for the way there
        return str(one.getsockname()[0])


def gloo_group(store: Store, rank: int, size: int, timeout: timedelta, address: str) -> Any:
    """A process group that listens at the address; at the one of the host's name if it is "". GLOO_SOCKET_IFNAME, where
    it is set, names the interface instead."""
    group: Any = dist.ProcessGroupGloo
    if not address or os.environ.get("GLOO_SOCKET_IFNAME"):
        return group(store, rank, size, timeout)
    options = group._Options()
    options._devices = [group.create_device(hostname=address)]
    options._timeout = timeout
    return group(store, rank, size, options)
