"""What a streamed token costs the client that measures it, in us of CPU: the load generator against httpx and aiohttp.

`python bench/client_cost.py --streams 64 --chunks 200` starts a server process that sends each stream one event per
--interval-ms, and reads all streams with each client in turn, in one process per client.
"""

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection as Pipe

import aiohttp
import httpx
import orjson
import uvloop

from manta.cluster.bench.http_client import Address, HttpClient
from manta.cluster.bench.sse import EventParser

_EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"model",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null,"stop_reason":null}],"usage":null}\n\n'
)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_BODY = orjson.dumps({"prompt": [1] * 128, "stream": True})


class _Server(asyncio.Protocol):
    """Answers one request per connection with paced events."""

    chunks = 0
    interval_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._received.endswith(_BODY):
            self._task = asyncio.ensure_future(self._answer())

    async def _answer(self) -> None:
        write = self._transport.write  # type: ignore[attr-defined]
        write(_HEAD)
        for _ in range(self.chunks):
            await asyncio.sleep(self.interval_s)
            write(b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT))
        write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def _serve(port: Pipe, chunks: int, interval_s: float) -> None:
    async def run() -> None:
        _Server.chunks, _Server.interval_s = chunks, interval_s
        server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(run())


class _Counter:
    """Counts events with text, as every client here must."""

    def __init__(self) -> None:
        self.count = 0
        self._parser = EventParser()

    def on_start(self, status: int) -> None:
        assert status == 200

    def on_body(self, piece: bytes, now_s: float) -> None:
        for event in self._parser.feed(piece):
            if event != b"[DONE]" and orjson.loads(event)["choices"][0]["text"]:
                self.count += 1


async def _manta(url: str, streams: int) -> int:
    client = HttpClient(Address.parse(url), {})
    counters = [_Counter() for _ in range(streams)]
    await asyncio.gather(*[client.request("POST", "/", _BODY, counter) for counter in counters])
    client.close()
    return sum(counter.count for counter in counters)


async def _httpx(url: str, streams: int) -> int:
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(limits=limits, timeout=None) as client:

        async def one() -> int:
            counter = _Counter()
            async with client.stream("POST", url, content=_BODY) as response:
                async for piece in response.aiter_raw():
                    counter.on_body(piece, time.perf_counter())
            return counter.count

        return sum(await asyncio.gather(*[one() for _ in range(streams)]))


async def _aiohttp(url: str, streams: int) -> int:
    connector = aiohttp.TCPConnector(limit=streams)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one() -> int:
            counter = _Counter()
            async with session.post(url, data=_BODY) as response:
                async for piece in response.content.iter_any():
                    counter.on_body(piece, time.perf_counter())
            return counter.count

        return sum(await asyncio.gather(*[one() for _ in range(streams)]))


async def _streams(url: str, streams: int) -> int:
    """asyncio's own stream reader with hand-made chunk decoding: the floor of what awaits each piece."""
    address = Address.parse(url)

    async def one() -> int:
        counter = _Counter()
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY))
        await reader.readuntil(b"\r\n\r\n")
        while size := int(await reader.readline(), 16):
            counter.on_body((await reader.readexactly(size + 2))[:-2], time.perf_counter())
        writer.close()
        return counter.count

    return sum(await asyncio.gather(*[one() for _ in range(streams)]))


_CLIENTS: dict[str, Callable[[str, int], Awaitable[int]]] = {
    "manta": _manta,
    "asyncio streams": _streams,
    "aiohttp": _aiohttp,
    "httpx": _httpx,
}


def _measure(result: Pipe, client: str, url: str, streams: int) -> None:
    async def run() -> None:
        start_s = time.process_time()
        count = await _CLIENTS[client](url, streams)
        result.send((count, time.process_time() - start_s))

    uvloop.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=200, help="events per stream")
    parser.add_argument("--interval-ms", type=float, default=20.0, help="time between two events of a stream")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=_serve, args=(there, args.chunks, args.interval_ms / 1e3), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{here.recv()}/"
    for name in _CLIENTS:
        process = context.Process(target=_measure, args=(there, name, url, args.streams), daemon=True)
        process.start()
        count, cpu_s = here.recv()
        process.join()
        assert count == args.streams * args.chunks, f"{name} lost events: {count}"
        print(f"{name:<16} {cpu_s / count * 1e6:6.1f} us per token", flush=True)
    server.terminate()


if __name__ == "__main__":
    main()
