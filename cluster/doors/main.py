"""The frontend process: `python -m manta.cluster.doors.main --config-json JSON`.

Loads its tokenizer, then waits for one line on standard input: ENGINE_HOST:PORT HTTP_PORT GRPC_PORT, and `joins` where
another frontend of the deployment may listen on these ports.
Prints `MANTA_ADDRESS host:http_port host:grpc_port` when both doors are open, or `MANTA_ERROR sentence` before it ends
because it cannot open them. SIGTERM and SIGINT let running requests finish; the end of the parent does not. SIGUSR1:
another frontend has taken the ports, and this one ends when it has answered those who are connected.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys

import uvloop
from pydantic import ValidationError

from manta.cluster.batches.database import StorageError
from manta.cluster.doors.api_keys import KeyFileError
from manta.cluster.doors.frontend import Frontend
from manta.cluster.doors.server import PortError
from manta.cluster.doors.text import TokenizerError
from manta.cluster.doors.tls import CertificateError
from manta.cluster.engine.client import EngineError, EngineLostError
from manta.cluster.orphan import parent_ended
from manta.cluster.preflight import PreflightError
from manta.configs.api_keys import HASHES_VARIABLE
from manta.configs.model import ModelError
from manta.configs.schema import ServeConfig

_CANNOT_OPEN = (
    ValidationError, TokenizerError, PreflightError, ModelError, KeyFileError, CertificateError, PortError, EngineError,
    StorageError,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="manta.cluster.doors.main", description="A frontend process: HTTP and gRPC.")
    parser.add_argument("--config-json", required=True, help="configs.schema.ServeConfig as JSON")
    parser.add_argument("--parent-pid", type=int, default=0, help="end when this process is gone")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        uvloop.run(_serve(args.config_json, args.parent_pid))
    except _CANNOT_OPEN as error:
        print(f"MANTA_ERROR {error}", flush=True)
        return 1
    return 0


async def _serve(config_json: str, parent_pid: int) -> None:
    config = ServeConfig.model_validate_json(config_json)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    retiring = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, retiring.set)
    ends = [asyncio.create_task(stopping.wait()), asyncio.create_task(parent_ended(parent_pid))]
    hashes = os.environ.pop(HASHES_VARIABLE, "")
    frontend = Frontend(config_json, hashes.split(",") if hashes else ())
    starting = asyncio.create_task(_start(frontend, config.host))
    await asyncio.wait([starting, *ends], return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        starting.result()
        retired = asyncio.create_task(_retire(frontend, retiring, config.shutdown_timeout))
        await asyncio.wait([*ends, retired], return_when=asyncio.FIRST_COMPLETED)
        ends.append(retired)
    for task in (starting, *ends):
        task.cancel()
    await frontend.stop(config.shutdown_timeout if stopping.is_set() else 0.0)


async def _retire(frontend: Frontend, retiring: asyncio.Event, grace_s: float) -> None:
    await retiring.wait()
    await frontend.retire(grace_s)


async def _start(frontend: Frontend, host: str) -> None:
    """Returns when the doors are open."""
    await frontend.prepare()
    engine_address, http_port, grpc_port, *more = (await _read_line()).split()
    ports = await frontend.start(engine_address, int(http_port), int(grpc_port), joins="joins" in more)
    print(f"MANTA_ADDRESS {host}:{ports['http']} {host}:{ports['grpc']}", flush=True)


async def _read_line() -> str:
    """One line of standard input, without a thread: one that waits for input would keep the process from ending."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    line = await reader.readline()
    if not line:
        raise EngineLostError("standard input ended before it named the engine")
    return line.decode()


if __name__ == "__main__":
    sys.exit(main())
