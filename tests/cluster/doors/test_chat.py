"""Chat bodies: how messages become a prompt, and which are refused."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient
from tests.support.small_tokenizers import write_model_folder


def chat(http: httpx.Client, messages: Any, **fields: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2, **fields})


def test_chat_prompts(http: httpx.Client, doors: DoorThread) -> None:
    def prompt_of(messages: Any, **fields: Any) -> str:
        assert chat(http, messages, **fields).status_code == 200
        ids = doors.client.submitted[-1].prompt_token_ids
        return doors.service.validator.tokenizer.decode(list(ids))

    user = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert prompt_of([user]) == "<|user|>a\nb\n<|assistant|>"
    assert prompt_of([user], chat_template_kwargs={"mood": "sad"}) == "<|user|>a\nb\n[sad]<|assistant|>"
    assert prompt_of([user], add_generation_prompt=False) == "<|user|>a\nb\n"
    partial = {"role": "assistant", "content": "so far"}
    assert prompt_of([user, partial], continue_final_message=True) == "<|user|>a\nb\n<|assistant|>so far"


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        (None, {}, "messages"),
        ([], {}, "messages"),
        ("hi", {}, "messages"),
        (["hi"], {}, "messages[0]"),
        ([{"content": "hi"}], {}, "messages[0].role"),
        ([{"role": "user"}], {}, "messages[0].content"),
        ([{"role": "user", "content": 5}], {}, "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "messages[0].content[0]"),
        ([{"role": "tool", "content": "x"}], {}, "messages"),  # the template raises
        ([{"role": "user", "content": "x", "extra": json.loads("[" * 900 + "]" * 900)}], {}, "messages"),
        ([{"role": "user", "content": "x"}], {"chat_template_kwargs": 5}, "chat_template_kwargs"),
        (
            [{"role": "user", "content": "x"}],
            {"chat_template_kwargs": {"tokenize": 1}},
            "chat_template_kwargs.tokenize",
        ),
        ([{"role": "user", "content": "x"}], {"tools": [{"type": "function"}]}, "tools[0]"),
        ([{"role": "user", "content": "x"}], {"response_format": {"type": "xml"}}, "response_format.type"),
        ([{"role": "user", "content": "x"}], {"max_completion_tokens": "5"}, "max_completion_tokens"),
        ([{"role": "user", "content": "x"}], {"stream": 1}, "stream"),
        ([{"role": "user", "content": "x " * 500}], {}, "messages"),
        (
            [{"role": "user", "content": "x"}],
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
def test_bad_chats(http: httpx.Client, messages: Any, fields: dict[str, Any], param: str) -> None:
    response = chat(http, messages, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_harmless_fields_are_accepted(http: httpx.Client) -> None:
    fields = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
        "logprobs": False, "top_logprobs": None, "tools": None, "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logit_bias": None, "best_of": 1, "stream_options": None, "temperature": None,
    }  # fmt: skip
    response = chat(http, [{"role": "user", "content": "x"}], **fields)
    assert response.status_code == 200, response.text


def test_model_without_a_template_gets_the_plain_format(tmp_path: Path) -> None:
    engine = FakeClient()
    with DoorThread(engine, write_model_folder(tmp_path, chat_template=None)) as doors:
        http = httpx.Client(base_url=doors.base_url)
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
        assert chat(http, messages).status_code == 200
        tokenizer = doors.service.validator.tokenizer
        prompt = tokenizer.decode(list(engine.submitted[-1].prompt_token_ids))
        assert prompt == "system: Be kind.\nuser: hi\nassistant:"


def test_template_and_defaults_of_the_deployment(tmp_path: Path) -> None:
    engine = FakeClient()
    folder = write_model_folder(tmp_path, temperature=0.25, top_k=7, max_new_tokens=9)
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    with DoorThread(engine, folder, chat_template=str(template)) as doors:
        http = httpx.Client(base_url=doors.base_url)
        assert http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]}).is_success
        request = engine.submitted[-1]
        assert doors.service.validator.tokenizer.decode(list(request.prompt_token_ids)) == "hi!"
        assert (request.sampling.temperature, request.sampling.top_k, request.sampling.max_tokens) == (0.25, 7, 9)
        http.post("/v1/completions", json={"prompt": "x", "temperature": 1.5})
        sampling = engine.submitted[-1].sampling
        assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (1.5, 7, 16)
