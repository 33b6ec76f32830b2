"""What stored responses cost: memory of a frontend over many of them, and the time of a call beside the same chat call.

    python -m bench.response_store

A fake engine answers at once, so what is measured is the door. Clients ask over HTTP, four at a time; RSS is that of
the process that serves, in which the fake engine runs, too. Past --max-stored-responses it must not grow. First, what
it costs when a request reaches a frontend that does not have the response and passes it on.
"""

import argparse
import asyncio
import collections
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient
from tests.support.small_tokenizers import write_model_folder

CONCURRENCY = 4


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


async def ask(url: str, body: dict[str, Any], num_calls: int) -> float:
    """Seconds per call, from one client's point of view times the calls side by side."""
    left = iter(range(num_calls))

    async def client() -> None:
        async with httpx.AsyncClient(timeout=60) as http:
            for _ in left:
                (await http.post(url, json=body)).raise_for_status()

    start_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
    return (time.perf_counter() - start_s) / num_calls


def ask_both(model: Path) -> None:
    """GET of a response from the frontend that has it, and from another one that passes the request on."""
    shared = {"api_server_count": 2, "max_model_len": 8192}
    with DoorThread(FakeClient(), model, **shared) as first:
        ports = {"port": first.http_port, "grpc_port": first.grpc_port}
        with DoorThread(FakeClient(), model, **shared, **ports) as second:
            folder = first.server._peers._folder
            uds = [str(folder / doors.server._peers.name) for doors in (first, second)]
            own, other = (httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://x") for path in uds)
            created = own.post("/v1/responses", json={"input": "hello", "max_output_tokens": 64}).json()
            for name, client in (("own", own), ("another's", other), ("own", own), ("another's", other)):
                start_s = time.perf_counter()
                for _ in range(300):
                    client.get(f"/v1/responses/{created['id']}").raise_for_status()
                print(f"GET of {name:9s} {(time.perf_counter() - start_s) / 300 * 1e3:6.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-responses", type=int, default=10_000)
    parser.add_argument("--max-stored-responses", type=int, default=2_500)
    parser.add_argument("--input-characters", type=int, default=2_000)
    parser.add_argument("--output-tokens", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine, model = FakeClient(), write_model_folder(Path(folder))
        engine.tokens_per_chunk = args.output_tokens
        ask_both(model)
        limits = {"max_stored_responses": args.max_stored_responses, "max_model_len": 8192}
        with DoorThread(engine, model, **limits) as doors:
            text = "hello " * (args.input_characters // 6)
            response: dict[str, Any] = {"input": text, "max_output_tokens": args.output_tokens}
            chat = {"messages": [{"role": "user", "content": text}], "max_tokens": args.output_tokens}
            base = f"{doors.base_url}/v1"
            asyncio.run(ask(f"{base}/responses", response | {"store": False}, 500))
            engine.submitted = collections.deque(maxlen=8)  # what a test wants to know of would count as growth
            engine.finished = collections.deque(maxlen=8)
            engine._cache = lambda request: 0
            print(f"{os.cpu_count()} cores; {args.input_characters} characters in, {args.output_tokens} tokens out")
            for name, path, body in (
                ("chat", "chat/completions", chat),
                ("responses, store=false", "responses", response | {"store": False}),
                ("responses, stored", "responses", response),
            ):
                print(f"{name:24s} {asyncio.run(ask(f'{base}/{path}', body, 1000)) * 1e3:6.2f} ms per call")
            print(f"RSS with 1000 stored: {rss_mib():.0f} MiB")
            step = args.num_responses // 4
            for done in range(step, args.num_responses + 1, step):
                asyncio.run(ask(f"{base}/responses", response, step))
                print(f"RSS after {done} more: {rss_mib():.0f} MiB")


if __name__ == "__main__":
    main()
