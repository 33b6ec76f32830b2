"""How soon the end of something is noticed, and how long streams pause for it.

python bench/recovery.py [--rounds 3] [--rest-s 0] [--only worker,scheduler,frontend,cable] [-- flags of serve]

"noticed": from the strike until the scheduler ends the epoch (a worker, a cable), until a frontend has lost
the scheduler or it is started again, whichever is first, or until the frontend is started again. "pause": the longest
time between two tokens of a stream; of one through a frontend that is killed, until it is asked again and has a token.
Rows of a cable have a worker in a network namespace of its own and another one beside the scheduler.
"""

import argparse
import asyncio
import contextlib
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from manta.cluster.engine.client import EngineClient
from tests.support.cable import Cable, NoNamespaceError, deployment, laid_cable
from tests.support.fake_deployment import request
from tests.support.server import DEMO_MODEL, ServerProcess, wait_until

QUICK = ("--kv-cache-memory-bytes", "64MiB", "--port", "0", "--grpc-port", "0", "--restart-limit", "99")
WORKER, SCHEDULER, FRONTEND = "workers.main", "engine.main", "doors.main"
NOTICED = {
    WORKER: r"epoch ended",
    SCHEDULER: r"lost the engine|the scheduler is started again",
    FRONTEND: r"frontend \d+ is started again",
}
STRIKES = [
    ("worker killed", WORKER, signal.SIGKILL),
    ("worker stopped", WORKER, signal.SIGSTOP),
    ("scheduler killed", SCHEDULER, signal.SIGKILL),
    ("scheduler stopped", SCHEDULER, signal.SIGSTOP),
    ("frontend killed", FRONTEND, signal.SIGKILL),
]
NUM_STREAMS = 4
NUM_TOKENS = 1500
Found = tuple[list[float], list[float]]  # seconds until it was noticed, and those of the pauses


class Streams:
    """Begins them; `pauses` waits for their end. A stream that breaks is asked again."""

    def __init__(self, url: str, num_tokens: int = NUM_TOKENS) -> None:
        self._url = url
        self._num_tokens = num_tokens
        self.times_s: list[list[float]] = [[] for _ in range(NUM_STREAMS)]
        self._threads = [threading.Thread(target=self._read, args=(index,)) for index in range(NUM_STREAMS)]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: min(map(len, self.times_s)) > 20, 60, "tokens of every stream")

    def pauses(self) -> list[float]:
        for thread in self._threads:
            thread.join()
        return [max(after - before for before, after in pairwise(each)) for each in self.times_s]

    def _read(self, index: int) -> None:
        body = {"model": str(DEMO_MODEL), "prompt": "a" * (index + 1), "max_tokens": self._num_tokens}
        body |= {"ignore_eos": True, "stream": True}
        while True:
            last = ""
            with contextlib.suppress(httpx.TransportError):
                with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=100) as response:
                    for line in response.iter_lines():
                        if line:
                            self.times_s[index].append(time.monotonic())
                            last = line
                assert last == "data: [DONE]", last
                return
            time.sleep(0.02)


def strike_process(server: ServerProcess, module: str, number: signal.Signals) -> Found:
    streams, known = Streams(server.url), len(server.lines)
    struck_s = time.monotonic()
    os.kill(busiest(pid for pid, command in server.processes().items() if module in command), number)
    wait_until(lambda: any(re.search(NOTICED[module], line) for line in server.lines[known:]), 30, "it is noticed")
    noticed_s = time.monotonic() - struck_s
    return [noticed_s], streams.pauses()


def busiest(pids: Iterable[int]) -> int:
    """The process that has used most processor time: not one that stands by."""

    def used(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    return max(pids, key=used)


def num_ended_epochs(metrics: str) -> float:
    return sum(float(value) for value in re.findall(r"^manta:failovers_total{[^}]*} (\S+)$", metrics, re.MULTILINE))


async def strike_cable(address: str, strike: Callable[[], object]) -> Found:
    client = await EngineClient.connect(address)
    times_s: list[list[float]] = [[] for _ in range(8)]

    async def read(index: int) -> None:
        async for _ in client.generate(request([5 + index, 9], 1000, seed=index, ignore_eos=True)):
            times_s[index].append(time.monotonic())

    reading = [asyncio.create_task(read(index)) for index in range(len(times_s))]
    while min(map(len, times_s)) < 20 or (await client.load()).replicas[0].num_running < 2:
        await asyncio.sleep(0.005)
    num_before = num_ended_epochs((await client.metrics()).decode())
    struck_s = time.monotonic()
    await asyncio.to_thread(strike)
    while num_ended_epochs((await client.metrics()).decode()) == num_before:
        await asyncio.sleep(0.005)
    noticed_s = time.monotonic() - struck_s
    await asyncio.gather(*reading)
    await client.close()
    pauses = [max(after - before for before, after in pairwise(each)) for each in times_s]
    return [noticed_s], sorted(pauses)[-4:]  # the others ran on the other worker


def cable_rows(num_rounds: int) -> None:
    strikes: list[tuple[str, Callable[[Cable], Callable[[], object]]]] = [
        ("connections of a worker dropped", lambda cable: cable.drop_connections),
        ("cable to a worker cut", lambda cable: cable.cut),
    ]
    for what, strike in strikes:
        found: list[Found] = []
        for _ in range(num_rounds):
            try:
                with laid_cable() as cable, deployment(cable) as address:
                    found.append(asyncio.run(strike_cable(address, strike(cable))))
            except NoNamespaceError as error:
                print(f"| {what} | {error} | | | |")
                return
        tell(what, found)


def tell(what: str, found: list[Found]) -> None:
    noticed, pauses = ([value for each in found for value in each[part]] for part in (0, 1))
    columns = [f"{statistics.median(values):.2f} | {max(values):.2f}" for values in (noticed, pauses)]
    print(f"| {what} | {len(pauses)} | {' | '.join(columns)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rest-s", type=float, default=0.0, help="after each strike: --standby-workers need 10")
    parser.add_argument("--only", default="worker,scheduler,frontend,cable")
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    only = args.only.split(",")
    print("| what | streams | noticed, s: median | worst | longest pause, s: median | worst |\n" + "| --- " * 6 + "|")
    strikes = [each for each in STRIKES if each[0].split()[0] in only]
    words = (str(DEMO_MODEL), "--distributed-executor-backend", "local", *QUICK, *args.flags)
    with ServerProcess(*words).wait_ready() if strikes else contextlib.nullcontext() as server:
        for what, module, number in strikes:
            found: list[Found] = []
            for _ in range(args.rounds):
                found.append(strike_process(server, module, number))
                time.sleep(args.rest_s)
            tell(what, found)
    if "cable" in only:
        cable_rows(args.rounds)


if __name__ == "__main__":
    main()
