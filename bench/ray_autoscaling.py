"""A Ray cluster on this machine whose autoscaler adds and removes nodes: Ray's fake provider, beside other clusters.

`ray.cluster_utils.AutoscalingCluster` does the same but ends every other Ray of the machine, and needs a file that
Ray's wheel does not have.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.server import ROOT, processes_with_tag

_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_ID = "f" * 51 + "00000"  # what the fake provider takes for the head
STORE_BYTES = 80 * 2**20
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 15.0


@contextlib.contextmanager
def autoscaling_cluster(max_nodes: int, node_cpus: int = 1, idle_minutes: float = 0.1) -> Iterator[str]:
    """Yields host:port of a head without CPUs, which nodes of `node_cpus` join as placement groups wait for them.
    Sets the environment in which this process, where it has not imported ray yet, and its children can join."""
    tag, folder = uuid.uuid4().hex, tempfile.mkdtemp(prefix="ray-")  # sockets lie in it: a short name
    host, ports = _own_address(), _free_ports(4)
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"] = "token", f"{folder}/token"
    Path(folder, "token").touch(0o600)
    Path(folder, "token").write_text(secrets.token_hex(32))
    Path(folder, "autoscaling.json").write_text(
        json.dumps(_autoscaling(f"{host}:{ports[0]}", max_nodes, node_cpus, idle_minutes))
    )
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "MANTA_TEST_TAG": tag,
        "RAY_TMPDIR": folder,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    words = ["--head", "--block", "--num-cpus", "0", "--object-store-memory", str(STORE_BYTES), "--port", ports[0],
             "--dashboard-port", ports[1], "--dashboard-agent-listen-port", ports[2], "--include-dashboard", "false",
             "--ray-client-server-port", ports[3], "--autoscaling-config", f"{folder}/autoscaling.json",
             "--node-ip-address", host]  # fmt: skip
    with Path(folder, "head.log").open("w") as log:
        head = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", *words],
            stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_for_start(Path(folder, "head.log"), head)
        yield f"{host}:{ports[0]}"
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(_END_TIMEOUT_S)
        end_all(tag)  # nodes that the provider has started are children of nobody who would end them
        shutil.rmtree(folder, ignore_errors=True)


def _autoscaling(gcs_address: str, max_nodes: int, node_cpus: int, idle_minutes: float) -> dict[str, Any]:
    worker = {"CPU": node_cpus, "object_store_memory": STORE_BYTES}
    return {
        "cluster_name": "fake",
        "max_workers": max_nodes,
        "idle_timeout_minutes": idle_minutes,
        "upscaling_speed": 20.0,
        # By its module: under its own name Ray looks for defaults that its wheel does not have.
        "provider": {"type": "external", "module": _PROVIDER, "gcs_address": gcs_address, "head_node_id": HEAD_ID,
                     "launch_multiple": True, "disable_node_updaters": True},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "node": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": max_nodes},
        },
        "head_node_type": "ray.head.default",
        "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
        "head_start_ray_commands": [], "worker_start_ray_commands": [], "head_node": {}, "worker_nodes": {},
    }  # fmt: skip


def end_all(tag: str) -> None:
    """Ends the processes that were started with it in their environment."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in processes_with_tag(tag):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline_s = time.monotonic() + _END_TIMEOUT_S
        while processes_with_tag(tag) and time.monotonic() < deadline_s:
            time.sleep(0.1)


def _own_address() -> str:
    """Of the interface that leads outside, as Ray finds it; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("8.8.8.8", 80))
        except OSError:
            return "127.0.0.1"
        return str(one.getsockname()[0])


def _free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


def _wait_for_start(log: Path, head: "subprocess.Popen[bytes]") -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text():
        if head.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"Ray's head did not come up: {log.read_text()[-500:]}")
        time.sleep(0.1)
