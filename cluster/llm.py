"""Offline generation: `LLM(model).generate(prompts)` on worker processes of this host, without a server or Ray."""

import random
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

from manta.cluster import preflight
from manta.cluster.doors.bad_words import tokenize_bad_words
from manta.cluster.doors.chat_format import check_messages, render_chat
from manta.cluster.doors.limits import read_limits
from manta.cluster.doors.output import OutputText
from manta.cluster.doors.text import Tokenizer, load_tokenizer
from manta.cluster.engine.batch import Batch, Job
from manta.cluster.engine.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
)
from manta.cluster.engine.thread import EngineThread
from manta.cluster.engine.types import (
    Beams,
    GenerationRequest,
    beams_of,
    num_prompt_tokens_kept,
    resolve_sampling,
)
from manta.cluster.launch.local import LocalLauncher, local_gpus
from manta.configs.beam_search import BeamSearchParams
from manta.configs.sampling import SamplingParams
from manta.configs.schema import ServeConfig

Prompt = str | Sequence[int] | dict[str, Any]
_SHORT_BATCH_S = 1.0  # no progress bar before so many seconds
_WINDOW_FACTOR = 4  # requests kept in the engine, per sequence that can run at once
_WORKER_GRACE_S = 1.0


class LLM:
    """A model on this host's devices. Keywords are the fields of ServeConfig, as the flags of `manta serve`.

    Use it in a `with` block or call `shutdown`; it also ends with the interpreter. Calls from several threads take
    turns. Raises pydantic.ValidationError, PreflightError, LaunchError, WorkerError, BringUpError or TokenizerError
    when it cannot start; the message says what to change.
    """

    def __init__(self, model: str, *, skip_tokenizer_init: bool = False, **config: Any) -> None:
        """With `skip_tokenizer_init` prompts are token ids and texts stay empty."""
        config.setdefault("distributed_executor_backend", "local")
        self.config = preflight.with_absolute_paths(ServeConfig.model_validate({"model": model} | config))
        if self.config.distributed_executor_backend != "local":
            raise ValueError(
                "LLM runs on this host: distributed_executor_backend must be 'local'; serve with Ray instead"
            )
        spec = preflight.check(self.config, on_gpu=self.config.device != "cpu" and bool(local_gpus()), ports=False).spec
        launcher = LocalLauncher()
        stop_workers = weakref.finalize(self, launcher.stop, _WORKER_GRACE_S)
        self._close: Callable[[], object] = stop_workers
        try:
            with ThreadPoolExecutor(1) as executor:  # importing transformers takes as long as starting workers
                tokenizer = None if skip_tokenizer_init else executor.submit(load_tokenizer, self.config)
                self._engine = EngineThread(self.config, spec, launcher.start_workers(self.config))
                self._close = weakref.finalize(self, _close, self._engine, launcher)
                stop_workers.detach()
                self._tokenizer = tokenizer.result() if tokenizer else None
            limits = read_limits(self.config, self._engine.info.max_model_len)
        except BaseException:
            self.shutdown()
            raise
        self._max_model_len = limits.max_model_len
        self._sampling_defaults = limits.sampling_defaults
        self._seeds = random.Random(self.config.seed)
        self._lock = threading.Lock()
        self._num_requests = 0
        self._num_handles = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Ends the engine and the worker processes. May be called twice."""
        self._close()

    @property
    def max_model_len(self) -> int:
        """Prompt plus output, in tokens."""
        return self._max_model_len

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self._text_tokenizer().hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for, over our defaults."""
        return SamplingParams.model_validate(self._sampling_defaults)

    def metrics_text(self) -> bytes:
        """The engine's metrics in Prometheus' format."""
        return self._engine.metrics_text()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One output per prompt, in order.

        A prompt is a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}. Raises ValueError for
        a prompt that cannot run, EngineError when the workers fail.
        """
        listed = _as_list(prompts)
        params = self._params_of(sampling_params, len(listed))
        outputs = [
            self._output_of(prompt, index, sampling)
            for index, (prompt, sampling) in enumerate(zip(listed, params, strict=True))
        ]
        with self._lock:
            self._run(outputs, params, use_tqdm)
        return outputs

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = True
    ) -> list[BeamSearchOutput]:
        """For each prompt the `beam_width` best sequences, by the rules of transformers' `generate(num_beams=...)`.
        Raises as `generate`."""
        fields = params.model_dump(include={"temperature", "max_tokens", "min_tokens", "ignore_eos"})
        sampling = SamplingParams.model_validate(fields | {"seed": 0})
        beams = Beams(params.beam_width, params.length_penalty, params.early_stopping)
        groups = []
        for index, prompt in enumerate(_as_list(prompts)):
            ids = self._output_of(prompt, index, sampling).prompt_token_ids
            request = GenerationRequest(self._next_request_id(), ids, sampling, beams=beams)
            groups.append([Job(request, place, None) for place in range(params.beam_width)])
        with self._lock:
            self._run_jobs(groups, "Beams", use_tqdm)
        return [BeamSearchOutput([self._sequence_of(job, params) for job in group]) for group in groups]

    def _sequence_of(self, job: Job, params: BeamSearchParams) -> BeamSearchSequence:
        output, cum_logprob = job.output, job.output.cumulative_logprob
        assert cum_logprob is not None, "the engine tells it of every hypothesis"
        score: float = cum_logprob / len(output.token_ids) ** params.length_penalty
        kept = output.token_ids
        if output.finish_reason == "stop" and not params.include_stop_str_in_output:
            kept = kept[:-1]
        tokens = [int(token) for token in job.request.prompt_token_ids] + kept
        text = self._tokenizer.decode(tokens, True) if self._tokenizer else None
        return BeamSearchSequence(tokens, cum_logprob, score, text, output.finish_reason)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """One conversation or a list of them, through the model's chat template, which also gets `tools`; calls of them
        stay in the text. Raises as `generate`, and RequestError for messages that do not fit the template."""
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        tokenizer = self._text_tokenizer()
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = render_chat(
                tokenizer,
                check_messages(list(conversation)),
                add_generation_prompt,
                continue_final_message,
                chat_template_kwargs or {},
                tools,
            )
            # The template writes the special tokens itself.
            ids = tokenizer.encode(text, add_special_tokens=tokenizer.chat_template is None)
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm)

    def _params_of(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * num_prompts
        if len(sampling_params) != num_prompts:
            raise ValueError(f"{len(sampling_params)} sampling_params for {num_prompts} prompts; give one, or one each")
        return list(sampling_params)

    def _output_of(self, prompt: Prompt, index: int, sampling: SamplingParams) -> RequestOutput:
        """An output without completions yet; checks the prompt."""
        text: str | None = None
        if isinstance(prompt, dict):
            text = prompt.get("prompt")
            ids = prompt.get("prompt_token_ids")
            if ids is None and text is None:
                raise ValueError(f"prompt {index} is a dict with neither 'prompt' nor 'prompt_token_ids'")
        else:
            text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        ids = self._text_tokenizer().encode(str(text)) if ids is None else [int(token) for token in ids]
        keep = num_prompt_tokens_kept(sampling, self._max_model_len)
        ids = ids if keep is None else ids[-keep:]
        if not ids:
            raise ValueError(f"prompt {index} has no tokens")
        if len(ids) >= self._max_model_len:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens; with max_model_len={self._max_model_len} at most "
                f"{self._max_model_len - 1} leave room for an output"
            )
        return RequestOutput("", text, ids, [], RequestMetrics(0.0))

    def _run(self, outputs: list[RequestOutput], params: list[SamplingParams], use_tqdm: bool) -> None:
        groups: list[list[Job]] = []
        owners: dict[int, RequestOutput] = {}
        for output, sampling in zip(outputs, params, strict=True):
            jobs = self._jobs_of(output, sampling)
            owners |= {id(job): output for job in jobs}
            # What follows a grammar waits until that is ready, each by itself.
            groups += [[job] for job in jobs] if sampling.structured_outputs else [jobs]
        self._run_jobs(groups, "Completions", use_tqdm)
        jobs = [job for group in groups for job in group]
        decode = self._tokenizer.token_text if self._tokenizer else None
        for job in jobs:
            job.finish(decode)
            _merge_times(owners[id(job)], job)
            if job.prompt_records is not None and job.output.index == 0:
                output = owners[id(job)]
                places = job.prompt_records.by_token(output.prompt_token_ids[1:], decode)
                output.prompt_logprobs = [None, *places]
        for output, sampling in zip(outputs, params, strict=True):
            if sampling.num_sequences > sampling.n:
                output.outputs = _best_of(output.outputs, sampling)

    def _run_jobs(self, groups: list[list[Job]], what: str, use_tqdm: bool) -> None:
        num_jobs = sum(map(len, groups))
        window = _WINDOW_FACTOR * self.config.max_num_seqs * self.config.data_parallel_size
        batch = Batch(self._engine, groups, self._num_handles + 1, min(window, self.config.max_num_queued_reqs))
        self._num_handles += num_jobs
        with tqdm(total=num_jobs, desc=what, delay=_SHORT_BATCH_S, disable=not use_tqdm) as bar:
            batch.run(on_finished=lambda _: bar.update())

    def _next_request_id(self) -> str:
        self._num_requests += 1
        return str(self._num_requests - 1)

    def _jobs_of(self, output: RequestOutput, sampling: SamplingParams) -> list[Job]:
        ids = output.prompt_token_ids
        output.request_id = self._next_request_id()
        jobs = []
        bad_words = tokenize_bad_words(sampling.bad_words, self._text_tokenizer()) if sampling.bad_words else ()
        for index, one in enumerate(
            resolve_sampling(sampling, len(ids), self._max_model_len, self._seeds.getrandbits(63))
        ):
            text = OutputText(self._tokenizer, one, ids) if self._tokenizer else None
            if text is None and one.stop:
                raise ValueError("stop strings need a tokenizer; skip_tokenizer_init=True leaves none")
            request = GenerationRequest(output.request_id, ids, one, bad_words=bad_words, beams=beams_of(sampling))
            job = Job(request, index, text)
            output.outputs.append(job.output)
            jobs.append(job)
        return jobs

    def _text_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError("texts need a tokenizer; skip_tokenizer_init=True leaves only token ids")
        return self._tokenizer


def _close(engine: EngineThread, launcher: LocalLauncher) -> None:
    """The engine first: it would take ending workers for failing ones."""
    try:
        engine.close()
    finally:
        launcher.stop(_WORKER_GRACE_S)


def _best_of(outputs: list[CompletionOutput], sampling: SamplingParams) -> list[CompletionOutput]:
    """The n with the most probable tokens, best first."""
    outputs.sort(key=lambda output: output.cumulative_logprob or 0.0, reverse=True)
    for index, output in enumerate(outputs):
        output.index = index
        if sampling.logprobs is None:
            output.logprobs = output.cumulative_logprob = None
    return outputs[: sampling.n]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt is a batch of one; a list of integers is a single prompt."""
    if isinstance(prompts, str | dict):
        return [prompts]
    listed: list[Any] = list(prompts)
    if listed and not isinstance(listed[0], str | dict | Sequence) and not hasattr(listed[0], "__len__"):
        return [listed]
    return listed


def _merge_times(output: RequestOutput, job: Job) -> None:
    metrics = output.metrics
    if job.output.index == 0:
        metrics.arrival_time = job.arrival_time
        output.num_cached_tokens = job.num_cached_tokens
    first = [time for time in (metrics.first_token_time, job.first_token_time) if time is not None]
    metrics.first_token_time = min(first, default=None)
    metrics.finished_time = max(metrics.finished_time or 0.0, job.finished_time or 0.0)
