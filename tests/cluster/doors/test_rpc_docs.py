"""The grpcurl commands of the documents, sent as grpcurl would: by reflection, with the JSON as it is printed."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from manta.protos import inference_pb2
from tests.cluster.doors.test_tools import AUTO, TEMPLATE, Chat, serving
from tests.support.doc_blocks import blocks_of, pages
from tests.support.server import ROOT
from tests.support.small_tokenizers import write_model_folder

_WITH_VALUE = ("-d", "-H", "-max-time", "-cacert")


@dataclass
class Command:
    """grpcurl [options] address words..."""

    options: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    @property
    def method(self) -> tuple[str, str]:
        """Service and name; of a command that calls one."""
        service, _, name = self.words[1].partition("/")
        return service, name


def commands_of(page: Path) -> Iterator[Command]:
    for block in blocks_of(page):
        if block.language == "python":
            continue
        for text in re.split(r"^grpcurl ", block.code.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            words = iter(shlex.split(text, comments=True))
            command = Command()
            for word in words:
                if word == "||" or (command.words and word in ("curl", "manta")):
                    break  # what else is in the block
                if word in _WITH_VALUE:
                    command.options[word] = next(words)
                elif not word.startswith("-"):
                    command.words.append(word)
            yield command


COMMANDS = [command for page in pages() for command in commands_of(page)]
CALLS = [command for command in COMMANDS if "/" in command.words[1]]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    with serving(write_model_folder(tmp_path_factory.mktemp("docs"), chat_template=TEMPLATE), **AUTO) as chat:
        yield chat


@pytest.fixture(scope="module")
def channel(chat: Chat) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(chat.doors.grpc_address) as channel:
        yield channel


@pytest.fixture(scope="module")
def pool(channel: grpc.Channel) -> DescriptorPool:
    """What reflection tells, and nothing else."""
    return DescriptorPool(ProtoReflectionDescriptorDatabase(channel))


def send(channel: grpc.Channel, pool: DescriptorPool, command: Command) -> list[dict[str, Any]]:
    service, name = command.method
    method = pool.FindServiceByName(service).methods_by_name[name]
    request = GetMessageClass(method.input_type)()
    json_format.Parse(command.options.get("-d", "{}"), request, descriptor_pool=pool)
    seconds = float(command.options.get("-max-time", 20))
    answers = channel.unary_stream(f"/{service}/{name}")(request.SerializeToString(), timeout=seconds)
    told = []
    try:
        for data in answers:
            answer = GetMessageClass(method.output_type).FromString(data)
            told.append(json_format.MessageToDict(answer, preserving_proto_field_name=True, descriptor_pool=pool))
    except grpc.RpcError as error:
        if "-max-time" not in command.options or error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
    return told


def test_there_is_a_command_for_every_method() -> None:
    called = {command.method[1] for command in CALLS}
    methods = inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods
    assert {method.name for method in methods} <= called


@pytest.mark.parametrize("command", CALLS, ids=lambda command: command.method[1])
def test_commands_work(channel: grpc.Channel, pool: DescriptorPool, command: Command) -> None:
    answers = send(channel, pool, command)
    if "-max-time" not in command.options:
        assert answers
        json.dumps(answers)
    asked = json.loads(command.options.get("-d", "{}"))
    if command.method[1] in ("Generate", "Chat") and answers:
        num_completions = asked.get("sampling", {}).get("n", 1)
        assert {answer.get("index", 0) for answer in answers} == set(range(num_completions))
        assert "usage" in answers[-1]
    if asked.get("echo"):
        assert answers[0]["text"] == asked["text"]


def test_what_is_described_is_there(pool: DescriptorPool) -> None:
    described = [command.words[2] for command in COMMANDS if command.words[1] == "describe"]
    assert described
    for name in described:
        assert pool.FindMessageTypeByName(name).fields


def test_the_example_of_a_tool(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo model calls none; here is one that does."""
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>'
    texts = [chat.tokenizer.encode(text, add_special_tokens=False) for text in (call, "It is sunny.")]

    def model(request: Any) -> list[int]:
        return texts["21 degrees" in chat.tokenizer.decode(list(request.prompt_token_ids))]

    first, *others = [block for block in blocks_of(ROOT / "docs" / "grpc.md") if block.language == "python"]
    (tool,) = [block for block in others if "pb.Tool(" in block.code]
    chat.doors.client.model = model
    names: dict[str, Any] = {}
    for block in (first, tool):
        capsys.readouterr()
        exec(block.code.replace("localhost:50051", chat.doors.grpc_address), names)
    assert capsys.readouterr().out == "It is sunny.\n"
