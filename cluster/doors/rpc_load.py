"""GetLoad and WatchLoad: how busy the engine is."""

import asyncio
from collections.abc import AsyncGenerator

from manta.cluster.doors.checks import check_int
from manta.cluster.doors.state import answer_in_time
from manta.cluster.engine.client import Client
from manta.protos import engine_pb2
from manta.protos import inference_pb2 as pb

LOOK_INTERVAL_S = 0.1  # the engine is asked no more often, however many watch
DEFAULT_INTERVAL_MS, MAX_INTERVAL_MS = 1000, 3_600_000


class LoadWatch:
    """One look at the engine's load for all who watch it. Used in one event loop."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._look: asyncio.Task[engine_pb2.LoadResponse] | None = None
        self._looked_s = 0.0

    async def watch(self, request: pb.WatchLoadRequest) -> AsyncGenerator[pb.GetLoadResponse, None]:
        """The load now, and then as often as is asked for. Raises RequestError or EngineError."""
        interval_ms = request.interval_ms if request.HasField("interval_ms") else DEFAULT_INTERVAL_MS
        interval_s = check_int(interval_ms, "interval_ms", round(LOOK_INTERVAL_S * 1000), MAX_INTERVAL_MS) / 1000
        clock = asyncio.get_running_loop().time
        told, due_s = None, clock()
        while True:
            load = load_message(await self._load())
            if clock() >= due_s or (request.on_change and load != told):
                yield load
                told, due_s = load, clock() + interval_s
            pause_s = max(due_s - clock(), 0.0)
            await asyncio.sleep(min(pause_s, LOOK_INTERVAL_S) if request.on_change else pause_s)

    async def _load(self) -> engine_pb2.LoadResponse:
        now_s = asyncio.get_running_loop().time()
        if self._look is None or (self._look.done() and now_s - self._looked_s >= LOOK_INTERVAL_S):
            self._looked_s = now_s
            self._look = asyncio.create_task(answer_in_time(self._client.load()))
        return await asyncio.shield(self._look)


def load_message(load: engine_pb2.LoadResponse) -> pb.GetLoadResponse:
    return pb.GetLoadResponse(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_free_blocks=load.num_free_blocks,
        num_blocks=load.num_blocks,
        kv_cache_usage=load.kv_cache_usage,
    )
