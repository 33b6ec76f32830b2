"""Links: frames arrive whole and in order, whoever is lost is noticed, strangers are kept out."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from manta.cluster.link_listener import LinkListener
from manta.cluster.links import Link, LinkLostError, LinkSilentError, connect
from tests.support.fake_deployment import run, until


@contextlib.asynccontextmanager
async def pair(ping_every_s: float = 60.0) -> AsyncIterator[tuple[Link, Link]]:
    """A link's two sides; the first is the one that pings."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)
    first, second = Link(ours, pings=True, ping_every_s=ping_every_s), Link(theirs, pings=False)
    try:
        yield first, second
    finally:
        first.close()
        second.close()


@contextlib.asynccontextmanager
async def raw_pair(pings: bool = False, ping_every_s: float = 60.0) -> AsyncIterator[tuple[Link, socket.socket]]:
    """A link, and the plain socket at its other end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    link = Link(ours, pings=pings, ping_every_s=ping_every_s)
    try:
        yield link, theirs
    finally:
        link.close()
        theirs.close()


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


def test_frames_of_any_size_arrive_in_order() -> None:
    async def test() -> None:
        async with pair() as (first, second):
            sent = [bytes([i % 256]) * size for i, size in enumerate((1, 3, 70_000, 2, 1_000_000, 5, 65_536, 300))]
            for data in sent:
                first.write(data)
            assert [await second.read() for _ in sent] == sent
            for data in sent[::-1]:
                second.write(data)
            assert [await first.read() for _ in sent] == sent[::-1]

    run(test())


@pytest.mark.parametrize("cut", range(1, 21))
def test_frames_cut_anywhere(cut: int) -> None:
    """The kernel gives bytes as it likes: half a length, a frame and a half, an empty frame in between."""
    data = frame(b"abc") + frame(b"") + frame(b"defgh")

    async def test() -> None:
        async with raw_pair() as (link, other):
            loop = asyncio.get_running_loop()
            for part in (data[:cut], data[cut:]):
                if part:
                    await loop.sock_sendall(other, part)
                    await asyncio.sleep(0)
            assert [await link.read(), await link.read()] == [b"abc", b"defgh"]
            assert await loop.sock_recv(other, 100) == frame(b"")  # the empty one came back

    run(test())


def test_drain_waits_until_the_other_side_reads() -> None:
    async def test() -> None:
        async with raw_pair() as (link, other):
            await link.drain()  # nothing to wait for
            link.write(bytes(1_000_000))
            draining = asyncio.create_task(link.drain())
            await asyncio.sleep(0.02)
            assert not draining.done()
            link.write(b"behind it")
            expected, got = frame(bytes(1_000_000)) + frame(b"behind it"), b""
            while len(got) < len(expected):
                got += await asyncio.get_running_loop().sock_recv(other, 1 << 20)
            assert got == expected
            await draining

    run(test())


def test_whoever_reads_learns_that_the_link_is_lost() -> None:
    async def test() -> None:
        async with raw_pair() as (link, other):
            await asyncio.get_running_loop().sock_sendall(other, frame(b"last") + b"\5\0\0\0half")
            other.close()
            assert await link.read() == b"last"
            with pytest.raises(LinkLostError, match="connection lost"):
                await link.read()
            link.write(b"nobody hears this")
            await link.drain()
        async with pair() as (first, second):
            reading = asyncio.create_task(second.read())
            first.write(bytes(1_000_000))
            draining = asyncio.create_task(first.drain())
            await asyncio.sleep(0)
            first.close()
            await draining
            with pytest.raises(LinkLostError):
                await reading
            with pytest.raises(LinkLostError, match="it was closed"):
                await first.read()

    run(test())


def test_a_side_that_is_silent_is_given_up() -> None:
    """A stopped process keeps its connection: only that it does not answer tells."""

    async def test() -> None:
        async with raw_pair(pings=True, ping_every_s=0.01) as (link, _other):
            with pytest.raises(LinkSilentError, match="nothing came for"):
                await link.read()
        async with raw_pair(ping_every_s=0.01) as (link, _other):  # nor does one that should ping
            with pytest.raises(LinkSilentError, match="nothing came for"):
                await link.read()

    run(test())


def test_pings_keep_an_idle_link() -> None:
    async def test() -> None:
        async with pair(ping_every_s=0.01) as (first, second):
            reading = asyncio.create_task(first.read())
            await asyncio.sleep(0.3)
            assert not reading.done()
            second.write(b"here")
            assert await reading == b"here"

    run(test())


async def echo(link: Link) -> None:
    while True:
        link.write(await link.read())


@pytest.mark.parametrize("local", [True, False], ids=["unix", "tcp"])
def test_a_listener_takes_those_with_the_key(local: bool) -> None:
    async def test() -> None:
        listener = LinkListener("127.0.0.1", echo)
        listener.start()
        name = listener.socket_name if local else ""
        address = f"127.0.0.1:{listener.port}" if not local else "127.0.0.1:1"
        link = await connect(address, name, listener.key, timeout_s=5.0)
        link.write(b"hello")
        assert await link.read() == b"hello"
        for key in (b"x" * len(listener.key), b"short", listener.key + b"x"):
            with pytest.raises(LinkLostError):
                await connect(address, name, key, timeout_s=5.0)
        link.write(b"again")
        assert await link.read() == b"again"
        await listener.stop(None)
        with pytest.raises(LinkLostError):
            await link.read()
        with pytest.raises(OSError):
            await connect(f"127.0.0.1:{listener.port}", listener.socket_name, listener.key, timeout_s=5.0)

    run(test())


def test_a_listener_lets_links_end_by_themselves() -> None:
    async def test() -> None:
        served: list[bytes] = []

        async def take(link: Link) -> None:
            served.append(await link.read())

        listener = LinkListener("127.0.0.1", take)
        listener.start()
        link = await connect(f"127.0.0.1:{listener.port}", "", listener.key, timeout_s=5.0)
        stopping = asyncio.create_task(listener.stop(grace_s=20.0))
        await until(lambda: listener._accepting[0].cancelled(), "it accepts no more")
        link.write(b"bye")
        await stopping
        assert served == [b"bye"]
        link.close()

    run(test())


def test_a_name_of_another_host_falls_back_to_the_port() -> None:
    async def test() -> None:
        listener = LinkListener("127.0.0.1", echo)
        listener.start()
        link = await connect(f"127.0.0.1:{listener.port}", "manta-nobody-here", listener.key, timeout_s=5.0)
        link.write(b"hello")
        assert await link.read() == b"hello"
        link.close()
        await listener.stop(None)

    run(test())


def test_what_is_no_key_is_not_waited_for() -> None:
    async def test() -> None:
        listener = LinkListener("127.0.0.1", echo)
        listener.start()
        loop = asyncio.get_running_loop()
        for start in (b"GET / HTTP/1.1\r\n", b"\0\0\0\0", b"\xff\xff\xff\xff"):
            with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
                stranger.setblocking(False)
                await loop.sock_sendall(stranger, start)
                with contextlib.suppress(ConnectionResetError):
                    assert await loop.sock_recv(stranger, 100) == b""
        await listener.stop(None)

    run(test())


def test_a_port_where_nobody_answers_is_no_link() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(TimeoutError):
                await connect(address, "", bytes(16), timeout_s=0.1)
            silent.settimeout(20.0)
            accepted, _ = silent.accept()
            with accepted:
                accepted.settimeout(20.0)
                assert accepted.recv(100) == frame(bytes(16))
                assert accepted.recv(100) == b""  # given up, not left open

    run(test())


def test_a_listener_outlives_a_failed_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the process has too many files open."""
    monkeypatch.setattr("manta.cluster.link_listener._RETRY_S", 0.01)

    async def test() -> None:
        loop = asyncio.get_running_loop()
        accept, failures = loop.sock_accept, [OSError(24, "Too many open files")] * 2

        async def accept_at_last(sock: socket.socket) -> object:
            if failures:
                raise failures.pop()
            return await accept(sock)

        monkeypatch.setattr(loop, "sock_accept", accept_at_last)
        listener = LinkListener("127.0.0.1", echo)
        listener.start()
        for name in ("", listener.socket_name):
            link = await connect(f"127.0.0.1:{listener.port}", name, listener.key, timeout_s=20.0)
            link.close()
        assert not failures
        await listener.stop(None)

    run(test())
