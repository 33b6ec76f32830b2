"""One frontend: connected to an engine, with both doors open."""

import asyncio
import os
import random
import time
from collections.abc import Sequence

from manta.cluster.batches.keeper import Keeper
from manta.cluster.batches.store import BatchStore
from manta.cluster.doors.api_keys import KeyRing
from manta.cluster.doors.batch_work import new_keeper, open_store
from manta.cluster.doors.generation import Running
from manta.cluster.doors.grammar_check import GrammarChecker
from manta.cluster.doors.limits import read_limits
from manta.cluster.doors.server import DoorServer
from manta.cluster.doors.service import Service
from manta.cluster.doors.text import Tokenizer, load_tokenizer
from manta.cluster.doors.validate import Validator
from manta.cluster.engine.client import Client, EngineClient
from manta.configs.schema import ServeConfig


class Frontend:
    """Runs in one event loop, as a process of its own or inside a Ray actor. `config_json` is a ServeConfig, which
    names no API keys: their hashes come by themselves.

    What takes seconds and needs no engine is in `prepare`, which can run while the model loads.
    """

    def __init__(self, config_json: str, key_hashes: Sequence[str] = ()) -> None:
        config = ServeConfig.model_validate_json(config_json)
        self._config = config.model_copy(update={"api_key": tuple(key_hashes)}) if key_hashes else config
        self._tokenizer: Tokenizer | None = None
        self._grammars: GrammarChecker | None = None
        self._client: Client | None = None
        self._server: DoorServer | None = None
        self._batches: BatchStore | None = None
        self._keeper: Keeper | None = None

    async def prepare(self) -> None:
        """Loads the tokenizer. Raises TokenizerError."""
        if self._tokenizer is None:
            self._tokenizer = await asyncio.to_thread(load_tokenizer, self._config)

    async def start(
        self, engine_address: str, http_port: int, grpc_port: int, *, joins: bool = False
    ) -> dict[str, int]:
        """Connects to the engine at "host:port" and listens; a port of 0 takes a free one. Returns the ports
        {"http": ..., "grpc": ...}. joins: another frontend of this deployment may listen there.

        Raises TokenizerError, PreflightError, ModelError, KeyFileError, CertificateError, StorageError, PortError
        or EngineLostError.
        """
        await self.prepare()
        assert self._tokenizer is not None
        config = self._config.model_copy(update={"port": http_port, "grpc_port": grpc_port})
        self._client = await EngineClient.connect(engine_address)
        try:
            return await self._open(config, self._tokenizer, self._client, joins)
        except BaseException:
            await self._client.close()
            raise

    async def _open(self, config: ServeConfig, tokenizer: Tokenizer, client: Client, joins: bool) -> dict[str, int]:
        info = await client.info()
        limits = await asyncio.to_thread(read_limits, config, info.max_model_len)
        # Several frontends must not draw the same seeds.
        seeds = random.Random(config.seed if config.api_server_count == 1 else f"{config.seed}:{os.getpid()}")
        self._grammars = GrammarChecker(config)
        service = Service(
            client=client,
            config=config,
            validator=Validator(limits, tokenizer, seeds, self._grammars),
            running=Running(client, tokenizer),
            started_s=time.time(),
            keys=KeyRing.of(config),
            batches=await open_store(config),
        )
        self._server = DoorServer(service)
        ports = await self._server.start(joins)
        if service.batches is not None:
            self._batches = service.batches
            self._keeper = new_keeper(service, service.batches)
            self._keeper.start()
        return ports

    async def retire(self, grace_s: float) -> None:
        """Another frontend has its ports by now: takes no new connections, and returns when the calls over its own have
        ended, or after `grace_s`."""
        if self._keeper is not None:
            await self._keeper.stop()
        if self._server is not None:
            await self._server.retire(grace_s)

    async def stop(self, grace_s: float) -> bool:
        """Refuses new requests, gives running ones `grace_s` to finish, then ends. True if none was cut off."""
        drained = True
        if self._keeper is not None:
            await self._keeper.stop()
        if self._server is not None:
            drained = await self._server.stop(grace_s)
        if self._batches is not None:
            await self._batches.close()
        if self._grammars is not None:
            await self._grammars.close()
        if self._client is not None:
            await self._client.close()
        return drained
