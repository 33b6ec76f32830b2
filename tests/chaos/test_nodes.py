"""Tensor-parallel stages on two Ray nodes, one of which dies while requests run: a node that joins takes its place."""

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import DEMO_MODEL, ServerProcess, wait_until

STORE_BYTES = 80 * 2**20
PROMPTS = ("SELECT", "a", "b")


@pytest.mark.ray
def test_a_node_dies() -> None:
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES},
    )
    try:
        nodes = [cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES) for _ in range(2)]
        words = ("--ray-address", cluster.address, "-tp", "2", "-pp", "2", "--placement-strategy", "spread", "--dtype",
                 "float32", "--kv-cache-memory-bytes", "16MiB", "--port", "0", "--grpc-port", "0")  # fmt: skip
        with ServerProcess(str(DEMO_MODEL), *words).wait_ready() as server:
            assert _stages(cluster.address) == {node.node_id: 2.0 for node in nodes}
            undisturbed = _answers(server.url, lambda: None)

            def kill_a_node() -> None:
                wait_until(lambda: httpx.get(f"{server.url}/load").json()["num_running"] == 3, 30, "all run")
                _kill_tree(nodes[1].all_processes["raylet"][0].process.pid)
                cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)

            assert _answers(server.url, kill_a_node) == undisturbed
            assert "replica 0 serves again" in server.output
            assert server.interrupt() == 0
    finally:
        cluster.shutdown()


def _stages(address: str) -> dict[str, float]:
    """The CPUs of each stage, by its node."""
    import ray

    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    try:
        (group,) = ray.util.placement_group_table().values()
    finally:
        ray.shutdown()
    return {group["bundles_to_node_id"][index]: bundle["CPU"] for index, bundle in group["bundles"].items()}


def _kill_tree(pid: int) -> None:
    """A process and those it has started, as when a machine loses power."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                children.append(int(stat.parent.name))
    for each in (pid, *children):
        os.kill(each, signal.SIGKILL)


def _answers(url: str, meanwhile: Any) -> list[str]:
    answers: dict[str, str] = {}

    def ask(prompt: str) -> None:
        body = {"model": str(DEMO_MODEL), "prompt": prompt, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=200)
        answers[prompt] = answer.json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    meanwhile()
    for thread in threads:
        thread.join(240)
    return [answers[prompt] for prompt in PROMPTS]
