"""What it costs to notice that a gRPC client does not read: microseconds per write to a stream, on one core.

    python bench/rpc_write_cost.py

A write that never waits, bare, within `asyncio.timeout`, and through the writer of the gRPC door.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import uvloop

from manta.cluster.doors.rpc_writer import RpcWriter

NUM_WRITES = 100_000
NUM_ROUNDS = 5


class Context:
    """A stream whose client takes everything at once."""

    async def write(self, response: object) -> None:
        pass


async def bare(context: Context) -> None:
    for _ in range(NUM_WRITES):
        await context.write(None)


async def with_timeout(context: Context) -> None:
    for _ in range(NUM_WRITES):
        async with asyncio.timeout(60):
            await context.write(None)


async def with_writer(context: Context) -> None:
    with RpcWriter(context) as writer:
        for _ in range(NUM_WRITES):
            await writer.write(None)


async def main() -> None:
    ways: dict[str, Callable[[Context], Awaitable[None]]] = {
        "bare": bare, "asyncio.timeout": with_timeout, "RpcWriter": with_writer,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(NUM_ROUNDS):
        for name, way in ways.items():
            begin_s = time.perf_counter()
            await way(Context())
            seconds[name].append(time.perf_counter() - begin_s)
    for name, each in seconds.items():
        print(f"{name:16} {1e6 * statistics.median(each) / NUM_WRITES:6.2f} us per write")


if __name__ == "__main__":
    uvloop.run(main())
