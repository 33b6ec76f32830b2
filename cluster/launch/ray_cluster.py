"""The Ray cluster that a deployment lives on: joined, or started here."""

import contextlib
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

import ray

from manta.cluster.launch.launcher import LaunchError, ray_address
from manta.configs.schema import ServeConfig

_CONNECT_TIMEOUT_S = 5.0
_OBJECT_STORE_BYTES = 128 * 2**20  # nothing but actor arguments passes through it


def connect(config: ServeConfig) -> None:
    """Joins the cluster at --ray-address or RAY_ADDRESS, or starts one here. Raises LaunchError."""
    address = ray_address(config)
    if address:
        _check_reachable(address)
        _warn_of_open_token()
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        what = f"no Ray cluster at {address!r} can be joined" if address else "a local Ray cannot be started"
        raise LaunchError(f"{what}: {first_line(error)}") from None


def _warn_of_open_token() -> None:
    """Who has Ray's token can run code on every node, and Ray itself writes it for everybody to read."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o077:
            print(f"manta: warning: others can read Ray's token: chmod 600 {path}", file=sys.stderr, flush=True)


def _check_reachable(address: str) -> None:
    """Raises LaunchError at once where ray.init would wait for minutes. "auto" is for Ray itself to resolve."""
    if "://" in address:
        raise LaunchError(f"Ray address {address!r} is a URL; give host:port of the head node, such as 127.0.0.1:6379")
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise LaunchError(f"no Ray cluster at {address!r} can be joined: {error.strerror or error}") from None


def has_gpus() -> bool:
    """Whether the cluster has GPUs at all."""
    return bool(ray.cluster_resources().get("GPU", 0))


def first_line(error: BaseException) -> str:
    """Ray's errors go on with what led to them."""
    return str(error).strip().split("\n")[0] or type(error).__name__
