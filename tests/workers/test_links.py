"""Plans over a plain socket: as over gRPC, and nothing that connects by mistake disturbs a worker."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest
from google.protobuf.message import DecodeError

from manta.protos import worker_pb2 as pb
from manta.workers.links import LinkServer, _Frames
from tests.support.link_stream import LinkStream
from tests.support.plans import step_plan


class Served:
    """A link server that answers each plan with its own step number."""

    def __init__(self) -> None:
        self.ended: SimpleQueue[str] = SimpleQueue()  # what ended each link that had the key
        self.server = LinkServer("127.0.0.1", self.serve)
        self.server.start()

    def serve(self, plans: Iterator[pb.StepPlan]) -> Iterator[pb.StepResult]:
        try:
            for plan in plans:
                yield pb.StepResult(epoch=plan.epoch, step=plan.step)
        except (OSError, DecodeError) as error:
            self.ended.put(type(error).__name__)
        else:
            self.ended.put("end")

    def connect(self, local: bool, key: bytes | None = None) -> LinkStream:
        port, name = self.server.port, self.server.socket_name
        return LinkStream(port, name if local else "", self.server.key if key is None else key)


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.server.stop()


@pytest.mark.parametrize("local", [True, False], ids=["unix", "tcp"])
def test_plans_and_results_in_order(served: Served, local: bool) -> None:
    streams = [served.connect(local) for _ in range(2)]
    for step in range(1, 50):
        for epoch, stream in enumerate(streams, 1):
            stream.send(step_plan(step, epoch=epoch))
    for step in range(1, 50):
        for epoch, stream in enumerate(streams, 1):
            result = stream.receive()
            assert (result.epoch, result.step) == (epoch, step)
    for stream in streams:
        stream.close()
        assert served.ended.get(timeout=10) == "end"


def test_large_plans(served: Served) -> None:
    stream = served.connect(local=True)
    plan = step_plan(7, frees=list(range(500_000)))
    thread = threading.Thread(target=lambda: [stream.send(plan) for _ in range(5)])
    thread.start()
    assert [stream.receive().step for _ in range(5)] == [7] * 5
    thread.join()
    stream.close()


def test_empty_frames_come_back_also_between_results(served: Served) -> None:
    stream = served.connect(local=True)
    for step in (1, 2, 3):
        stream.send_frame(b"")
        stream.send(step_plan(step))
    frames = [stream.receive_frame() for _ in range(6)]
    assert frames.count(b"") == 3
    assert [pb.StepResult.FromString(frame).step for frame in frames if frame] == [1, 2, 3]
    stream.close()


@pytest.mark.parametrize("key", [b"", b"x", b"x" * 16, b"GET / HTTP/1.1\r\n\r\n"])
def test_a_link_without_the_key_is_closed(served: Served, key: bytes) -> None:
    stream = served.connect(local=False, key=key)
    assert not stream.is_taken
    assert served.ended.empty()
    good = served.connect(local=False)
    good.send(step_plan(1))
    assert good.receive().step == 1
    good.close()


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n", struct.pack("<I", 2**32 - 1)])
def test_what_is_no_key_is_not_waited_for(served: Served, start: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=20) as stranger:
        stranger.sendall(start)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
    assert served.ended.empty()


def test_links_are_taken_after_a_failed_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the process has too many files open."""
    monkeypatch.setattr("manta.workers.links._RETRY_S", 0.01)
    accept, failures = socket.socket.accept, [OSError(24, "Too many open files")] * 2

    def accept_at_last(listener: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_at_last)
    served = Served()
    for local in (True, False):
        stream = served.connect(local)
        stream.send(step_plan(1))
        assert stream.receive().step == 1
        stream.close()
    assert not failures
    served.server.stop()


class LateSocket(socket.socket):
    """Silent for as many timeouts as it is told to be."""

    num_silent = 0

    def recv_into(self, *args: object) -> int:
        if self.num_silent:
            self.num_silent -= 1
            raise TimeoutError
        return super().recv_into(*args)  # type: ignore[arg-type]


def test_one_silence_is_not_the_end() -> None:
    """Of a process that was stopped, the timeout has passed at once when it goes on."""
    ours, theirs = socket.socketpair()
    with LateSocket(fileno=ours.detach()) as late, theirs:
        frames = _Frames(late)
        for num_silent in (1, 2):
            theirs.sendall(b"\5\0\0\0plan" + bytes([num_silent]))
            late.num_silent = num_silent
            assert frames.read() == b"plan" + bytes([num_silent])
        theirs.sendall(b"\4\0\0\0late")
        late.num_silent = 3
        with pytest.raises(TimeoutError):
            frames.read()


def test_a_plan_that_is_none_ends_the_link_alone(served: Served) -> None:
    bad, good = served.connect(local=True), served.connect(local=True)
    bad.send_frame(b"\xff\xff\xff")
    assert served.ended.get(timeout=10) == "DecodeError"
    good.send(step_plan(4))
    assert good.receive().step == 4
    good.close()


def test_stop_ends_the_links(served: Served) -> None:
    stream = served.connect(local=True)
    stream.send(step_plan(1))
    assert stream.receive().step == 1
    served.server.stop()
    assert stream.receive_frame() == b""
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", served.server.port), timeout=5)
