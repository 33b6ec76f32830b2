"""The scheduler process: `python -m manta.cluster.engine.main --config-json JSON --workers "a,b;c,d"`.

Workers of a replica are separated by commas, replicas by semicolons. Prints `MANTA_ADDRESS host:port` when it serves,
or `MANTA_ERROR sentence` before it ends because it cannot.
"""

import argparse
import asyncio
import gc
import logging
import signal
import sys
from contextlib import suppress

import pydantic
import uvloop

from manta.cluster.engine.bringup import BringUpError, bring_up
from manta.cluster.engine.engine import Engine
from manta.cluster.engine.revival import find_workers
from manta.cluster.engine.service import EngineServer
from manta.cluster.engine.workers import WorkerError
from manta.cluster.orphan import parent_ended
from manta.cluster.preflight import PreflightError, read_model
from manta.configs.schema import ServeConfig

_STOP_GRACE_S = 1.0


class SchedulerServer:
    """Brings the workers up and serves frontends, until `stop`. Lives on one event loop."""

    def __init__(
        self,
        config_json: str,
        worker_addresses: list[list[str]],
        host: str = "127.0.0.1",
        port: int = 0,
        takes_over: bool = False,
    ) -> None:
        """worker_addresses: per replica, in rank order. takes_over: another scheduler had these workers; a replica that
        cannot go on is left out. Raises pydantic.ValidationError for a bad configuration."""
        self._config = ServeConfig.model_validate_json(config_json)
        self._worker_addresses = worker_addresses
        self._host = host
        self._port = port
        self._takes_over = takes_over
        self._engine: Engine | None = None
        self._server: EngineServer | None = None

    async def start(self) -> str:
        """Returns "host:port". Raises WorkerError, BringUpError or PreflightError with one sentence for the user."""
        spec = read_model(self._config).spec
        begin = find_workers if self._takes_over else bring_up
        deployment = await begin(self._config, spec, self._worker_addresses)
        self._engine = Engine(self._config, spec, deployment, replaces_workers=True)
        self._engine.start()
        self._server = await EngineServer.start(self._engine, self._host, self._port)
        gc.collect()
        gc.freeze()  # what exists now lives as long as the process: collections need not look at it
        return self._server.address

    async def lost(self) -> str:
        """Once started: returns the reason when no replica is left."""
        assert self._engine is not None
        return await self._engine.lost()

    async def stop(self) -> None:
        """Ends the step loops, then the streams. May be called twice."""
        if self._engine is not None:
            await self._engine.stop()
            self._engine = None
        if self._server is not None:
            await self._server.stop(_STOP_GRACE_S)
            self._server = None


def parse_workers(text: str) -> list[list[str]]:
    """ "a:1,b:2;c:3,d:4" -> [["a:1", "b:2"], ["c:3", "d:4"]]; nothing between semicolons -> []."""
    return [[address for address in replica.split(",") if address] for replica in text.split(";")]


async def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM, SIGINT, the parent's end or the loss of all replicas; returns the exit code."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    server = SchedulerServer(args.config_json, parse_workers(args.workers), args.host, args.port, args.takes_over)
    waits = [asyncio.create_task(stopping.wait()), asyncio.create_task(parent_ended(args.parent_pid))]
    starting = asyncio.create_task(server.start())
    try:
        await asyncio.wait([starting, *waits], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            print(f"MANTA_ADDRESS {starting.result()}", flush=True)
            lost = asyncio.create_task(server.lost())
            await asyncio.wait([lost, *waits], return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                print(f"MANTA_ERROR no replica is left: {lost.result()}", flush=True)
                return 1
    except (WorkerError, BringUpError, PreflightError) as error:
        print(f"MANTA_ERROR {error}", flush=True)
        return 1
    finally:
        for task in (starting, *waits):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(starting, *waits, return_exceptions=True)
        await server.stop()
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="manta.cluster.engine.main", description="The scheduler process.")
    parser.add_argument("--config-json", required=True, help="configs.schema.ServeConfig as JSON")
    parser.add_argument("--workers", required=True, help="addresses: comma within a replica, semicolon between")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--takes-over", action="store_true", help="the workers had another scheduler, which is gone")
    parser.add_argument("--parent-pid", type=int, default=0, help="end when this process is gone")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        return uvloop.run(run(args))
    except pydantic.ValidationError as error:
        print(f"MANTA_ERROR {error}", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
