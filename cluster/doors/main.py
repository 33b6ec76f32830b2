"""Process entry of a frontend: `python -m manta.cluster.doors.main ENGINE_ADDRESS [CONFIG_FILE]`.

The ServeConfig comes as JSON from the file or from standard input. Prints `MANTA_ADDRESS host:http_port host:grpc_port`
when both doors are open. Ends on SIGTERM or SIGINT after the running requests, and when its parent dies.
"""

import argparse
import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

from pydantic import ValidationError

from manta.cluster.doors.frontend import Frontend
from manta.cluster.doors.server import PortError
from manta.cluster.doors.text import TokenizerError
from manta.cluster.engine.client import EngineError
from manta.configs.model import ModelError
from manta.configs.schema import ServeConfig

PARENT_POLL_S = 1.0
_PR_SET_PDEATHSIG = 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Manta frontend: HTTP and gRPC.")
    parser.add_argument("engine_address", help="host:port of the engine")
    parser.add_argument("config", nargs="?", help="file with the ServeConfig as JSON; standard input if not given")
    args = parser.parse_args()
    parent_pid = os.getppid()
    _end_with_parent()
    config_json = Path(args.config).read_text(encoding="utf-8") if args.config else sys.stdin.read()
    import uvloop

    try:
        uvloop.run(_serve(config_json, args.engine_address, parent_pid))
    except (ValidationError, TokenizerError, ModelError, PortError, EngineError) as error:
        print(f"frontend: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(config_json: str, engine_address: str, parent_pid: int) -> None:
    config = ServeConfig.model_validate_json(config_json)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    frontend = Frontend(config_json, engine_address)
    ports = await frontend.start()
    print(f"MANTA_ADDRESS {config.host}:{ports['http']} {config.host}:{ports['grpc']}", flush=True)
    while not ended.is_set() and os.getppid() == parent_pid:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), PARENT_POLL_S)
    await frontend.stop(config.shutdown_timeout if ended.is_set() else 0.0)


def _end_with_parent() -> None:
    """Linux sends SIGTERM when the parent dies; polling covers other systems and a parent that died before this."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
