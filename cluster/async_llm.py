"""Streams of generation in the caller's event loop: `async for output in AsyncLLM(model).generate(prompt)`."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from manta.cluster.doors.chat_format import check_messages, render_chat
from manta.cluster.doors.errors import RequestError, from_engine
from manta.cluster.doors.generation import Running
from manta.cluster.doors.no_tokenizer import NoTokenizer
from manta.cluster.doors.text import Tokenizer
from manta.cluster.doors.validate import Ask, Validator
from manta.cluster.engine.outputs import RequestOutput
from manta.cluster.engine.thread_client import ThreadClient
from manta.cluster.engine.types import EngineLostError
from manta.cluster.offline import OfflineEngine
from manta.cluster.offline_prompts import ADDS_SPECIAL_TOKENS, Prompt
from manta.cluster.places import Places
from manta.cluster.streamed_output import StreamedOutput
from manta.configs.sampling import SamplingParams


class AsyncLLM:
    """A model on this host's devices, for any number of streams at once in one event loop. The arguments are LLM's.

    The constructor returns when the model is loaded, which takes seconds; the engine then runs in a thread of its own.
    Use it in an `async with` block or await `shutdown`; it also ends with the interpreter. One event loop uses it at a
    time. Raises as OfflineEngine when it cannot start.
    """

    def __init__(self, model: str, *, skip_tokenizer_init: bool = False, **config: Any) -> None:
        """With `skip_tokenizer_init` prompts are token ids and texts stay empty."""
        self._client = ThreadClient()
        self._offline = OfflineEngine(model, skip_tokenizer_init, config, self._client.deliver)
        self._client.connect(self._offline.thread)
        self.config = self._offline.config
        self._tokenizer: Tokenizer = self._offline.tokenizer or NoTokenizer()
        self._validator = Validator(self._offline.limits, self._tokenizer, self._offline.seeds)
        self._numbers = itertools.count()
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running = Running(self._client, self._tokenizer)
        self._places = Places(self._offline.window)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.shutdown()

    @property
    def max_model_len(self) -> int:
        """Prompt plus output, in tokens."""
        return self._offline.limits.max_model_len

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer. Raises ValueError when there is none."""
        return self._offline.text_tokenizer().hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for, over our defaults."""
        return SamplingParams.model_validate(self._offline.limits.sampling_defaults)

    def metrics_text(self) -> bytes:
        """The engine's metrics in Prometheus' format."""
        return self._offline.thread.metrics_text()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields what there is of the completions of a prompt whenever there is more, as `output_kind` says.

        A prompt is one of those of `LLM.generate`. When the task that reads is cancelled, or leaves the loop, the
        request is aborted. Raises RequestError for what cannot run or fails, and harms no other request.
        """
        if self._is_closed:
            raise from_engine(EngineLostError("the engine was closed"))
        sampling = self.get_default_sampling_params() if sampling_params is None else sampling_params
        if sampling.stop and self._offline.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; skip_tokenizer_init=True leaves none", "stop")
        self._enter_loop()
        request_id = f"request-{next(self._numbers)}" if request_id is None else request_id
        ask = replace(_ask(prompt, sampling), priority=priority, cache_salt=cache_salt)
        resolved = await self._validator.resolve(ask, request_id)
        text = prompt if isinstance(prompt, str) else prompt.get("prompt") if isinstance(prompt, dict) else None
        decode = self._tokenizer.token_text if self._offline.tokenizer else None
        output = StreamedOutput(request_id, text, resolved, sampling.output_kind, decode)
        with self._running.call(request_id, resolved) as call:
            async with (
                self._places.taken(request_id, sampling.num_sequences),
                contextlib.aclosing(call.deltas()) as deltas,
            ):
                async for index, delta in deltas:
                    if (news := output.push(index, delta)) is not None:
                        yield news

    async def chat(
        self,
        messages: Sequence[dict[str, Any]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `generate`, of one conversation through the model's chat template, which also gets `tools`; calls of them
        stay in the text."""
        self._offline.text_tokenizer()
        text = render_chat(
            self._tokenizer,
            check_messages(list(messages)),
            add_generation_prompt,
            continue_final_message,
            chat_template_kwargs or {},
            tools,
        )
        # The template writes the special tokens itself.
        prompt = {"prompt": text, ADDS_SPECIAL_TOKENS: self._tokenizer.chat_template is None}
        stream = self.generate(prompt, sampling_params, request_id, priority=priority, cache_salt=cache_salt)
        async with contextlib.aclosing(stream) as outputs:
            async for output in outputs:
                yield output

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests, whose streams then end with the finish_reason "abort". Unknown ids are ignored."""
        if self._loop is None:
            return
        for each in [request_id] if isinstance(request_id, str) else request_id:
            if self._running.abort(each):
                self._places.let_through(each)

    async def shutdown(self, timeout_s: float = 0.0) -> None:
        """Takes no new requests, gives those that run so many seconds to end, aborts the rest, and ends the engine and
        the worker processes. May be called twice."""
        self._is_closed = True
        if self._loop is asyncio.get_running_loop():
            await self._running.drain(timeout_s)
            self._places.let_all_through()
        await asyncio.to_thread(self._offline.close)

    def _enter_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        if self._loop is not None and not self._loop.is_closed() and len(self._running):
            raise RuntimeError("this AsyncLLM has requests in another event loop; one loop uses it at a time")
        self._loop = loop
        self._client.use(loop)
        self._running = Running(self._client, self._tokenizer)
        self._places = Places(self._offline.window)


def _ask(prompt: Any, sampling: SamplingParams) -> Ask:
    """The validator's words for one prompt. Raises RequestError."""
    adds_special_tokens = True
    if isinstance(prompt, dict):
        adds_special_tokens = prompt.get(ADDS_SPECIAL_TOKENS, True)
        given = prompt.get("prompt_token_ids")
        prompt = prompt.get("prompt") if given is None else given
    if prompt is not None and not isinstance(prompt, str):
        listed = list(prompt)
        if any(isinstance(item, str) or hasattr(item, "__len__") for item in listed):
            raise RequestError("generate takes one prompt; start one for each of several", "prompt", "invalid_type")
        prompt = [int(token) for token in listed]
    return Ask(prompt, sampling, add_special_tokens=adds_special_tokens)
