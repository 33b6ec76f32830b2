"""POST /v1/completions."""

from typing import Any

import orjson

from manta.cluster.doors import fields
from manta.cluster.doors.checks import check_bool
from manta.cluster.doors.exchange import Reply
from manta.cluster.doors.logprob_format import CompletionLogprobs, TokenNames, prompt_logprobs
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
from manta.cluster.doors.validate import Ask, Resolved
from manta.cluster.engine.logprobs import Records


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
            sampling=completion_sampling(given, echoes),
            model=given.get("model"),
            priority=given.get("priority", 0),
            cache_salt=given.get("cache_salt", ""),
            add_special_tokens=given.get("add_special_tokens", True),
            echoes=echoes,
        )
        request_id = service.free_id("cmpl", wanted_id)
        resolved = await service.validator.resolve(ask, request_id)
        head = new_head(service, "text_completion", request_id)
        prefixes = echoed_texts(service.validator.tokenizer, ask, resolved) if echoes else None
        names = TokenNames(service.validator.tokenizer, options.tokens_as_ids)
        form = _CompletionForm(resolved, options, prefixes, names)
        if options.stream:
            await stream_call(service, head, resolved, options, form, reply)
            return
        completed, usage = await collect_call(service, request_id, resolved)
        choices = [form.choice(index, one, given.get("prompt_logprobs")) for index, one in enumerate(completed)]
        await reply.json(head | {"choices": choices, "usage": usage.body()})


def echoed_texts(tokenizer: Tokenizer, ask: Ask, resolved: Resolved) -> list[str]:
    """The text of each prompt, as far as it was not cut off."""
    return [
        prompt
        if isinstance(prompt, str) and "truncate_prompt_tokens" not in ask.sampling
        else tokenizer.decode(token_ids, True)
        for prompt, token_ids in zip(resolved.sources, resolved.prompts, strict=True)
    ]


def completion_sampling(given: dict[str, Any], echoes: bool) -> dict[str, Any]:
    """The fields of SamplingParams that are set, unchecked. An echoed prompt comes with its log-probabilities where
    those of the output are asked for."""
    sampling = {name: given[name] for name in fields.SAMPLING & given.keys()}
    apply_response_format(given, sampling)
    num_logprobs, num_prompt_logprobs = sampling.get("logprobs"), sampling.get("prompt_logprobs", 0)
    if num_logprobs is False:  # as in chat: none
        del sampling["logprobs"]
    elif echoes and type(num_logprobs) is int and type(num_prompt_logprobs) is int:
        sampling["prompt_logprobs"] = max(num_logprobs, num_prompt_logprobs)
    return sampling


class _CompletionForm:
    """How completions are written: whole, and as chunks {"index", "text", "logprobs", "finish_reason", "stop_reason"},
    of which the last text comes with its reason. `prefixes`: the texts of the prompts, if they are echoed."""

    def __init__(self, resolved: Resolved, options: Options, prefixes: list[str] | None, names: TokenNames) -> None:
        self._resolved = resolved
        self._options = options
        self._prefixes = prefixes
        self._names = names
        self._num_logprobs = resolved.requests[0].sampling.logprobs
        self._new = set(range(len(resolved.requests)))
        self._prompt_logprobs: dict[int, Records] = {}  # by prompt; the first completion brings them

    def choice(self, index: int, one: Completed, num_prompt_logprobs: int | None) -> dict[str, Any]:
        """A whole completion; num_prompt_logprobs: as the client asked."""
        prompt = self._resolved.prompts[index // self._resolved.n]
        self._note_prompt(index, one)
        choice = {
            "index": index,
            "text": self._prefix(index) + one.text,
            "logprobs": self._logprobs(index, one, is_first=True),
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
        }
        if self._options.return_token_ids:
            choice |= {"prompt_token_ids": prompt, "token_ids": one.token_ids}
        records = self._prompt_logprobs.get(index // self._resolved.n)
        if num_prompt_logprobs is not None and records is not None:
            choice["prompt_logprobs"] = prompt_logprobs(prompt, records, self._names.tokenizer, num_prompt_logprobs)
        return choice

    def choices(self, index: int, delta: Delta) -> list[bytes]:
        is_first = index in self._new
        self._new.discard(index)
        self._note_prompt(index, delta)
        text = self._prefix(index) + delta.text if is_first else delta.text
        tells_tokens = self._options.return_token_ids or (delta.logprobs is not None and delta.token_ids)
        if not text and delta.finish_reason is None and not tells_tokens:
            return []
        reasons = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        end = b"," + orjson.dumps({"logprobs": self._logprobs(index, delta, is_first)} | reasons)[1:-1]
        if self._options.return_token_ids:
            end += b',"token_ids":' + orjson.dumps(delta.token_ids)
            if is_first:
                end += b',"prompt_token_ids":' + orjson.dumps(self._resolved.prompts[index // self._resolved.n])
        return [b'"index":%d,"text":%b%b' % (index, orjson.dumps(text), end)]

    def _note_prompt(self, index: int, new: Completed | Delta) -> None:
        if new.prompt_logprobs is not None:
            self._prompt_logprobs[index // self._resolved.n] = new.prompt_logprobs

    def _prefix(self, index: int) -> str:
        return self._prefixes[index // self._resolved.n] if self._prefixes is not None else ""

    def _logprobs(self, index: int, new: Completed | Delta, is_first: bool) -> dict[str, Any] | None:
        if self._num_logprobs is None:
            return None
        written = CompletionLogprobs(self._names, self._num_logprobs)
        records = self._prompt_logprobs.get(index // self._resolved.n)
        if is_first and self._prefixes is not None and records is not None:
            written.add_prompt(self._resolved.prompts[index // self._resolved.n], records)
        if new.logprobs is not None:
            written.add(new.token_ids, new.offsets, new.logprobs, len(self._prefix(index)))
        return written.lists
