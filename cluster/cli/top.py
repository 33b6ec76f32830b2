"""`manta top`: which request holds which physical KV blocks, live."""

import argparse
import sys
import time

import httpx

from manta.cluster.cli.flags import UsageError
from manta.cluster.cli.talk import bearer

_CLEAR = "\x1b[H\x1b[2J"


def top(argv: list[str]) -> int:
    """Prints the server's picture of its block tables, once or until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="manta top", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="server")
    parser.add_argument("--api-key", default="", help="sent as a bearer token; that of OPENAI_API_KEY if unset")
    parser.add_argument("--interval", type=float, default=0.5, metavar="SECONDS", help="time between two pictures")
    parser.add_argument("--once", action="store_true", help="print one picture and exit")
    args = parser.parse_args(argv)
    url = args.url.rstrip("/").removesuffix("/v1") + "/block_tables"
    once = args.once or not sys.stdout.isatty()
    with httpx.Client(timeout=10, headers=bearer(args.api_key)) as client:
        while True:
            try:
                response = client.get(url, params={"format": "text"})
                response.raise_for_status()
            except httpx.HTTPError as error:
                raise UsageError(f"no answer from {url}: {error}") from None
            print(response.text if once else _CLEAR + response.text, flush=True)
            if once:
                return 0
            time.sleep(args.interval)
