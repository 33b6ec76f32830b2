"""POST /v1/chat/completions."""

import asyncio
from typing import Any

import orjson

from manta.cluster.doors import fields
from manta.cluster.doors.answer import AnswerPlan, AnswerReader, delta_body, message_body, plan_answer
from manta.cluster.doors.chat_format import check_messages, render_chat
from manta.cluster.doors.checks import check_bool, check_int, shown
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.exchange import Reply
from manta.cluster.doors.logprob_format import TokenNames, chat_logprobs, prompt_logprobs
from manta.cluster.doors.openai_call import (
    Completed,
    Options,
    collect_call,
    new_head,
    read_fields,
    read_options,
    read_request_id,
    stream_call,
)
from manta.cluster.doors.output import Delta
from manta.cluster.doors.response_format import apply_response_format
from manta.cluster.doors.service import Service
from manta.cluster.doors.text import Tokenizer
from manta.cluster.doors.tools.constraint import force_calls
from manta.cluster.doors.tools.request import ToolRequest, read_tools
from manta.cluster.doors.validate import Ask, Resolved
from manta.configs.sampling import MAX_LOGPROBS

THREAD_MESSAGES = 200  # more are rendered in a thread; a template takes some 20 to 50 us for each
_RESERVED_KWARGS = frozenset(
    {"add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "return_dict", "conversation"}
    | {"tools"}
)


class ChatCompletions:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: dict[str, Any], header_id: str, reply: Reply) -> None:
        service = self._service
        given = read_fields(service, body, fields.CHAT)
        options = read_options(given)
        wanted_id = read_request_id(given, header_id)
        service.validator.check_model(given.get("model"))
        ask, plan = await read_long_chat(service, given, _sampling(given))
        request_id = service.free_id("chatcmpl", wanted_id)
        resolved = await service.validator.resolve(ask, request_id)
        names = TokenNames(service.validator.tokenizer, options.tokens_as_ids)
        if options.stream:
            head = new_head(service, "chat.completion.chunk", request_id)
            form = _ChatEvents(resolved, options, names, plan)
            await stream_call(service, head, resolved, options, form, reply)
            return
        head = new_head(service, "chat.completion", request_id)
        completed, usage = await collect_call(service, request_id, resolved)
        choices = [_choice(index, one, options, names, plan) for index, one in enumerate(completed)]
        answer = head | {"choices": choices, "usage": usage.body()}
        if options.return_token_ids:
            answer["prompt_token_ids"] = resolved.prompts[0]
        if completed[0].prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(
                resolved.prompts[0], completed[0].prompt_logprobs, names.tokenizer, given["prompt_logprobs"]
            )
        await reply.json(answer)


async def read_long_chat(service: Service, given: dict[str, Any], sampling: dict[str, Any]) -> tuple[Ask, AnswerPlan]:
    """As `read_chat`, but other calls go on while the template is at work on many messages."""
    messages = given.get("messages")
    if isinstance(messages, list) and len(messages) > THREAD_MESSAGES:
        return await asyncio.to_thread(read_chat, service, given, sampling)
    return read_chat(service, given, sampling)


def read_chat(service: Service, given: dict[str, Any], sampling: dict[str, Any]) -> tuple[Ask, AnswerPlan]:
    """What a call of chat asks for, whichever door it comes through, and how its answers are read.

    `given` are the fields of the HTTP body that are set, `sampling` those of SamplingParams, with the constraint of a
    response_format. Raises RequestError.
    """
    _check_number(given.get("messages"), service.validator.limits.max_model_len)
    tools = read_tools(given)
    text, add_special_tokens = chat_prompt(service.validator.tokenizer, given, tools)
    tells_reasoning = check_bool(given.get("include_reasoning", True), "include_reasoning")
    plan = plan_answer(service.config, tools, tells_reasoning, text, _continued(given))
    force_calls(tools, sampling)
    ask = Ask(
        prompt=text,
        sampling=sampling,
        model=given.get("model"),
        priority=given.get("priority", 0),
        cache_salt=given.get("cache_salt", ""),
        add_special_tokens=add_special_tokens,
        fills_context=True,
        prompt_param="messages",
        visible_tokens=plan.visible_tokens,
    )
    return ask, plan


def _check_number(messages: Any, max_model_len: int) -> None:
    """Refuses what cannot fit before the template works on it: hardly a message takes less than a token."""
    if isinstance(messages, list) and len(messages) > 2 * max_model_len:
        message = f"{len(messages)} messages cannot fit this model's maximum context length of {max_model_len} tokens"
        raise RequestError(message, "messages", "context_length_exceeded")


