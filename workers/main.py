"""`python -m manta.workers.main`: one worker as a plain process.

Prints `MANTA_ADDRESS host:port` once it can be called, or `MANTA_ERROR sentence` if it never will.
Ends on SIGTERM or SIGINT, and when its parent dies.
"""

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from manta.workers.parent import watch_parent
from manta.workers.server import WorkerServer
from manta.workers.standby import import_all, wait_for_turn


def main() -> None:
    args = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if args.standby and not _is_wanted():
        return
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    if args.parent_pid is not None:
        watch_parent(args.parent_pid, on_death=ended.set)
    try:
        server = WorkerServer(args.host, args.port, ended.set)  # must be held: gRPC stops a server nobody refers to
        address = server.start()
    except (OSError, RuntimeError) as error:
        print(f"MANTA_ERROR worker cannot listen on {args.host}:{args.port}: {error}", flush=True)
        sys.exit(1)
    if args.address_file is not None:
        _write_whole(args.address_file, address)
    print(f"MANTA_ADDRESS {address}", flush=True)
    ended.wait()
    # At once and without the interpreter's shutdown: a compute thread inside a collective never returns when its
    # peers are gone, and the destructors of process groups would wait for it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _is_wanted() -> bool:
    """Stands by; False when the one that might call is gone. A signal ends it meanwhile."""
    import_all(on_cpu=os.environ.get("CUDA_VISIBLE_DEVICES") == "")
    try:
        return wait_for_turn(sys.stdin)
    except (RuntimeError, ValueError) as error:
        print(f"MANTA_ERROR {error}", flush=True)
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m manta.workers.main", description="one worker process")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind, which the other ranks reach")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--address-file", type=Path, help="the address is written here too")
    parser.add_argument("--parent-pid", type=int, help="end when this is no longer the parent process")
    parser.add_argument(
        "--standby",
        action="store_true",
        help="import everything, then wait for a line on standard input, a JSON object of environment variables",
    )
    return parser


def _write_whole(path: Path, text: str) -> None:
    """Readers see the whole text or no file."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
