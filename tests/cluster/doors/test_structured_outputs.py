"""What clients may ask of an output's form, at both doors, and who finds out that a grammar cannot be compiled."""

import asyncio
import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.grammar_check import GrammarChecker
from manta.configs.schema import ServeConfig
from manta.configs.structured_outputs import StructuredOutputsParams
from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient
from tests.support.server import wait_until
from tests.support.small_tokenizers import write_model_folder

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CHOICES = ("ebnf", 'root ::= "yes" | "no\\n"')


@pytest.fixture(scope="module")
def engine() -> FakeClient:
    return FakeClient()


@pytest.fixture(scope="module")
def doors(engine: FakeClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorThread]:
    with DoorThread(engine, write_model_folder(tmp_path_factory.mktemp("model"))) as doors:
        yield doors


def post(doors: DoorThread, path: str, fields: dict[str, Any]) -> httpx.Response:
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    return httpx.post(f"{doors.base_url}/v1/{path}", json=prompt | fields, timeout=30)


def asked_of(engine: FakeClient) -> tuple[str, str] | None:
    constraint = engine.submitted[-1].sampling.structured_outputs
    return None if constraint is None else constraint.grammar_text()


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, ("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"regex": "a+", "json": None}}, ("regex", "a+")),
        ({"structured_outputs": {"choice": ["yes", "no\n", "yes"]}}, CHOICES),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, ("ebnf", 'root ::= "a"')),
        ({"structured_outputs": {"json_object": True}}, ("json_schema", '{"type":"object"}')),
        ({"structured_outputs": {"structural_tag": {"type": "x"}}}, ("structural_tag", '{"type": "x"}')),
        ({"structured_outputs": None, "response_format": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_schema", '{"type":"object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            ("json_schema", json.dumps(SCHEMA)),
        ),
    ],
)  # fmt: skip
def test_what_the_engine_gets(
    doors: DoorThread, engine: FakeClient, path: str, fields: dict[str, Any], expected: tuple[str, str] | None
) -> None:
    response = post(doors, path, fields)
    assert response.status_code == 200, response.text
    assert asked_of(engine) == expected


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "null"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"structured_outputs": "a+"}, "structured_outputs", "must be an object"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "it has regex, choice"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs", "unknown field 'xml'"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "must be a text"),
        ({"structured_outputs": {"json_object": "yes"}}, "structured_outputs.json_object", "true or false"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "a list of texts"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice", "a list of texts"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice", "empty"),
        ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs.choice", "1024"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
        ({"structured_outputs": {"json": [1]}}, "structured_outputs.json", "an object"),
        ({"structured_outputs": {"json": nested(64)}}, "structured_outputs.json", "64 deep"),
        ({"structured_outputs": {"grammar": "(" * 65}}, "structured_outputs.grammar", "64 deep"),
        ({"structured_outputs": {"regex": "a" * 65537}}, "structured_outputs.regex", "at most 65536"),
        ({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [5]}, "structured_outputs", "exclude"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format", "exclude",
        ),
        ({"response_format": "json"}, "response_format", "an object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "'name' and 'schema'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "response_format.json_schema.name", "a string",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "response_format.json_schema.schema", "response_format.json_schema.schema cannot be followed: at #, 'not'",
        ),
        ({"guided_json": SCHEMA}, "guided_json", "structured_outputs={'json': ...}"),
        ({"guided_regex": "a"}, "guided_regex", "structured_outputs={'regex': ...}"),
        ({"guided_choice": ["a"]}, "guided_choice", "structured_outputs={'choice': ...}"),
        ({"guided_grammar": "a"}, "guided_grammar", "structured_outputs={'grammar': ...}"),
        ({"guided_decoding_backend": "a"}, "guided_decoding_backend", "structured_outputs"),
    ],
)  # fmt: skip
def test_bad_requests_name_the_field(doors: DoorThread, fields: dict[str, Any], param: str, words: str) -> None:
    response = post(doors, "completions", fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "at #, 'uniqueItems'"),
        ({"properties": {"a": {"type": "array", "contains": {}}}}, "at #/properties/a, 'contains'"),
        ({"$defs": {"x": {"allOf": [{}, {}]}}, "$ref": "#/$defs/x"}, "at #/$defs/x, 'allOf' of several"),
        ({"anyOf": [{"type": "string", "pattern": "a", "maxLength": 3}]}, "at #/anyOf/0, 'pattern' beside"),
        ({"type": "string", "pattern": "a", "format": "date"}, "'pattern' beside 'format'"),
        ({"items": {"maxLength": 3}}, "at #/items, 'maxLength' needs a 'type'"),
        ({"type": "number", "multipleOf": 0.5}, "'multipleOf' needs the type 'integer'"),
        ({"type": "integer", "multipleOf": 5, "minimum": 3}, "'multipleOf' beside 'minimum'"),
        ({"type": "object", "properties": {"a": {}}, "patternProperties": {"b": {}}}, "beside 'properties'"),
        ({"type": "string", "anyOf": [{"type": "null"}]}, "'type' beside 'anyOf'"),
        ({"enum": ["a"], "minItems": 2, "type": "string"}, "'minItems' beside 'enum'"),
        ({"enum": ["a", 1], "type": "string"}, "1 of 'enum' is not of the type 'string'"),
        ({"const": True, "type": "integer"}, "True of 'const'"),
        ({"$ref": "http://elsewhere/x"}, "must begin with '#/'"),
        ({"$ref": "#/$defs/y", "$defs": {"x": {}}}, "which is not there"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "'b', which is not among 'properties'"),
        ({"items": {"if": {}, "then": {}}}, "at #/items, 'if'"),
    ],
)
def test_what_no_grammar_can_check_is_refused(doors: DoorThread, schema: Any, words: str) -> None:
    response = post(doors, "completions", {"structured_outputs": {"json": schema}})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        (pb.StructuredOutputs(json=json.dumps(SCHEMA)), ("json_schema", json.dumps(SCHEMA))),
        (pb.StructuredOutputs(regex="a+"), ("regex", "a+")),
        (pb.StructuredOutputs(choice=pb.Choices(texts=["yes", "no\n"])), CHOICES),
        (pb.StructuredOutputs(grammar='root ::= "a"'), ("ebnf", 'root ::= "a"')),
        (pb.StructuredOutputs(json_object=True), ("json_schema", '{"type":"object"}')),
        (pb.StructuredOutputs(structural_tag="{}"), ("structural_tag", "{}")),
        (pb.StructuredOutputs(), "exactly one of"),
        (pb.StructuredOutputs(json="{"), "not valid JSON"),
    ],
)
def test_over_grpc(doors: DoorThread, engine: FakeClient, constraint: pb.StructuredOutputs, expected: Any) -> None:
    request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(structured_outputs=constraint, top_k=3))
    with grpc.insecure_channel(doors.grpc_address) as channel:
        call = pb_grpc.InferenceStub(channel).Generate(request, timeout=30)
        if isinstance(expected, tuple):
            list(call)
            assert asked_of(engine) == expected
            assert engine.submitted[-1].sampling.top_k == 3
            return
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert expected in raised.value.details()
    assert any(each.key == "error-param" for each in raised.value.trailing_metadata())


