"""Opening the doors: ports in use, ports shared by several frontends, and closing them."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import grpc
import httpx
import pytest
import uvloop

from manta.cluster.doors import server as doors_server
from manta.cluster.doors.server import DoorServer, PortError
from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.door_server import DoorThread, build_service
from tests.support.fake_client import FakeClient
from tests.support.server import wait_until

T = TypeVar("T")


@pytest.mark.parametrize("field", ["port", "grpc_port"])
def test_a_port_in_use_names_the_port_and_the_setting(model_folder: Path, field: str) -> None:
    async def start(port: int) -> None:
        await DoorServer(build_service(FakeClient(), model_folder, **{field: port})).start()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortError, match=rf"{port}.* in use .*choose another .*{field}"):
            asyncio.run(start(port))


def test_several_frontends_share_both_ports(model_folder: Path) -> None:
    with DoorThread(FakeClient(), model_folder, api_server_count=2) as first:
        ports = {"port": first.http_port, "grpc_port": first.grpc_port}
        with DoorThread(FakeClient(), model_folder, api_server_count=2, **ports) as second:
            assert (second.http_port, second.grpc_port) == (first.http_port, first.grpc_port)
            clients = (first.client, second.client)
            # The kernel spreads connections by their source port, so both get some of many.
            for _ in range(200):
                assert httpx.post(f"{first.base_url}/v1/completions", json={"prompt": "x"}).status_code == 200
                if all(client.submitted for client in clients):
                    break
            assert all(client.submitted for client in clients)


def test_a_frontend_makes_way_for_another_one(model_folder: Path) -> None:
    """New connections are the other one's; a call that runs is answered."""
    old_engine, new_engine = FakeClient(), FakeClient()
    released = threading.Event()

    async def wait_for_release(num_sent: int) -> None:
        while not released.is_set():
            await asyncio.sleep(0.005)

    old_engine._break_or_hang = wait_for_release  # type: ignore[method-assign]
    body = {"prompt": "x"}
    with DoorThread(old_engine, model_folder) as old:
        url = f"{old.base_url}/v1/completions"
        asking = _in_thread(lambda: httpx.post(url, json=body, timeout=20).json())
        wait_until(lambda: bool(old_engine.submitted), 10, "it has the call")
        with (
            DoorThread(new_engine, model_folder, joins=True, port=old.http_port, grpc_port=old.grpc_port) as new,
            grpc.insecure_channel(new.grpc_address) as channel,
        ):
            retiring = _in_thread(lambda: old.run(lambda: old.server.retire(20.0)))
            wait_until(lambda: not _listens(old), 10, "it does not listen any more")
            for _ in range(20):
                assert httpx.post(url, json=body, timeout=20).status_code == 200
            list(pb_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="x")))
            assert len(new_engine.submitted) == 21
            assert not retiring.done()
            released.set()
            assert asking.result()["usage"]["completion_tokens"] == 16
            retiring.result()


def test_the_last_answer_of_a_connection_says_so(model_folder: Path) -> None:
    """So that no client sends its next call into a connection that ends."""
    with DoorThread(FakeClient(), model_folder) as doors, httpx.Client(timeout=20) as kept:
        url = f"{doors.base_url}/v1/completions"
        assert "connection" not in kept.post(url, json={"prompt": "x"}).headers
        retiring = _in_thread(lambda: doors.run(lambda: doors.server.retire(20.0)))
        wait_until(lambda: not _listens(doors), 10, "it does not listen any more")
        answer = kept.post(url, json={"prompt": "x"})
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        retiring.result()
        with pytest.raises(httpx.ConnectError):
            kept.post(url, json={"prompt": "x"})


def test_connections_that_nobody_has_taken_yet_are_answered(model_folder: Path) -> None:
    """The kernel has accepted them for the old one, and would reset them when it stops to listen."""
    clients: list[socket.socket] = []

    def answers() -> list[bytes]:
        return [client.recv(12) for client in clients]

    async def make_way() -> list[bytes]:
        old = DoorServer(build_service(FakeClient(), model_folder))
        ports = await old.start()
        same = {"port": ports["http"], "grpc_port": ports["grpc"]}
        new = DoorServer(build_service(FakeClient(), model_folder, **same))
        await new.start(joins=True)
        for _ in range(32):  # the kernel spreads them over both
            clients.append(socket.create_connection(("127.0.0.1", ports["http"]), timeout=20))
            clients[-1].sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        try:
            _, answered = await asyncio.gather(old.retire(20.0), asyncio.to_thread(answers))
        finally:
            for client in clients:
                client.close()
            await old.stop(0.0)
            await new.stop(0.0)
        return answered

    assert uvloop.run(make_way()) == [b"HTTP/1.1 200"] * 32


def test_who_makes_way_waits_for_bodies_that_come_slowly(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors_server, "QUIET_S", 0.1)
    body = b'{"prompt": "x"}'
    with (
        DoorThread(FakeClient(), model_folder) as doors,
        socket.create_connection(("127.0.0.1", doors.http_port), timeout=20) as client,
    ):
        client.sendall(b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body))
        wait_until(lambda: any(server.server_state.tasks for server in doors.server._http), 10, "it has the call")
        retiring = _in_thread(lambda: doors.run(lambda: doors.server.retire(20.0)))
        with pytest.raises(TimeoutError):
            retiring.result(timeout=0.5)
        client.sendall(body)
        assert client.recv(12) == b"HTTP/1.1 200"
        retiring.result()


def _listens(doors: DoorThread) -> bool:
    return any(listener.is_serving() for server in doors.server._http for listener in server.servers)


def _in_thread(work: Callable[[], T]) -> "Future[T]":
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def test_stop_lets_running_calls_finish(model_folder: Path) -> None:
    engine = FakeClient()
    released = threading.Event()
    with DoorThread(engine, model_folder) as doors, grpc.insecure_channel(doors.grpc_address) as channel:
        started = threading.Event()

        async def wait_for_release(num_sent: int) -> None:
            started.set()
            while not released.is_set():
                await asyncio.sleep(0.005)

        engine._break_or_hang = wait_for_release  # type: ignore[method-assign]
        answers: list[httpx.Response] = []
        url = f"{doors.base_url}/v1/completions"
        asking = threading.Thread(target=lambda: answers.append(httpx.post(url, json={"prompt": "x"}, timeout=20)))
        asking.start()
        assert started.wait(10)
        stopped: list[bool] = []
        stopping = threading.Thread(target=lambda: stopped.append(doors.run(lambda: doors.server.stop(20.0))))
        stopping.start()
        deadline = time.monotonic() + 10
        while not doors.service.running.is_draining:
            assert time.monotonic() < deadline
        assert httpx.get(f"{doors.base_url}/ready").status_code == 503
        with pytest.raises(grpc.RpcError) as caught:
            list(pb_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="x")))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        released.set()
        asking.join(20)
        stopping.join(20)
        assert stopped == [True]
        assert answers[0].json()["usage"]["completion_tokens"] == 16
