"""Offline generation: `LLM(model).generate(prompts)` on worker processes of this host, without a server or Ray."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

from manta.cluster.doors.bad_words import tokenize_bad_words
from manta.cluster.doors.chat_format import check_messages, render_chat
from manta.cluster.doors.output import OutputText
from manta.cluster.embedding import Embedder, VectorJob, as_pairs, embedding_output, scores
from manta.cluster.engine.batch import Batch, Job
from manta.cluster.engine.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from manta.cluster.engine.types import (
    Beams,
    GenerationRequest,
    beams_of,
    resolve_sampling,
)
from manta.cluster.offline import OfflineEngine
from manta.cluster.offline_prompts import ADDS_SPECIAL_TOKENS, Params, Prompt, PromptReader, as_prompts, paired
from manta.configs.beam_search import BeamSearchParams
from manta.configs.pooling import PoolingParams
from manta.configs.sampling import SamplingParams

_SHORT_BATCH_S = 1.0  # no progress bar before so many seconds


class LLM:
    """A model on this host's devices. Keywords are the fields of ServeConfig, as the flags of `manta serve`.

    Use it in a `with` block or call `shutdown`; it also ends with the interpreter. Calls from several threads take
    turns. Raises as OfflineEngine when it cannot start.
    """

    def __init__(self, model: str, *, skip_tokenizer_init: bool = False, **config: Any) -> None:
        """With `skip_tokenizer_init` prompts are token ids and texts stay empty."""
        self._offline = OfflineEngine(model, skip_tokenizer_init, config)
        self.config = self._offline.config
        self._engine = self._offline.thread
        self._tokenizer = self._offline.tokenizer
        self._text_tokenizer = self._offline.text_tokenizer
        self._max_model_len = self._offline.limits.max_model_len
        self._prompts = PromptReader(self._offline)
        self._lock = threading.Lock()
        self._num_requests = 0
        self._num_handles = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Ends the engine and the worker processes. May be called twice."""
        self._offline.close()

    @property
    def max_model_len(self) -> int:
        """Prompt plus output, in tokens."""
        return self._max_model_len

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self._text_tokenizer().hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for, over our defaults."""
        return SamplingParams.model_validate(self._offline.limits.sampling_defaults)

    def metrics_text(self) -> bytes:
        """The engine's metrics in Prometheus' format."""
        return self._engine.metrics_text()

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: Params | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One output per prompt, in order.

        A prompt is a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}; beside a text
        "add_special_tokens" may be False. Prompts are tokenized, and taken from an iterator, as the engine has room.
        Raises ValueError for a prompt that cannot run (of a list before any runs), EngineError when the workers fail.
        """
        source = as_prompts(prompts)
        num_prompts = len(source) if isinstance(source, list) else None
        params = self._params_of(sampling_params, num_prompts)
        if isinstance(source, list):
            self._prompts.check(source, params)
        with self._lock:
            return self._run(source, params, num_prompts, use_tqdm)

    def beam_search(
        self, prompts: Prompt | Iterable[Prompt], params: BeamSearchParams, use_tqdm: bool = True
    ) -> list[BeamSearchOutput]:
        """For each prompt the `beam_width` best sequences, by the rules of transformers' `generate(num_beams=...)`.
        Raises as `generate`."""
        fields = params.model_dump(include={"temperature", "max_tokens", "min_tokens", "ignore_eos"})
        sampling = SamplingParams.model_validate(fields | {"seed": 0})
        beams = Beams(params.beam_width, params.length_penalty, params.early_stopping)
        groups = []
        for index, prompt in enumerate(as_prompts(prompts)):
            ids = self._prompts.output_of(prompt, index, sampling).prompt_token_ids
            request = GenerationRequest(self._next_request_id(), ids, sampling, beams=beams)
            groups.append([Job(request, place, None) for place in range(params.beam_width)])
        with self._lock, _progress(len(groups) * params.beam_width, "Beams", use_tqdm) as bar:
            self._run_jobs(iter(groups), lambda _: bar.update())
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
        texts = [
            render_chat(
                tokenizer,
                check_messages(list(conversation)),
                add_generation_prompt,
                continue_final_message,
                chat_template_kwargs or {},
                tools,
            )
            for conversation in conversations
        ]
        # The template writes the special tokens itself.
        adds_special_tokens = tokenizer.chat_template is None
        prompts = [{"prompt": text, ADDS_SPECIAL_TOKENS: adds_special_tokens} for text in texts]
        return self.generate(prompts, sampling_params, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True,
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per prompt, in order, as the model's pooling has it. Prompts are as those of `generate`;
        truncate_prompt_tokens keeps so many of their first tokens, -1 as many as fit. Raises as `generate`."""
        jobs = self._vectors(prompts, pooling_params, use_tqdm, truncate_prompt_tokens)
        return [embedding_output(job) for job in jobs]

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        use_tqdm: bool = True,
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoringRequestOutput]:
        """How alike each text_2 is to the text_1, or to its own one: the cosine of their vectors. Raises as `embed`."""
        first, second = as_pairs(text_1, text_2)
        return scores(self._vectors([*first, *second], None, use_tqdm, truncate_prompt_tokens), len(first))

    def _vectors(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: PoolingParams | Sequence[PoolingParams] | None,
        use_tqdm: bool,
        truncate: int | None,
    ) -> list[VectorJob]:
        num_prompts = len(prompts) if isinstance(prompts, list) else None
        embedder = Embedder(self._offline, self._run_jobs)
        with self._lock, _progress(num_prompts, "Prompts", use_tqdm) as bar:
            return embedder.embed(prompts, params, self._next_request_id, bar.update, truncate)

    def _params_of(self, sampling_params: Params | None, num_prompts: int | None) -> Params:
        if sampling_params is None:
            return self.get_default_sampling_params()
        if num_prompts is not None and isinstance(sampling_params, Sequence) and len(sampling_params) != num_prompts:
            raise ValueError(f"{len(sampling_params)} sampling_params for {num_prompts} prompts; give one, or one each")
        return sampling_params

    def _run(
        self,
        prompts: Iterable[Prompt],
        params: Params,
        num_prompts: int | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        open_prompts: dict[int, _OpenPrompt] = {}  # by id of the job
        decode = self._tokenizer.token_text if self._tokenizer else None

        def groups() -> Iterator[list[Job]]:
            for index, (prompt, sampling) in enumerate(paired(prompts, params)):
                output = self._prompts.output_of(prompt, index, sampling)
                jobs = self._jobs_of(output, sampling)
                outputs.append(output)
                opened = _OpenPrompt(output, sampling, len(jobs))
                open_prompts.update((id(job), opened) for job in jobs)
                # What follows a grammar waits until that is ready, each by itself.
                yield from ([job] for job in jobs) if sampling.structured_outputs else [jobs]

        with _progress(num_prompts, "Prompts", use_tqdm) as bar:

            def finish(job: Job) -> None:
                job.finish(decode)
                if open_prompts.pop(id(job)).take(job, decode):
                    bar.update()

            self._run_jobs(groups(), finish)
        return outputs

    def _run_jobs(self, groups: Iterator[list[Job]], on_finished: Callable[[Job], object]) -> None:
        batch = Batch(self._engine, groups, self._num_handles + 1, self._offline.window)
        try:
            batch.run(on_finished)
        finally:
            self._num_handles = batch.last_handle

    def _next_request_id(self) -> str:
        self._num_requests += 1
        return str(self._num_requests - 1)

    def _jobs_of(self, output: RequestOutput, sampling: SamplingParams) -> list[Job]:
        ids = output.prompt_token_ids
        output.request_id = self._next_request_id()
        jobs = []
        bad_words = tokenize_bad_words(sampling.bad_words, self._text_tokenizer()) if sampling.bad_words else ()
        for index, one in enumerate(
            resolve_sampling(sampling, len(ids), self._max_model_len, self._offline.seeds.getrandbits(63))
        ):
            text = OutputText(self._tokenizer, one, ids) if self._tokenizer else None
            if text is None and one.stop:
                raise ValueError("stop strings need a tokenizer; skip_tokenizer_init=True leaves none")
            request = GenerationRequest(output.request_id, ids, one, bad_words=bad_words, beams=beams_of(sampling))
            job = Job(request, index, text)
            output.outputs.append(job.output)
            jobs.append(job)
        return jobs


@dataclass(slots=True)
class _OpenPrompt:
    """A prompt of which some completions are still to come."""

    output: RequestOutput
    sampling: SamplingParams
    num_unfinished: int

    def take(self, job: Job, decode: Callable[[int], str] | None) -> bool:
        """Puts what the ended job tells of the prompt into its output. True when it was the last one."""
        output = self.output
        _merge_times(output, job)
        if job.prompt_records is not None and job.output.index == 0:
            places = job.prompt_records.by_token(output.prompt_token_ids[1:], decode)
            output.prompt_logprobs = [None, *places]
        self.num_unfinished -= 1
        if self.num_unfinished == 0 and self.sampling.num_sequences > self.sampling.n:
            output.outputs = _best_of(output.outputs, self.sampling)
        return self.num_unfinished == 0


def _best_of(outputs: list[CompletionOutput], sampling: SamplingParams) -> list[CompletionOutput]:
    """The n with the most probable tokens, best first."""
    outputs.sort(key=lambda output: output.cumulative_logprob or 0.0, reverse=True)
    for index, output in enumerate(outputs):
        output.index = index
        if sampling.logprobs is None:
            output.logprobs = output.cumulative_logprob = None
    return outputs[: sampling.n]


def _progress(total: int | None, what: str, use_tqdm: bool) -> Any:
    return tqdm(total=total, desc=what, delay=_SHORT_BATCH_S, disable=not use_tqdm)


def _merge_times(output: RequestOutput, job: Job) -> None:
    metrics = output.metrics
    if job.output.index == 0:
        metrics.arrival_time = job.arrival_time
        output.num_cached_tokens = job.num_cached_tokens
    first = [time for time in (metrics.first_token_time, job.first_token_time) if time is not None]
    metrics.first_token_time = min(first, default=None)
    metrics.finished_time = max(metrics.finished_time or 0.0, job.finished_time or 0.0)
