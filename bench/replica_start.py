"""How long a replica takes to come up beside another one that serves: idle or busy, model files cached or not.

python bench/replica_start.py MODEL [--rounds 3] [-- flags of manta serve]

One of two replicas is killed; the time is that until it serves again, and what its worker tells of reading.
"""

import argparse
import contextlib
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.server import ServerProcess, wait_until

NUM_STREAMS = 8
TIMEOUT_S = 100.0
FLAGS = ("--distributed-executor-backend", "local", "-dp", "2", "--port", "0", "--grpc-port", "0",
         "--max-num-seqs", "8", "--max-model-len", "2048", "--kv-cache-memory-bytes", "512MiB",
         "--restart-limit", "99")  # fmt: skip


def forget_pages(folder: Path) -> None:
    """Of the model's files, as far as the system does what it is asked."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def busy(url: str, model: str) -> Iterator[list[int]]:
    """Streams that the other replica runs meanwhile; counts those that ended badly."""
    ended, bad = threading.Event(), [0]

    def ask() -> None:
        body = {"model": model, "prompt": [5] * 64, "max_tokens": 128, "ignore_eos": True}
        while not ended.is_set():
            if httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S).status_code != 200:
                bad[0] += 1

    threads = [threading.Thread(target=ask) for _ in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    try:
        yield bad
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def restart(server: ServerProcess) -> tuple[float, str]:
    """Kills a worker; returns the seconds until its replica serves again, and what it told of reading the weights."""
    first = len(server.lines)
    began_s = time.monotonic()
    os.kill(max(pid for pid, command in server.processes().items() if "workers.main" in command), signal.SIGKILL)
    told = re.compile(r"replica \d serves again")
    wait_until(lambda: told.search("".join(server.lines[first:])), TIMEOUT_S, "the replica's return")
    took_s = time.monotonic() - began_s
    read = re.search(r"read (.* of weights in \S+ s)", "".join(server.lines[first:]))
    return took_s, read.group(1) if read else "?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="of manta serve, after --")
    args = parser.parse_args()
    with ServerProcess(str(args.model), *FLAGS, *args.flags).wait_ready() as server:
        restart(server)  # kernels are compiled, files are read
        for other in ("idle", "busy"):
            for cache in ("in the page cache", "on the disk"):
                rounds = []
                with busy(server.url, str(args.model)) if other == "busy" else contextlib.nullcontext([0]) as bad:
                    for _ in range(args.rounds):
                        if cache == "on the disk":
                            forget_pages(args.model)
                        rounds.append(restart(server))
                times = sorted(took_s for took_s, _ in rounds)
                print(f"the other {other}, files {cache}: {statistics.median(times):.1f} s ({times[0]:.1f} to "
                      f"{times[-1]:.1f}); read {rounds[-1][1]}; {bad[0]} requests failed", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
