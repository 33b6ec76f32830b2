"""What gRPC clients are told of failures, and what a server bears of messages that nobody should send."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from manta.cluster.doors import patience
from manta.cluster.doors.rpc_errors import MAX_MESSAGE_BYTES
from manta.cluster.doors.rpc_load import LOOK_INTERVAL_S
from manta.cluster.engine.client import QueueFullError, TokenChunk
from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient
from tests.support.small_tokenizers import write_model_folder

USER = {"role": "user", "content": "x"}


@pytest.fixture
def channel(doors: DoorThread) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(doors.grpc_address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.InferenceStub:
    return pb_grpc.InferenceStub(channel)


def failure(answers: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(answers)
    return caught.value


def details(error: grpc.RpcError) -> tuple[status_pb2.Status, dict[str, Any]]:
    """The google.rpc.Status of an error, and its details by the names of their messages."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found = {}
    for each in status.details:
        name = each.TypeName().removeprefix("google.rpc.")
        found[name] = getattr(error_details_pb2, name)()
        assert each.Unpack(found[name])
    return status, found


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_details_of_a_bad_field(stub: pb_grpc.InferenceStub) -> None:
    request = pb.ChatRequest(messages=[USER, {"role": "user"}])
    status, found = details(failure(stub.Chat(request)))
    (violation,) = found["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("messages[1].content", status.message)
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == ("MISSING_REQUIRED_PARAMETER", "manta")
    assert "RetryInfo" not in found


def test_details_of_a_full_queue(stub: pb_grpc.InferenceStub, engine: FakeClient) -> None:
    engine.refusal = QueueFullError("full", retry_after_s=2.5)
    _, found = details(failure(stub.Generate(pb.GenerateRequest(text="x"))))
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 2500
    assert found["ErrorInfo"].reason == "QUEUE_FULL"
    assert "BadRequest" not in found


def test_errors_of_unary_calls_have_details(stub: pb_grpc.InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Detokenize(pb.DetokenizeRequest(ids=[-1]))
    assert details(caught.value)[1]["BadRequest"].field_violations[0].field == "ids"


@pytest.mark.parametrize(
    "text", ["word " * 2000, "größer 🙂 " * 2000, "100% " * 2000], ids=["ascii", "unicode", "percent"]
)
def test_long_messages_are_cut_so_that_clients_take_them(tmp_path: Path, text: str) -> None:
    template = "{{ raise_exception(messages[0]['content']) }}"
    folder = write_model_folder(tmp_path, chat_template=template)
    with DoorThread(FakeClient(), folder) as doors, grpc.insecure_channel(doors.grpc_address) as channel:
        request = pb.ChatRequest(messages=[{"role": "user", "content": text}])
        error = failure(pb_grpc.InferenceStub(channel).Chat(request))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "chat template: " + text[:10] in error.details()
    assert 100 < len(error.details()) <= MAX_MESSAGE_BYTES + 3
    assert details(error)[1]["BadRequest"].field_violations[0].field == "messages"


NOT_UTF8 = b"\x12\x02\xff\xfe"  # field 2, the model


@pytest.mark.parametrize("method", ["Generate", "Chat"])
@pytest.mark.parametrize("data", [b"\xff\xff\xff", NOT_UTF8, b"\x22\x05\x0d\x00"], ids=["noise", "no UTF-8", "cut off"])
def test_what_is_no_message(channel: grpc.Channel, engine: FakeClient, method: str, data: bytes) -> None:
    error = failure(channel.unary_stream(f"/manta.inference.v1.Inference/{method}")(data))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == f"this is no {method}Request, or has texts that are no UTF-8"
    assert dict(error.trailing_metadata())["error-code"] == "invalid_message"
    assert not engine.submitted
    assert pb_grpc.InferenceStub(channel).GetLoad(pb.GetLoadRequest()).num_blocks


def test_noise_to_a_unary_method(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/manta.inference.v1.Inference/Tokenize")(b"\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_fields_that_nobody_knows_are_not_ignored(channel: grpc.Channel, engine: FakeClient) -> None:
    unknown = b"\xf8\x3e\x01"  # field 1007, a number 1
    nested = pb.ChatRequest(messages=[USER]).SerializeToString() + b"\x1a" + bytes([len(unknown)]) + unknown
    cases = {
        ("Generate", pb.GenerateRequest(text="x").SerializeToString() + unknown): ("1007", "GenerateRequest"),
        ("Chat", nested): ("messages[1].1007", "ChatMessage"),
        ("Generate", b"\x2a\x03" + unknown): ("sampling.1007", "SamplingParams"),
    }
    for (method, data), (param, kind) in cases.items():
        error = failure(channel.unary_stream(f"/manta.inference.v1.Inference/{method}")(data))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert dict(error.trailing_metadata())["error-param"] == param
        assert f"field 1007 of {kind} is unknown" in error.details()
    assert not engine.submitted


def test_unknown_enums_and_numbers_that_are_none(stub: pb_grpc.InferenceStub) -> None:
    sampling = {"early_stopping": 9, "use_beam_search": True}
    for request, param in (
        (pb.GenerateRequest(text="x", output=9), "output"),  # type: ignore[arg-type]
        (pb.GenerateRequest(text="x", sampling=sampling), "early_stopping"),
        (pb.GenerateRequest(text="x", sampling={"temperature": float("nan")}), "temperature"),
        (pb.GenerateRequest(text="x", sampling={"logit_bias": {3: float("inf")}}), "logit_bias"),
    ):
        error = failure(stub.Generate(request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert dict(error.trailing_metadata())["error-param"] == param


def test_a_huge_chat_is_refused(doors: DoorThread) -> None:
    request = pb.ChatRequest(messages=[{"role": "user", "content": "x" * patience.MAX_BODY_BYTES}])
    with grpc.insecure_channel(doors.grpc_address, [("grpc.max_send_message_length", -1)]) as channel:
        stub = pb_grpc.InferenceStub(channel)
        assert failure(stub.Chat(request)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        request.messages[0].content = "x" * (patience.MAX_BODY_BYTES - 100)
        assert failure(stub.Chat(request)).code() is grpc.StatusCode.INVALID_ARGUMENT  # longer than the context
        assert list(stub.Generate(pb.GenerateRequest(text="x")))


def test_a_chat_that_is_not_read_is_cut(
    stub: pb_grpc.InferenceStub, engine: FakeClient, doors: DoorThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "SLOW_READER_S", 0.3)
    longest = max(range(512), key=lambda token: len(doors.service.validator.tokenizer.bytes_of(token)))
    num_made = 0

    async def never_end(request: Any) -> Any:
        nonlocal num_made
        try:
            while True:
                num_made += 1
                yield TokenChunk([longest] * 8192)
        finally:
            engine.aborted.append(request.request_id)

    engine.generate = never_end  # type: ignore[method-assign]
    call = stub.Chat(pb.ChatRequest(messages=[USER], request_id="slow", stream=True))
    next(call)
    wait_for(lambda: engine.aborted == ["slow"])
    assert num_made < 1000  # it was not made before it could be sent
    error = failure(call)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert dict(error.trailing_metadata())["error-code"] == "slow_reader"


def test_load_is_watched_by_the_clock_and_on_change(stub: pb_grpc.InferenceStub, engine: FakeClient) -> None:
    num_looks = 0
    look = engine.load

    async def count() -> Any:
        nonlocal num_looks
        num_looks += 1
        return await look()

    engine.load = count  # type: ignore[method-assign]
    every = stub.WatchLoad(pb.WatchLoadRequest(interval_ms=100))
    assert [next(every).num_running for _ in range(3)] == [0, 0, 0]
    every.cancel()
    watches = [stub.WatchLoad(pb.WatchLoadRequest(interval_ms=60_000, on_change=True)) for _ in range(5)]
    assert [next(watch).num_running for watch in watches] == [0] * 5
    before, begin_s = num_looks, time.monotonic()
    engine.hang_after = 1
    call = stub.Generate(pb.GenerateRequest(text="x", stream=True))
    next(call)
    assert [next(watch).num_running for watch in watches] == [1] * 5
    call.cancel()
    assert [next(watch).num_running for watch in watches] == [0] * 5
    assert num_looks - before <= (time.monotonic() - begin_s) / LOOK_INTERVAL_S + 2  # five watch, one looks
    for watch in watches:
        watch.cancel()


def test_a_watch_ends_with_the_engine_and_checks_its_interval(stub: pb_grpc.InferenceStub, engine: FakeClient) -> None:
    for interval_ms in (0, 99, 3_600_001):
        error = failure(stub.WatchLoad(pb.WatchLoadRequest(interval_ms=interval_ms)))
        assert (error.code().name, details(error)[1]["BadRequest"].field_violations[0].field) == (
            "INVALID_ARGUMENT", "interval_ms",
        )  # fmt: skip
    watch = stub.WatchLoad(pb.WatchLoadRequest(interval_ms=100))
    next(watch)

    async def lost() -> Any:
        raise QueueFullError("no answer", retry_after_s=1.0)

    engine.load = lost  # type: ignore[method-assign]
    assert failure(watch).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
