"""What a token costs between a step's result and the bytes of its server-sent event, in processor time.

    python bench/token_path.py --model FOLDER

Real scheduler, real frontend, a worker whose device is a clock, and streaming HTTP clients in this process, which is
not counted. Prints, per token delivered, the CPU time of the scheduler process and of the frontend process. FOLDER
holds a config.json and a tokenizer (`python bench/shapes.py` writes one); its weights are not read.
"""

import argparse
import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson
from processes import cpu_s, spawn

from manta.configs.schema import ServeConfig

PROMPT_TOKENS = 32


@dataclass
class Counts:
    """What all clients together have received."""

    num_events: int = 0
    num_bytes: int = 0
    begun: set[int] = field(default_factory=set)


class Client(asyncio.Protocol):
    """Posts one request and counts the events of the answer."""

    def __init__(self, index: int, body: bytes, path: str, counts: Counts) -> None:
        self._index = index
        self._counts = counts
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        num_events = data.count(b"data: {")
        if not num_events and b"HTTP/1.1 200" not in data:
            raise SystemExit(data.decode())
        self._counts.num_events += num_events
        self._counts.num_bytes += len(data)
        if num_events:
            self._counts.begun.add(self._index)


def request_body(index: int, step_ms: float, chat: bool) -> bytes:
    """The seed is the device's step time in microseconds."""
    fields = {"model": "bench", "stream": True, "max_tokens": 1_500, "ignore_eos": True, "seed": round(step_ms * 1000)}
    if chat:
        return orjson.dumps(fields | {"messages": [{"role": "user", "content": f"Count to {index}."}]})
    return orjson.dumps(fields | {"prompt": [3 + (index * 31 + i) % 1000 for i in range(PROMPT_TOKENS)]})


@asynccontextmanager
async def deployment(model: str, streams: int) -> AsyncIterator[tuple[str, list[int]]]:
    """The frontend's "host:port" and the process ids of scheduler and frontend."""
    config = ServeConfig(
        model=model, served_model_name="bench", device="cpu", host="127.0.0.1", port=0, grpc_port=0,
        max_num_seqs=streams, max_num_batched_tokens=8192,
    )  # fmt: skip
    parent = ["--parent-pid", str(os.getpid())]
    child = ["--config-json", config.model_dump_json(), *parent]
    frontend = spawn("frontend", "manta.cluster.doors.main", child)
    worker = spawn("worker", "fake_device", parent)
    children = [frontend, worker]
    try:
        workers = await asyncio.to_thread(worker.wait_for_address, 60)
        scheduler = spawn("scheduler", "manta.cluster.engine.main", [*child, "--workers", workers])
        children.append(scheduler)
        frontend.tell(f"{await asyncio.to_thread(scheduler.wait_for_address, 60)} 0 0")
        address = (await asyncio.to_thread(frontend.wait_for_address, 60)).split()[0]
        yield address, [scheduler.pid, frontend.pid]
    finally:
        for process in children:
            process.terminate()
        for process in children:
            await asyncio.to_thread(process.join, 10)


async def measure(args: argparse.Namespace, step_ms: float) -> str:
    async with deployment(args.model, args.streams) as (address, (scheduler, frontend)):
        host, port = address.split(":")
        counts, loop = Counts(), asyncio.get_running_loop()
        path = "/v1/chat/completions" if args.chat else "/v1/completions"
        transports = []
        for index in range(args.streams):
            client = Client(index, request_body(index, step_ms, args.chat), path, counts)
            transport, _ = await loop.create_connection(lambda client=client: client, host, int(port))
            transports.append(transport)
        while len(counts.begun) < args.streams:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        begin_s, num_events, num_bytes = time.monotonic(), counts.num_events, counts.num_bytes
        cpu = [cpu_s([scheduler]), cpu_s([frontend])]
        await asyncio.sleep(args.duration_s)
        cpu = [cpu_s([scheduler]) - cpu[0], cpu_s([frontend]) - cpu[1]]
        seconds, num_events = time.monotonic() - begin_s, counts.num_events - num_events
        for transport in transports:
            transport.abort()
    us = [1e6 * used / num_events for used in cpu]
    steps = seconds * 1000 / step_ms
    return (
        f"{args.streams:>8} {step_ms:>6g} {us[0]:>10.1f} {us[1]:>9.1f} {sum(us):>6.1f} {num_events / seconds:>9.0f} "
        f"{num_events / steps / args.streams:>11.2f} {(counts.num_bytes - num_bytes) / num_events:>12.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with config.json and tokenizer")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[50, 25])
    parser.add_argument("--duration-s", type=float, default=5.0)
    parser.add_argument("--chat", action="store_true", help="chat completions instead of completions")
    args = parser.parse_args()
    print("CPU us per token; events per step and stream tell whether the frontend keeps up")
    print(
        f"{'streams':>8} {'D ms':>6} {'scheduler':>10} {'frontend':>9} {'sum':>6} {'tokens/s':>9} "
        f"{'events/step':>11} {'bytes/event':>12}"
    )
    for step_ms in args.step_ms:
        print(asyncio.run(measure(args, step_ms)), flush=True)


if __name__ == "__main__":
    main()