def chat_prompt(tokenizer: Tokenizer, given: dict[str, Any], tools: ToolRequest) -> tuple[str, bool]:
    """The prompt text of checked fields, and whether the tokenizer adds its special tokens to it.

    A template writes them itself; the plain format leaves them to the tokenizer. Raises RequestError.
    """
    messages = check_messages(given.get("messages"))
    continues = check_bool(given.get("continue_final_message", False), "continue_final_message")
    adds_prompt = check_bool(given.get("add_generation_prompt", not continues), "add_generation_prompt")
    if continues and adds_prompt:
        message = "continue_final_message and add_generation_prompt exclude each other; set one of them to false"
        raise RequestError(message, "continue_final_message")
    kwargs = given.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        message = f"chat_template_kwargs must be an object, not {shown(kwargs)}"
        raise RequestError(message, "chat_template_kwargs", "invalid_type")
    for name in _RESERVED_KWARGS & kwargs.keys():
        message = f"chat_template_kwargs must not hold {name!r}"
        raise RequestError(message, f"chat_template_kwargs.{name}")
    # What must not be called need not be told of.
    shown_tools = tools.tools if tokenizer.takes_tools or tools.choice != "none" else None
    text = render_chat(tokenizer, messages, adds_prompt, continues, kwargs, shown_tools)
    adds_special = given.get("add_special_tokens", tokenizer.chat_template is None)
    return text, check_bool(adds_special, "add_special_tokens")


def _continued(given: dict[str, Any]) -> str | None:
    """The part of the answer that the (checked) messages hold."""
    if not given.get("continue_final_message", False):
        return None
    (last,) = check_messages(given["messages"][-1:])
    return str(last["content"])


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    sampling = {name: given[name] for name in fields.SAMPLING & given.keys()}
    apply_response_format(given, sampling)
    if "max_completion_tokens" in given:
        sampling["max_tokens"] = check_int(given["max_completion_tokens"], "max_completion_tokens", 1, 2**31 - 1)
    tells = check_bool(sampling.pop("logprobs", False), "logprobs")
    num_best = check_int(given.get("top_logprobs", 0), "top_logprobs", 0, MAX_LOGPROBS)
    if tells:
        sampling["logprobs"] = num_best
    elif num_best:
        raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
    return sampling


def _choice(index: int, one: Completed, options: Options, names: TokenNames, plan: AnswerPlan) -> dict[str, Any]:
    reader = plan.new_reader()
    choice = {
        "index": index,
        "message": message_body(reader.push(one.text, is_last=True)),
        "logprobs": None if one.logprobs is None else chat_logprobs(one.token_ids, one.logprobs, names),
        "finish_reason": reader.finish_reason(one.finish_reason),
        "stop_reason": one.stop_reason,
    }
    if options.return_token_ids:
        choice["token_ids"] = one.token_ids
    return choice


def _bodies(reader: AnswerReader | None, delta: Delta) -> list[bytes]:
    """The `delta` objects that tell what is new."""
    if reader is None:
        return [b'{"content":%b}' % orjson.dumps(delta.text)] if delta.text else []
    events = reader.push(delta.text, is_last=delta.finish_reason is not None)
    return [orjson.dumps(body) for event in events if (body := delta_body(event)) is not None]


class _ChatEvents:
    """First a chunk with `delta.role`, then what is new, at the end an empty delta with the finish_reason."""

    def __init__(self, resolved: Resolved, options: Options, names: TokenNames, plan: AnswerPlan) -> None:
        self._resolved = resolved
        self._options = options
        self._names = names
        self._new = set(range(len(resolved.requests)))
        self._readers = [plan.new_reader() if plan.reads_text else None for _ in resolved.requests]

    def choices(self, index: int, delta: Delta) -> list[bytes]:
        choices = []
        if index in self._new:
            self._new.discard(index)
            choices.append(self._first(index))
        token_ids = b""
        if self._options.return_token_ids:
            token_ids = b',"token_ids":' + orjson.dumps(delta.token_ids)
        logprobs = b"null"
        if delta.logprobs is not None:
            logprobs = orjson.dumps(chat_logprobs(delta.token_ids, delta.logprobs, self._names))
        reader = self._readers[index]
        bodies = _bodies(reader, delta)
        if not bodies and delta.token_ids and (token_ids or delta.logprobs is not None):
            bodies = [b'{"content":""}' if reader is None else b"{}"]
        for body in bodies:
            choices.append(
                b'"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null%b' % (index, body, logprobs, token_ids)
            )
            logprobs, token_ids = b"null", b""  # once
        if delta.finish_reason is not None:
            reason = delta.finish_reason if reader is None else reader.finish_reason(delta.finish_reason)
            reasons = {"finish_reason": reason, "stop_reason": delta.stop_reason}
            choices.append(b'"index":%d,"delta":{},"logprobs":null,%b' % (index, orjson.dumps(reasons)[1:-1]))
        return choices

    def _first(self, index: int) -> bytes:
        choice = b'"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null' % index
        if self._options.return_token_ids:
            choice += b',"prompt_token_ids":' + orjson.dumps(self._resolved.prompts[0])
        return choice
