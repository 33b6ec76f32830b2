"""POST /v1/completions."""

from typing import Any

import orjson

from manta.cluster.doors import fields
from manta.cluster.doors.exchange import Reply
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
from manta.cluster.doors.service import Service
from manta.cluster.doors.validate import Ask, Resolved, check_bool


class Completions:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: dict[str, Any], header_id: str, reply: Reply) -> None:
        service = self._service
        given = read_fields(service, body, fields.COMPLETION)
        options = read_options(given)
        wanted_id = read_request_id(given, header_id)
        echoes = check_bool(given.get("echo", False), "echo")
        ask = Ask(
            prompt=given.get("prompt"),
            sampling={name: given[name] for name in fields.SAMPLING & given.keys()},
            model=given.get("model"),
            priority=given.get("priority", 0),
            cache_salt=given.get("cache_salt", ""),
            truncate_prompt_tokens=given.get("truncate_prompt_tokens"),
            add_special_tokens=given.get("add_special_tokens", True),
        )
        request_id = service.free_id("cmpl", wanted_id)
        resolved = await service.validator.resolve(ask, request_id)
        head = new_head(service, "text_completion", request_id)
        prefixes = self._prefixes(ask, resolved) if echoes else [""] * len(resolved.prompts)
        if options.stream:
            form = _CompletionEvents(resolved, options, prefixes)
            await stream_call(service, head, resolved, options, form, reply)
            return
        completed, usage = await collect_call(service, request_id, resolved)
        choices = [
            _choice(index, one, prefixes[index // resolved.n], resolved, options) for index, one in enumerate(completed)
        ]
        await reply.json(head | {"choices": choices, "usage": usage.body()})

    def _prefixes(self, ask: Ask, resolved: Resolved) -> list[str]:
        """The text of each prompt, as far as it was not cut off."""
        decode = self._service.validator.tokenizer.decode
        return [
            prompt if isinstance(prompt, str) and ask.truncate_prompt_tokens is None else decode(token_ids, True)
            for prompt, token_ids in zip(resolved.sources, resolved.prompts, strict=True)
        ]


def _choice(index: int, one: Completed, prefix: str, resolved: Resolved, options: Options) -> dict[str, Any]:
    choice = {
        "index": index,
        "text": prefix + one.text,
        "logprobs": None,
        "finish_reason": one.finish_reason,
        "stop_reason": one.stop_reason,
    }
    if options.return_token_ids:
        choice |= {"prompt_token_ids": resolved.prompts[index // resolved.n], "token_ids": one.token_ids}
    return choice


class _CompletionEvents:
    """Chunks {"index", "text", "logprobs", "finish_reason", "stop_reason"}; the last text comes with its reason."""

    def __init__(self, resolved: Resolved, options: Options, prefixes: list[str]) -> None:
        self._resolved = resolved
        self._options = options
        self._prefixes = {index: prefixes[index // resolved.n] for index in range(len(resolved.requests))}

    def choices(self, index: int, delta: Delta) -> list[bytes]:
        is_first = index in self._prefixes
        text = self._prefixes.pop(index) + delta.text if is_first else delta.text
        if not text and delta.finish_reason is None and not self._options.return_token_ids:
            return []
        end = b',"logprobs":null,"finish_reason":null,"stop_reason":null'
        if delta.finish_reason is not None:
            reasons = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
            end = b',"logprobs":null,' + orjson.dumps(reasons)[1:-1]
        if self._options.return_token_ids:
            end += b',"token_ids":' + orjson.dumps(delta.token_ids)
            if is_first:
                end += b',"prompt_token_ids":' + orjson.dumps(self._resolved.prompts[index // self._resolved.n])
        return [b'"index":%d,"text":%b%b' % (index, orjson.dumps(text), end)]
