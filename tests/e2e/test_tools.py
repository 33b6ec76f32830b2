"""Forced calls of tools from a model of random weights, through a real server: the OpenAI SDK gets calls that fit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.server import ServerProcess
from tests.support.small_tokenizers import VOCAB_SIZE, write_model_folder

pytest.importorskip("xgrammar", reason="the extra structured is not installed")
TEMPLATE = (
    "{{ tools | map(attribute='function.name') | join(' ') }}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
)
CITIES = ["Bonn", "Köln", 'a "quoted" one']


def tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("weather", {"city": {"$ref": "#/$defs/city"}, "hours": {"type": "integer", "minimum": 1, "maximum": 48}}),
    tool("stop", {}),
]
TOOLS[0]["function"]["parameters"]["$defs"] = {"city": {"enum": CITIES}}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    torch.set_num_threads(1)
    folder: Path = write_model_folder(tmp_path_factory.mktemp("model"), chat_template=TEMPLATE)
    make_checkpoint(folder, "llama", vocab_size=VOCAB_SIZE, eos_token_id=1)
    words = [
        str(folder), "--served-model-name", "tiny", "--dtype", "float32", "--kv-cache-memory-bytes", "8MiB",
        "--distributed-executor-backend", "local", "--max-num-seqs", "8", "--port", "0", "--grpc-port", "0",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "deepseek_r1",
    ]  # fmt: skip
    with (
        ServerProcess(*words) as server,
        openai.OpenAI(base_url=f"{server.wait_ready().url}/v1", api_key="none", max_retries=0) as sdk,
    ):
        yield sdk


def create(sdk: openai.OpenAI, **fields: Any) -> Any:
    messages = [{"role": "user", "content": "How is it?"}]
    return sdk.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=200, **fields)  # type: ignore[call-overload]


def check_call(function: Any) -> None:
    arguments = json.loads(function.arguments)
    if function.name == "stop":
        assert arguments == {}
        return
    assert function.name == "weather"
    assert arguments.keys() == {"city", "hours"}
    assert arguments["city"] in CITIES
    assert 1 <= arguments["hours"] <= 48


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_forced_calls_fit_their_tools(sdk: openai.OpenAI, choice: Any) -> None:
    names = set()
    for seed in range(4):
        fields = {"tool_choice": choice, "parallel_tool_calls": False, "seed": seed, "temperature": 1.5}
        (whole,) = create(sdk, **fields).choices
        (call,) = whole.message.tool_calls
        check_call(call.function)
        assert whole.message.content is None
        assert whole.finish_reason == ("tool_calls" if choice == "required" else "stop")
        arguments = ""
        for chunk in create(sdk, **fields, stream=True):
            assert not chunk.choices[0].delta.content
            for piece in chunk.choices[0].delta.tool_calls or ():
                arguments += piece.function.arguments or ""
        assert arguments == call.function.arguments
        names.add(call.function.name)
    assert names <= {"weather", "stop"} if choice == "required" else names == {"weather"}


def test_without_force_the_text_of_random_weights_is_no_call(sdk: openai.OpenAI) -> None:
    (choice,) = create(sdk, seed=1).choices
    assert choice.message.tool_calls is None
    assert choice.message.reasoning_content  # type: ignore[attr-defined]  # it never says that it has thought enough
