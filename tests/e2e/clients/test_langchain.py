"""LangChain's classes for the OpenAI API, against the real server. `pip install -e '.[clients]'`."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel, Field

from tests.support.server import ServerProcess

langchain = pytest.importorskip("langchain_openai", reason="the extra clients is not installed")
QUESTION = "CREATE TABLE employees (id INTEGER, name TEXT, salary REAL);\nHow many employees are there?"
ANSWER = "SELECT COUNT(*) FROM employees"


class Weather(BaseModel):
    """The weather of some hours."""

    hours: int = Field(ge=1, le=48)
    city_number: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def chat(server: ServerProcess) -> Any:
    return langchain.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="text2sql", temperature=0, max_retries=0, timeout=60
    )


def test_invoke_stream_batch_and_async(chat: Any) -> None:
    whole = chat.invoke(QUESTION)
    assert whole.content == ANSWER
    assert whole.response_metadata["finish_reason"] == "stop"
    pieces = list(chat.stream([("system", "Be kind."), ("human", QUESTION)], stream_usage=True))
    joined = pieces[0]
    for piece in pieces[1:]:
        joined += piece
    assert joined.content == chat.invoke([("system", "Be kind."), ("human", QUESTION)]).content
    assert joined.usage_metadata["output_tokens"] > 0
    assert len(pieces) > 2
    assert [answer.content for answer in chat.batch([QUESTION] * 3)] == [ANSWER] * 3
    assert asyncio.run(chat.ainvoke(QUESTION)).content == ANSWER
    history = [("human", QUESTION), ("ai", ANSWER), ("human", QUESTION)]
    assert chat.invoke(history).usage_metadata["input_tokens"] > whole.usage_metadata["input_tokens"]


def test_logprobs_stop_and_seed(chat: Any) -> None:
    told = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in told[:-1]) == ANSWER  # the last one ended the text
    assert all(len(token["top_logprobs"]) == 2 for token in told)
    assert chat.bind(stop=["FROM"]).invoke(QUESTION).content == ANSWER.partition("FROM")[0]
    drawn = [chat.bind(seed=3, temperature=1.5, max_tokens=8).invoke("Hello").content for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_forced_tools_and_structured_output(chat: Any) -> None:
    pytest.importorskip("xgrammar", reason="the extra structured is not installed")
    chat = chat.model_copy(update={"max_tokens": 400})  # the demo model likes the spaces that JSON allows
    for choice in ("Weather", "any"):
        (call,) = chat.bind_tools([Weather], tool_choice=choice, parallel_tool_calls=False).invoke("How?").tool_calls
        assert call["name"] == "Weather"
        Weather.model_validate(call["args"])
    assert chat.bind_tools([Weather]).invoke(QUESTION).tool_calls == []
    told = chat.bind_tools([Weather], tool_choice="Weather").invoke("How?")
    result = {"role": "tool", "tool_call_id": told.tool_calls[0]["id"], "content": "sunny"}
    assert chat.bind_tools([Weather]).invoke([("human", "How?"), told, result]).response_metadata["finish_reason"]
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(Weather, method=method).invoke("How?"), Weather)


def test_completions(server: ServerProcess) -> None:
    llm = langchain.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="text2sql", temperature=0, max_tokens=8, max_retries=0
    )
    assert llm.invoke("SELECT") == "".join(llm.stream("SELECT")) != ""
    answers = llm.generate(["SELECT", "CREATE"], n=2, best_of=3, temperature=1.0, seed=1).generations
    assert [len(answer) for answer in answers] == [2, 2]


def test_errors(chat: Any) -> None:
    with pytest.raises(Exception, match="temperature") as error:
        chat.bind(temperature=-1).invoke(QUESTION)
    assert type(error.value).__name__ in ("BadRequestError", "OpenAIBadRequestError", "OpenAIInvalidRequestError"), (
        error
    )