def params(**constraint: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams.model_validate(constraint)


def children_of(checker: GrammarChecker) -> int | None:
    return None if checker._child is None else checker._child.pid


def test_grammars_are_tried_in_a_process_that_can_be_killed(tmp_path: Path) -> None:
    pytest.importorskip("xgrammar", reason="the extra structured is not installed")
    slow = {
        "type": "array",
        "items": {"anyOf": [{"type": "string", "pattern": f"^[a-z]{{{i},99}}$"} for i in range(90)]},
    }
    config = ServeConfig(model=str(write_model_folder(tmp_path)))

    async def test() -> None:
        checker = GrammarChecker(config)
        try:
            await asyncio.gather(*(checker.check(params(regex="a+")) for _ in range(3)), checker.check(None))
            with pytest.raises(RequestError, match=r"cannot be compiled: .*parenthesis") as raised:
                await checker.check(params(regex="("))
            assert raised.value.param == "structured_outputs"
            pid = children_of(checker)
            assert pid is not None
            checker._timeout_s = 0.0
            await checker.check(params(regex="a+"))  # remembered
            with pytest.raises(RequestError, match="takes more than 0 s to compile"):
                await checker.check(params(json=slow))
            wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10, "the end of the process that was too slow")
            checker._timeout_s = 60.0
            await checker.check(params(choice=["a"]))  # by another process
            pid = children_of(checker)
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)  # so that it does not answer before its end
            checking = asyncio.ensure_future(checker.check(params(regex="b+")))
            while not checker._turn.locked():
                await asyncio.sleep(0.01)
            os.kill(pid, signal.SIGKILL)  # as the system does when a grammar takes all the memory
            with pytest.raises(RequestError, match="the compiler failed on it"):
                await checking
        finally:
            await checker.close()
        assert not Path(f"/proc/{pid}").exists()

    asyncio.run(test())


def test_without_the_library_a_request_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xgrammar" else find(name))
    checker = GrammarChecker(ServeConfig(model=str(tmp_path)))
    with pytest.raises(RequestError, match=r"need the package xgrammar: pip install 'manta\[structured\]'"):
        asyncio.run(checker.check(params(regex="a+")))
    assert children_of(checker) is None
