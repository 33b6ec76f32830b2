"""The one validator behind HTTP and gRPC: what a client asked for becomes engine requests, or one clear error."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from manta.cluster.doors.bad_words import tokenize_bad_words
from manta.cluster.doors.caller import current_tenant, with_callers_salt
from manta.cluster.doors.checks import INT32, Prompt, check_bool, check_int, check_prompts, check_salt, shown
from manta.cluster.doors.errors import Kind, RequestError
from manta.cluster.doors.grammar_check import GrammarChecker
from manta.cluster.doors.limits import ModelLimits
from manta.cluster.doors.text import Tokenizer
from manta.cluster.engine.client import (
    GenerationRequest,
    beams_of,
    num_prompt_tokens_kept,
    resolve_sampling,
)
from manta.configs.model import NO_LM_HEAD
from manta.configs.sampling import SamplingParams

DEFAULT_MAX_TOKENS = 16  # of completions, as in the OpenAI API
MAX_SEQUENCES = 2048  # in one call: prompts times n
MAX_STOP_CHARACTERS = 1024  # of one stop string
MAX_CUT_CHARACTERS = 2**21  # of a text that is truncated: it takes about two seconds of a thread
THREAD_CHARACTERS = 8192  # longer texts are tokenized in a thread; shorter ones take about a millisecond


@dataclass(slots=True)
class Ask:
    """What a client asked for, in the words of neither door. Values are as the client sent them, unchecked."""

    prompt: Any  # a text, token ids, or a list of either
    sampling: Mapping[str, Any] | SamplingParams  # only the fields that the client set; or all, from the own program
    model: Any = None
    priority: Any = 0
    cache_salt: Any = ""
    tenant: str = field(default_factory=current_tenant)
    add_special_tokens: Any = True
    fills_context: bool = False  # without max_tokens: up to the context length (chat), not 16 tokens (completions)
    prompt_param: str = "prompt"  # the field that errors about the prompt name
    echoes: bool = False  # the prompt is part of the answer: max_tokens may be 0
    visible_tokens: frozenset[str] = frozenset()  # special tokens that the text shows in any case


@dataclass(frozen=True, slots=True)
class Resolved:
    """A call that will run: completion j of prompt i is request i * n + j."""

    sources: list[Prompt]  # the prompts as they were given
    prompts: list[list[int]]  # their token ids
    n: int
    is_prompt_only: bool = False  # the one token that each request generates is left out
    visible_tokens: frozenset[str] = frozenset()  # special tokens that the text shows in any case
    requests: list[GenerationRequest] = field(default_factory=list)
    # By prompt, where more are generated than told: the n with the most probable tokens become the completions.
    candidates: list[list[GenerationRequest]] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        """Every prompt counted once, however many completions it gets."""
        return sum(map(len, self.prompts))


class Validator:
    """Checks against the limits of one model. `seeds` draws the seeds of requests that have none. Without `grammars` it
    is left to the engine whether one can be compiled."""

    def __init__(
        self,
        limits: ModelLimits,
        tokenizer: Tokenizer,
        seeds: random.Random,
        grammars: GrammarChecker | None = None,
    ) -> None:
        self.limits = limits
        self.tokenizer = tokenizer
        self._seeds = seeds
        self._grammars = grammars

    async def resolve(self, ask: Ask, request_id: str) -> Resolved:
        """Raises RequestError naming the field at fault. Long texts are tokenized in a thread."""
        self.check_model(ask.model)
        if not self.limits.has_lm_head:
            raise RequestError(NO_LM_HEAD, "model", "unsupported_model")
        raw = {} if isinstance(ask.sampling, SamplingParams) else dict(ask.sampling)
        is_prompt_only = ask.echoes and type(raw.get("max_tokens")) is int and raw["max_tokens"] == 0
        if is_prompt_only:
            raw["max_tokens"] = 1
        if isinstance(ask.sampling, SamplingParams):
            sampling = self._within_limits(ask.sampling)
        else:
            sampling = self.check_sampling(raw, ask.fills_context)
        priority = check_int(ask.priority, "priority", -INT32, INT32 - 1)
        salt = with_callers_salt(check_salt(ask.cache_salt))
        sources = check_prompts(ask.prompt, ask.prompt_param)
        if len(sources) * sampling.num_sequences > MAX_SEQUENCES:
            message = (
                f"{len(sources)} prompts with n={sampling.num_sequences} are more than {MAX_SEQUENCES} completions"
            )
            raise RequestError(message, "n")
        keep = self._num_tokens_kept(sampling)
        prompts = await self._encode_all(sources, keep, ask)
        if self._grammars is not None:
            await self._grammars.check(sampling.structured_outputs)
        resolved = Resolved(sources, prompts, sampling.n, is_prompt_only, ask.visible_tokens)
        bad_words = tokenize_bad_words(sampling.bad_words, self.tokenizer)
        for token_ids in prompts:
            fitted = self._fit_context(sampling, len(token_ids), "max_tokens" in raw, ask)
            seed = self._seeds.getrandbits(63)
            candidates: list[GenerationRequest] = []
            for one in resolve_sampling(fitted, len(token_ids), self.limits.max_model_len, seed):
                name = request_id
                if len(prompts) * sampling.n > 1:
                    name = f"{request_id}-{len(resolved.requests) + len(candidates)}"
                request = GenerationRequest(name, token_ids, one, priority, ask.tenant, salt, bad_words=bad_words)
                candidates.append(replace(request, beams=beams_of(sampling)))
            if len(candidates) > sampling.n:
                resolved.candidates.append(candidates)
                told = [one.sampling.model_copy(update={"logprobs": sampling.logprobs}) for one in candidates]
                candidates = [replace(one, sampling=as_told) for one, as_told in zip(candidates, told, strict=True)]
            resolved.requests.extend(candidates[: sampling.n])
        return resolved

    def check_model(self, model: Any) -> None:
        """No name means the served model."""
        if model is None or model == "":
            return
        if not isinstance(model, str):
            raise RequestError("model must be a string", "model", "invalid_type")
        if model != self.limits.model_name:
            message = f"The model {model!r} does not exist; this server serves {self.limits.model_name!r}"
            raise RequestError(message, "model", "model_not_found", Kind.NOT_FOUND)

    def check_sampling(self, raw: Mapping[str, Any], fills_context: bool) -> SamplingParams:
        """Fields not in `raw` take the model's defaults. max_tokens None: up to the context length."""
        values: dict[str, Any] = {"max_tokens": None if fills_context else DEFAULT_MAX_TOKENS}
        if not fills_context:
            values |= {name: value for name, value in self.limits.sampling_defaults.items() if name != "max_tokens"}
        else:
            values |= self.limits.sampling_defaults
        if raw.get("use_beam_search") is True:  # what the model's authors advise is for drawing tokens
            values = {"max_tokens": values.get("max_tokens")}
        values |= raw
        try:
            sampling = SamplingParams.model_validate(values, strict=True)  # "1" and true are no numbers
        except ValidationError as error:
            raise _sampling_error(error)
        return self._within_limits(sampling)

    def _within_limits(self, sampling: SamplingParams) -> SamplingParams:
        for text in sampling.stop:
            if len(text) > MAX_STOP_CHARACTERS:
                message = f"stop: a stop string has {len(text)} characters; at most {MAX_STOP_CHARACTERS} are possible"
                raise RequestError(message, "stop")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._check_vocabulary(getattr(sampling, name), name)
        return sampling

    async def encode(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        """Token ids of `text`, cut to `most`; a long text leaves the event loop free for the streams of others."""
        encode = self.tokenizer.encode if most is None else partial(self.tokenizer.encode, most=most)
        if len(text) < THREAD_CHARACTERS:
            return encode(text, add_special_tokens)
        return await asyncio.to_thread(encode, text, add_special_tokens)

    def check_tokens(self, token_ids: Any, param: str) -> list[int]:
        """A list of token ids of the model."""
        if not isinstance(token_ids, list) or not all(type(token) is int for token in token_ids):
            raise RequestError(f"{param} must be a list of token ids", param, "invalid_type")
        self._check_vocabulary(token_ids, param)
        return token_ids

    def _check_vocabulary(self, token_ids: Any, param: str) -> None:
        if not token_ids:
            return
        low, high = min(token_ids), max(token_ids)  # of a dict: its keys
        if low < 0 or high >= self.limits.vocab_size:
            message = (
                f"{param}: token id {low if low < 0 else high} is outside the vocabulary; "
                f"ids go from 0 to {self.limits.vocab_size - 1}"
            )
            raise RequestError(message, param)

    def _num_tokens_kept(self, sampling: SamplingParams) -> int | None:
        keep, limit = num_prompt_tokens_kept(sampling, self.limits.max_model_len), self.limits.max_model_len
        if keep is not None and keep > limit:
            name = "truncate_prompt_tokens"
            raise RequestError(f"{name} must be -1 (what fits) or 1 to {limit}, not {keep}", name)
        return keep

    async def _encode_all(self, sources: list[Prompt], keep: int | None, ask: Ask) -> list[list[int]]:
        add_special_tokens = check_bool(ask.add_special_tokens, "add_special_tokens")
        prompts: list[list[int]] = []
        for prompt in sources:
            if prompts:
                await asyncio.sleep(0)  # between the prompts of a large call the streams of others go on
            if isinstance(prompt, str):
                self.check_characters(prompt, keep, ask.prompt_param)
                token_ids = await self.encode(prompt, add_special_tokens)
            else:
                token_ids = self.check_tokens(prompt, ask.prompt_param)
            if keep is not None:
                token_ids = token_ids[-keep:]
            if not token_ids:
                raise RequestError(f"{ask.prompt_param} must not be empty", ask.prompt_param)
            prompts.append(token_ids)
        return prompts

    def check_characters(self, text: str, keep: int | None, param: str) -> None:
        """Refuses what cannot fit even if every token were the longest, before the tokenizer works on it; and what is
        too long to be tokenized only to be cut."""
        limit = self.limits.max_model_len
        if keep is not None and len(text) > max(MAX_CUT_CHARACTERS, keep * self.tokenizer.max_token_characters):
            message = f"{param} has {len(text)} characters; at most {MAX_CUT_CHARACTERS} are tokenized to be truncated"
            raise RequestError(message, param, "context_length_exceeded")
        if keep is None and len(text) > limit * self.tokenizer.max_token_characters:
            message = (
                f"This model's maximum context length is {limit} tokens. However, your prompt has {len(text)} "
                f"characters, which no {limit} tokens can hold. Please shorten it or set truncate_prompt_tokens."
            )
            raise RequestError(message, param, "context_length_exceeded")

    def _fit_context(self, sampling: SamplingParams, num_tokens: int, is_explicit: bool, ask: Ask) -> SamplingParams:
        limit = self.limits.max_model_len
        rest = limit - num_tokens
        wanted = sampling.max_tokens if is_explicit and sampling.max_tokens is not None else 1
        if wanted > rest:
            message = (
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{num_tokens + wanted} tokens ({num_tokens} in the {ask.prompt_param}, {wanted} in the completion). "
                f"Please reduce the length of the {ask.prompt_param} or of the completion."
            )
            param = ask.prompt_param if rest < 1 else "max_tokens"
            raise RequestError(message, param, "context_length_exceeded")
        max_tokens = min(sampling.max_tokens or rest, rest)
        if sampling.min_tokens > max_tokens:
            message = f"min_tokens={sampling.min_tokens} must not exceed the {max_tokens} tokens that fit the context"
            raise RequestError(message, "min_tokens")
        return sampling.model_copy(update={"max_tokens": max_tokens})


def _sampling_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # a rule over several fields, whose message begins with the field's name
        return RequestError(message, message.split("=")[0].split(" ")[0])
    param = str(first["loc"][0])
    if message.startswith((f"{param}.", f"{param} ")):  # it names the part of the field itself
        return RequestError(message, message.split(" ")[0])
    code = "invalid_type" if "type" in first["type"] or first["type"].endswith("parsing") else "invalid_value"
    return RequestError(f"{param}: {message}, not {shown(first['input'])}", param, code)
