"""The frontend process: `python -m manta.cluster.doors.main --config-json JSON --engine HOST:PORT`.

Prints `MANTA_ADDRESS host:http_port host:grpc_port` when both doors are open, or `MANTA_ERROR sentence` before it ends
because it cannot open them. SIGTERM and SIGINT let running requests
finish; the end of the parent does not.
"""

import argparse
import asyncio
import logging
import signal
import sys

import uvloop
from pydantic import ValidationError

from manta.cluster.doors.frontend import Frontend
from manta.cluster.doors.server import PortError
from manta.cluster.doors.text import TokenizerError
from manta.cluster.engine.client import EngineError
from manta.cluster.orphan import parent_ended
from manta.configs.model import ModelError
from manta.configs.schema import ServeConfig


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="manta.cluster.doors.main", description="A frontend process: HTTP and gRPC.")
    parser.add_argument("--config-json", required=True, help="configs.schema.ServeConfig as JSON")
    parser.add_argument("--engine", required=True, help="host:port of the scheduler process")
    parser.add_argument("--parent-pid", type=int, default=0, help="end when this process is gone")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        uvloop.run(_serve(args.config_json, args.engine, args.parent_pid))
    except (ValidationError, TokenizerError, ModelError, PortError, EngineError) as error:
        print(f"MANTA_ERROR {error}", flush=True)
        return 1
    return 0


async def _serve(config_json: str, engine_address: str, parent_pid: int) -> None:
    config = ServeConfig.model_validate_json(config_json)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    frontend = Frontend(config_json, engine_address)
    ports = await frontend.start()
    print(f"MANTA_ADDRESS {config.host}:{ports['http']} {config.host}:{ports['grpc']}", flush=True)
    waits = [asyncio.create_task(stopping.wait()), asyncio.create_task(parent_ended(parent_pid))]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in waits:
        task.cancel()
    await frontend.stop(config.shutdown_timeout if stopping.is_set() else 0.0)


if __name__ == "__main__":
    sys.exit(main())
