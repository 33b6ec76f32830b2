"""Both doors over a fake engine, in an event loop on a thread of the test process."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from manta.cluster.batches.keeper import Keeper
from manta.cluster.doors.api_keys import KeyRing
from manta.cluster.doors.batch_work import new_keeper, open_store
from manta.cluster.doors.generation import Running
from manta.cluster.doors.limits import read_limits
from manta.cluster.doors.server import DoorServer
from manta.cluster.doors.service import Service
from manta.cluster.doors.text import load_tokenizer
from manta.cluster.doors.validate import Validator
from manta.configs.schema import ServeConfig
from tests.support.fake_client import FakeClient

T = TypeVar("T")
MAX_MODEL_LEN = 256


def build_service(client: FakeClient, model_folder: Path, **config_fields: Any) -> Service:
    """What a frontend builds when it starts. Call it inside the event loop that serves."""
    fields: dict[str, Any] = {"served_model_name": "tiny", "host": "127.0.0.1", "port": 0, "grpc_port": 0}
    config = ServeConfig(model=str(model_folder), **(fields | config_fields))
    tokenizer = load_tokenizer(config)
    limits = read_limits(config, config.max_model_len or MAX_MODEL_LEN)
    validator = Validator(limits, tokenizer, random.Random(config.seed))
    return Service(client, config, validator, Running(client, tokenizer), 1.0, KeyRing.of(config))


class DoorThread:
    """`with DoorThread(client, folder) as doors:` serves until the block ends."""

    def __init__(self, client: FakeClient, model_folder: Path, joins: bool = False, **config_fields: Any) -> None:
        self.client = client
        self._joins = joins
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._arguments = (model_folder, config_fields)
        self._keeper: Keeper | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        ports = self.run(self._start)
        self.http_port, self.grpc_port = ports["http"], ports["grpc"]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.run(self._stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._loop.close()

    async def _start(self) -> dict[str, int]:
        folder, config_fields = self._arguments
        service = build_service(self.client, folder, **config_fields)
        self.service = replace(service, batches=await open_store(service.config))
        self.server = DoorServer(self.service)
        ports = await self.server.start(self._joins)
        if self.service.batches is not None:
            self._keeper = new_keeper(self.service, self.service.batches)
            self._keeper.start()
        return ports

    async def stop_batches(self) -> None:
        """Others may run them then."""
        if self._keeper is not None:
            await self._keeper.stop()

    async def _stop(self) -> None:
        await self.stop_batches()
        await self.server.stop(0.0)
        if self.service.batches is not None:
            await self.service.batches.close()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def run(self, function: Callable[[], Awaitable[T]], timeout_s: float = 30.0) -> T:
        """Runs an async function in the serving loop."""

        async def call() -> T:
            return await function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(timeout_s)
