"""API keys: what is taken at the doors, who the caller is, and where keys never appear."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from manta.cluster.cli.flags import UsageError, parse_serve_config
from manta.cluster.cli.main import main
from manta.cluster.cli.serve import _with_key_of_environment
from manta.cluster.doors.api_keys import KeyFileError, KeyRing
from manta.cluster.doors.authentication import OPEN_PATHS
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.http import build_app
from manta.cluster.doors.startup import check_doors
from manta.cluster.preflight import PreflightError
from manta.configs.schema import ServeConfig
from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient

KEYS = "# who: key\n\nalice:sk-alice\nalice:sk-alice-next\nbob: sk-bob \nsk-nobody\n"
PROMPT = [300] * 40


def sha(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture(scope="module")
def locked(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorThread]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEYS)
    with DoorThread(FakeClient(), model_folder, api_key=["sk-flag"], api_key_file=str(file)) as doors:
        yield doors


@pytest.fixture
def stub(locked: DoorThread) -> Iterator[pb_grpc.InferenceStub]:
    with grpc.insecure_channel(locked.grpc_address) as channel:
        yield pb_grpc.InferenceStub(channel)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def metadata(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def test_every_route_but_those_of_life_needs_a_key(locked: DoorThread) -> None:
    with httpx.Client(base_url=locked.base_url) as http:
        for route in build_app(locked.service).routes:
            path = route.path.replace("{name:path}", "tiny")  # type: ignore[attr-defined]
            method = "GET" if "GET" in route.methods else "POST"  # type: ignore[attr-defined]
            answer = http.request(method, path)
            assert answer.status_code == (200 if path in OPEN_PATHS else 401), path
        assert http.get("/nothing/here").status_code == 401


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"Authorization": ""}, "missing_api_key"),
        ({"Authorization": "Bearer"}, "missing_api_key"),
        ({"Authorization": "Basic sk-bob"}, "missing_api_key"),
        ({"Authorization": "Bearer sk-bo"}, "invalid_api_key"),
        ({"Authorization": "Bearer sk-bob2"}, "invalid_api_key"),
        ({"Authorization": "Bearer bob:sk-bob"}, "invalid_api_key"),
        ({"Authorization": "Bearer " + sha("sk-bob")}, "invalid_api_key"),
        ({"Authorization": "Bearer \xe9\xff"}, "invalid_api_key"),
    ],
)
def test_401_has_the_body_of_the_openai_api(locked: DoorThread, headers: dict[str, str], code: str) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = httpx.post(f"{locked.base_url}/v1/completions", json={"prompt": "x"}, headers=raw)
    assert answer.status_code == 401
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("AuthenticationError", None, code)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    assert "sk-bo" not in error["message"]


@pytest.mark.parametrize("key", ["sk-alice", "sk-alice-next", "sk-bob", "sk-nobody", "sk-flag"])
def test_each_key_opens_both_doors(locked: DoorThread, stub: pb_grpc.InferenceStub, key: str) -> None:
    with openai.OpenAI(base_url=f"{locked.base_url}/v1", api_key=key, max_retries=0) as client:
        assert client.completions.create(model="tiny", prompt="x", max_tokens=2).usage.completion_tokens == 2
    over_http = locked.client.submitted[-1].tenant
    lower = (("authorization", f"bearer {key}"),)
    assert list(stub.Generate(pb.GenerateRequest(text="x"), metadata=lower))[-1].finish_reason
    assert locked.client.submitted[-1].tenant == over_http
    list(stub.Chat(pb.ChatRequest(messages=[{"role": "user", "content": "x"}]), metadata=lower))
    assert locked.client.submitted[-1].tenant == over_http
    expected = {"sk-alice": "alice", "sk-alice-next": "alice", "sk-bob": "bob"}
    assert over_http == expected.get(key, f"key-{sha(key)[7:15]}")


def test_a_request_id_is_taken_for_its_tenant_alone(locked: DoorThread, stub: pb_grpc.InferenceStub) -> None:
    locked.client.hang_after = 1
    request = pb.GenerateRequest(text="x", request_id="mine", stream=True)
    calls = {key: stub.Generate(request, metadata=metadata(key)) for key in ("sk-alice", "sk-bob")}
    try:
        for call in calls.values():
            next(call)
        assert first_status(stub.Generate(request, metadata=metadata("sk-bob"))) is grpc.StatusCode.ALREADY_EXISTS
        assert stub.Abort(pb.AbortRequest(request_id="mine"), metadata=metadata("sk-bob")).found
        assert [each.finish_reason for each in calls["sk-bob"]][-1] == "abort"
        assert stub.Abort(pb.AbortRequest(request_id="mine"), metadata=metadata("sk-alice")).found
        assert not stub.Abort(pb.AbortRequest(request_id="mine"), metadata=metadata("sk-nobody")).found
    finally:
        locked.client.reset()
        for call in calls.values():
            call.cancel()


def test_the_openai_client_sees_an_authentication_error(locked: DoorThread) -> None:
    with (
        openai.OpenAI(base_url=f"{locked.base_url}/v1", api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="not one of this server's"),
    ):
        client.models.list()


def first_status(answers: Any) -> grpc.StatusCode:
    try:
        next(answers)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_every_rpc_but_health_needs_a_key(locked: DoorThread) -> None:
    service = pb.DESCRIPTOR.services_by_name["Inference"]
    with grpc.insecure_channel(locked.grpc_address) as channel:
        for method in service.methods:
            call = channel.unary_stream(f"/{service.full_name}/{method.name}")  # fits all: an answer is a stream of one
            for keys, code in (((), "missing_api_key"), (metadata("sk-wrong"), "invalid_api_key")):
                with pytest.raises(grpc.RpcError) as caught:
                    next(call(b"", metadata=keys))
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert dict(caught.value.trailing_metadata())["error-code"] == code
            answers = call(b"", metadata=metadata("sk-bob"))
            assert first_status(answers) in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)  # it is empty
            answers.cancel()
    with grpc.insecure_channel(locked.grpc_address) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_no_tenant_finds_anothers_prompts_in_the_prefix_cache(locked: DoorThread, stub: pb_grpc.InferenceStub) -> None:
    def cached_http(key: str, **fields: str) -> int:
        body = {"prompt": PROMPT, "max_tokens": 1} | fields
        answer = httpx.post(f"{locked.base_url}/v1/completions", json=body, headers=bearer(key)).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    def cached_grpc(key: str, salt: str = "") -> int:
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=PROMPT), cache_salt=salt)
        return int(list(stub.Generate(request, metadata=metadata(key)))[-1].usage.cached_tokens)

    assert cached_http("sk-alice") == 0
    assert cached_http("sk-alice-next") == cached_grpc("sk-alice") == 32
    assert cached_http("sk-bob") == cached_grpc("sk-nobody") == 0
    assert cached_grpc("sk-bob") == 32
    assert cached_http("sk-bob", cache_salt="own") == 0
    assert cached_grpc("sk-bob", "own") == 32
    assert cached_http("sk-nobody", cache_salt="alice") == cached_http("sk-nobody", cache_salt="alice\0") == 0


def test_tenants_may_share_the_cache_where_the_operator_says_so() -> None:
    shared = KeyRing([sha("a"), sha("b")], salts=False)
    assert {shared.caller(f"Bearer {key}").salt for key in "ab"} == {""}
    assert len({shared.caller(f"Bearer {key}").tenant for key in "ab"}) == 2


def test_nobody_aborts_what_is_anothers(locked: DoorThread, stub: pb_grpc.InferenceStub) -> None:
    locked.client.hang_after = 1
    call = iter(stub.Generate(pb.GenerateRequest(request_id="j", text="x", stream=True), metadata=metadata("sk-bob")))
    next(call)
    assert not stub.Abort(pb.AbortRequest(request_id="j"), metadata=metadata("sk-alice")).found
    assert stub.Abort(pb.AbortRequest(request_id="j"), metadata=metadata("sk-bob")).found
    assert list(call)[-1].finish_reason == "abort"
    locked.client.hang_after = None


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def tenants(ring: KeyRing, *keys: str) -> list[str | None]:
    found: list[str | None] = []
    for key in keys:
        try:
            found.append(ring.caller(f"Bearer {key}").tenant)
        except RequestError:
            found.append(None)
    return found


def test_keys_rotate_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text("a:sk-1\n")
    ring = KeyRing([], file, clock_s=clock)
    assert tenants(ring, "sk-1", "sk-2") == ["a", None]
    file.write_text(f"a:sk-1\na:{sha('sk-2')}\n")
    assert tenants(ring, "sk-1", "sk-2") == ["a", None]  # not looked at twice within a second
    clock.now_s += 1
    assert tenants(ring, "sk-1", "sk-2") == ["a", "a"]
    for broken in ("a:sk 1\n", "two words:sk-secret\n", "a:sk-secret\nb:\n"):
        file.write_text(broken)
        clock.now_s += 1
        assert tenants(ring, "sk-1", "sk-2") == ["a", "a"]
    file.unlink()
    clock.now_s += 1
    assert tenants(ring, "sk-1", "sk-2") == ["a", "a"]
    assert "secret" not in caplog.text
    assert "line 2" in caplog.text
    replacement = tmp_path / "new"
    replacement.write_text("a:sk-2\n")
    os.replace(replacement, file)
    clock.now_s += 1
    assert tenants(ring, "sk-1", "sk-2") == [None, "a"]
    file.write_text("# all are revoked\n")
    clock.now_s += 1
    assert tenants(ring, "sk-1", "sk-2") == [None, None]
    assert not ring.is_open


@pytest.mark.parametrize(
    ("content", "part"), [(None, "No such file"), ("", "holds no key"), ("a:\n", "line 1"), (b"\xff", "UTF-8")]
)
def test_a_key_file_that_cannot_be_used_is_found_before_anything_starts(
    tmp_path: Path, content: str | bytes | None, part: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    config = ServeConfig(model="m", api_key_file=str(file))
    with pytest.raises(PreflightError, match=part):
        check_doors(config)
    with pytest.raises(KeyFileError, match=part):
        KeyRing.of(config)


def test_the_configuration_holds_no_key_in_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_serve_config(["m", "--api-key", "sk-secret-1", "--api-key", "12345678"])
    assert config.api_key == (sha("sk-secret-1"), sha("12345678"))
    for text in (config.model_dump_json(), repr(config), str(config)):
        assert "secret" not in text
        assert "sha256" not in text
    monkeypatch.setenv("MANTA_API_KEY", "sk-secret-2")
    assert _with_key_of_environment(ServeConfig(model="m")).api_key == (sha("sk-secret-2"),)
    assert "MANTA_API_KEY" not in os.environ
    for wrong in ("sk secret", "sk-secret\x7f", "s" * 513):
        with pytest.raises(UsageError) as caught:
            parse_serve_config(["m", "--api-key", wrong])
        assert "--api-key" in str(caught.value)
        assert wrong not in str(caught.value)


def test_commands_send_the_key(locked: DoorThread, capsys: pytest.CaptureFixture[str], monkeypatch: object) -> None:
    assert isinstance(monkeypatch, pytest.MonkeyPatch)
    url = ["--url", f"{locked.base_url}/v1"]
    url += ["--max-tokens", "8"]
    for command in (["chat", *url, "-q", "hi"], ["complete", *url, "-q", "hi"]):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        for words in (command, [*command, "--api-key", "sk-wrong"]):
            with pytest.raises(SystemExit) as ended:
                main(words)
            assert ended.value.code == 2
            assert "401" in capsys.readouterr().err
        with pytest.raises(SystemExit) as ended:
            main([*command, "--api-key", "sk-bob"])
        assert ended.value.code == 0
        monkeypatch.setenv("OPENAI_API_KEY", "sk-bob")
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["top", "--url", locked.base_url, "--once"])
    assert ended.value.code == 0


def test_clients_of_the_anthropic_api_send_their_own_header(locked: DoorThread) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    url = f"{locked.base_url}/v1/messages"
    assert httpx.post(url, json=body, headers={"x-api-key": "sk-wrong"}).status_code == 401
    assert httpx.post(url, json=body, headers={"x-api-key": "sk-bob"}).status_code == 200
    assert locked.client.submitted[-1].tenant == "bob"
