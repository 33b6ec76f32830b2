"""Frameworks over the OpenAI and Anthropic APIs, against the real server. Each is skipped where it is not installed:
`pip install litellm mcp instructor llama-index-llms-openai-like`."""

from importlib.util import find_spec
from typing import Any

import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.support.server import ServerProcess

QUESTION = "CREATE TABLE employees (id INTEGER, name TEXT, salary REAL);\nHow many employees are there?"
ANSWER = "SELECT COUNT(*) FROM employees"
MESSAGES = [{"role": "user", "content": QUESTION}]


def needs(module: str, name: str) -> pytest.MarkDecorator:
    """Skips before a server is started for nothing."""
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{name} is not installed")


class Weather(BaseModel):
    """The weather of some hours."""

    hours: int = Field(ge=1, le=9)
    is_sunny: bool


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks for prices when it is imported
    return pytest.importorskip("litellm")


@needs("litellm", "litellm")
@pytest.mark.parametrize(
    ("model", "path"), [("openai", "/v1"), ("hosted_vllm", "/v1"), ("anthropic", "")], ids=lambda value: value
)
def test_litellm_chat(server: ServerProcess, litellm: Any, model: str, path: str) -> None:
    fields = {"model": f"{model}/text2sql", "api_base": server.url + path, "api_key": "none", "temperature": 0}
    fields |= {"messages": MESSAGES, "max_tokens": 30}
    whole = litellm.completion(**fields)
    assert whole.choices[0].message.content == ANSWER
    assert whole.usage.completion_tokens > 0
    chunks = list(litellm.completion(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER


@needs("litellm", "litellm")
def test_litellm_texts_and_vectors(server: ServerProcess, litellm: Any) -> None:
    fields = {"api_base": f"{server.url}/v1", "api_key": "none"}
    text = litellm.text_completion(
        model="text-completion-openai/text2sql", prompt="SELECT", max_tokens=8, temperature=0, **fields
    )
    assert text.choices[0].text
    vectors = litellm.embedding(model="hosted_vllm/text2sql", input=["a", "b"], **fields).data
    assert len(vectors) == 2
    assert len(vectors[0]["embedding"]) == len(vectors[1]["embedding"]) > 0


@needs("instructor", "instructor")
@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_instructor(server: ServerProcess, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    pytest.importorskip("xgrammar", reason="the extra structured is not installed")
    openai = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    client = instructor.from_openai(openai, mode=instructor.Mode[mode])
    fields = {"model": "text2sql", "messages": MESSAGES, "max_tokens": 400, "max_retries": 0}
    assert isinstance(client.chat.completions.create(response_model=Weather, **fields), Weather)


@needs("llama_index", "llama-index")
def test_llama_index(server: ServerProcess) -> None:
    openai_like = pytest.importorskip("llama_index.llms.openai_like")
    messages = pytest.importorskip("llama_index.core.llms")
    fields = {"model": "text2sql", "api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0}
    chat = openai_like.OpenAILike(is_chat_model=True, max_tokens=40, **fields)
    asked = [messages.ChatMessage(role="user", content=QUESTION)]
    assert chat.chat(asked).message.content == ANSWER
    assert "".join(piece.delta or "" for piece in chat.stream_chat(asked)) == ANSWER
    assert openai_like.OpenAILike(is_chat_model=False, max_tokens=8, **fields).complete("SELECT").text
