"""How long streams pause when processes of a server are killed or stopped: the longest time between two tokens.

python bench/recovery.py [--rounds 3] [--rest-s 0] [-- flags of manta serve]
"""

import argparse
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.server import DEMO_MODEL, ServerProcess, wait_until

QUICK = ("--kv-cache-memory-bytes", "64MiB", "--port", "0", "--grpc-port", "0", "--restart-limit", "99")
STRIKES = [
    ("worker killed", "workers.main", signal.SIGKILL),
    ("worker stopped", "workers.main", signal.SIGSTOP),
    ("scheduler killed", "engine.main", signal.SIGKILL),
    ("scheduler stopped", "engine.main", signal.SIGSTOP),
]
NUM_STREAMS = 4


def pauses(server: ServerProcess, module: str, number: signal.Signals) -> list[float]:
    """The longest pause of each stream, in seconds. Raises AssertionError for a stream that does not end well."""
    times: list[list[float]] = [[] for _ in range(NUM_STREAMS)]

    def read(index: int) -> None:
        body = {"model": str(DEMO_MODEL), "prompt": "a" * (index + 1), "max_tokens": 1500, "ignore_eos": True}
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=100) as response:
            for line in response.iter_lines():
                if line:
                    times[index].append(time.monotonic())
                    last = line
        assert last == "data: [DONE]", last

    threads = [threading.Thread(target=read, args=(index,)) for index in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    wait_until(lambda: min(map(len, times)) > 20, 30, "tokens of every stream")
    os.kill(busiest(pid for pid, command in server.processes().items() if module in command), number)
    for thread in threads:
        thread.join()
    return [max(after - before for before, after in pairwise(each)) for each in times]


def busiest(pids: Iterable[int]) -> int:
    """The process that has used most processor time: not one that stands by."""

    def used(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    return max(pids, key=used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rest-s", type=float, default=0.0, help="after each strike: --standby-workers need 10")
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    words = (str(DEMO_MODEL), "--distributed-executor-backend", "local", *QUICK, *args.flags)
    print("| what | streams | longest pause, s: median | worst |\n| --- | --- | --- | --- |")
    with ServerProcess(*words).wait_ready() as server:
        for what, module, number in STRIKES:
            found = []
            for _ in range(args.rounds):
                found += pauses(server, module, number)
                time.sleep(args.rest_s)
            print(f"| {what} | {len(found)} | {statistics.median(found):.2f} | {max(found):.2f} |", flush=True)


if __name__ == "__main__":
    main()
