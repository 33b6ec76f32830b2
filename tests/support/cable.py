"""A scheduler with one worker beside it and one in a network namespace of its own, at the other end of a cable."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from manta.configs.schema import ServeConfig
from tests.support.server import DEMO_MODEL

_NET = f"10.213.{os.getpid() // 64 % 256}.{{}}"
HERE, THERE = (_NET.format(os.getpid() % 64 * 4 + host) for host in (1, 2))
CONFIG = ServeConfig.model_validate(
    {"model": str(DEMO_MODEL), "dtype": "float32", "data_parallel_size": 2, "kv_cache_memory_bytes": 64 * 2**20,
     "max_num_seqs": 4}
)  # fmt: skip


class NoNamespaceError(Exception):
    """Network namespaces cannot be made here; the message says why."""


@dataclass
class Cable:
    """Between this network namespace and another one."""

    namespace: str

    def run(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return done.stdout

    def cut(self) -> None:
        self.run("ip", "-n", self.namespace, "link", "set", "dev", f"{self.namespace}b", "down")

    def mend(self) -> None:
        self.run("ip", "-n", self.namespace, "link", "set", "dev", f"{self.namespace}b", "up")

    def drop_connections(self) -> str:
        """What the kernel has ended; empty where it is built without that."""
        return self.run("ss", "--no-header", "-K", "-t", "dst", THERE)


@contextmanager
def laid_cable() -> Iterator[Cable]:
    """Raises NoNamespaceError."""
    if shutil.which("ip") is None or shutil.which("ss") is None:
        raise NoNamespaceError("the commands ip and ss are missing")
    cable = Cable(f"mt{os.getpid() % 10**7}")
    name = cable.namespace
    try:
        cable.run("ip", "netns", "add", name)
    except subprocess.CalledProcessError as error:
        raise NoNamespaceError(f"no network namespace can be made: {error.stderr.strip()}") from None
    try:
        cable.run("ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        cable.run("ip", "addr", "add", f"{HERE}/30", "dev", f"{name}a")
        cable.run("ip", "link", "set", "dev", f"{name}a", "up")
        cable.run("ip", "-n", name, "addr", "add", f"{THERE}/30", "dev", f"{name}b")
        cable.run("ip", "-n", name, "link", "set", "dev", "lo", "up")
        cable.mend()
        yield cable
    finally:
        subprocess.run(("ip", "link", "del", f"{name}a"), check=False)  # at once; that of the namespace takes a while
        cable.run("ip", "netns", "del", name)


@contextmanager
def _process(*words: str) -> Iterator[str]:
    """The address that it says it serves at."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert child.stdout is not None
        first = next((line for line in child.stdout if line.startswith("MANTA_")), "")
        assert first.startswith("MANTA_ADDRESS"), f"{words[2]} did not come up: {first}"
        yield first.split()[1]
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()


@contextmanager
def deployment(cable: Cable) -> Iterator[str]:
    """The address of a scheduler with a worker here and one there."""
    worker = (sys.executable, "-m", "manta.workers.main")
    with ExitStack() as stack:
        there = stack.enter_context(_process("ip", "netns", "exec", cable.namespace, *worker, "--host", THERE))
        here = stack.enter_context(_process(*worker, "--host", HERE))
        scheduler = sys.executable, "-m", "manta.cluster.engine.main", "--config-json", CONFIG.model_dump_json()
        address = stack.enter_context(_process(*scheduler, "--workers", f"{there};{here}"))
        yield address
