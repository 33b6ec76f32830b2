"""Vectors of prompts, and how alike texts are, on an offline engine: what `LLM.embed` and `LLM.score` do."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manta.cluster.engine.batch import Job
from manta.cluster.engine.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    cosine,
)
from manta.cluster.engine.types import UNSAMPLED, GenerationRequest, TokenChunk
from manta.cluster.offline import OfflineEngine
from manta.cluster.offline_prompts import ADDS_SPECIAL_TOKENS, SPECIAL_TOKENS, Prompt, as_prompts
from manta.configs.pooling import Pooling, PoolingParams

RunJobs = Callable[[Iterator[list[Job]], Callable[[Job], object]], None]


class VectorJob(Job):
    """One prompt of a batch and its vector."""

    def __init__(self, request: GenerationRequest) -> None:
        super().__init__(request, 0, None)
        self.vector: NDArray[np.float32] = np.empty(0, np.float32)

    def push(self, chunk: TokenChunk) -> bool:
        if chunk.finish_reason is not None:
            self.vector = np.frombuffer(chunk.vector, "<f4")
        return super().push(chunk)


class Embedder:
    """Knows the tokenizer, the context and the pooling of one engine; `run_jobs` brings jobs through it."""

    def __init__(self, offline: OfflineEngine, run_jobs: RunJobs) -> None:
        self._offline = offline
        self._run_jobs = run_jobs

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: PoolingParams | Sequence[PoolingParams] | None,
        next_id: Callable[[], str],
        on_finished: Callable[[], object],
        truncate: int | None = None,
    ) -> list[VectorJob]:
        """A job per prompt, in order, each with its vector. A wrong prompt of a list is found before any runs.

        truncate: how many tokens of a prompt are kept, the first ones; -1: as many as fit. Raises ValueError naming the
        prompt's index, EngineError.
        """
        source = as_prompts(prompts)
        if isinstance(params, Sequence) and isinstance(source, list) and len(params) != len(source):
            raise ValueError(f"{len(params)} pooling_params for {len(source)} prompts; give one, or one each")
        keep = self._offline.limits.max_model_len if truncate == -1 else truncate
        if keep is not None and keep < 1:
            raise ValueError(f"truncate_prompt_tokens must be -1 (what fits) or at least 1, not {truncate}")
        each = repeat(params or PoolingParams()) if not isinstance(params, Sequence) else params
        jobs: list[VectorJob] = []

        resolve = self._offline.limits.pooling.resolve

        def groups() -> Iterator[list[Job]]:
            for index, (prompt, one) in enumerate(zip(source, each, strict=False)):
                jobs.append(self._job(prompt, index, resolve(one), keep, next_id()))
                yield [jobs[-1]]

        if isinstance(source, list):
            for index, (prompt, one) in enumerate(zip(source, each, strict=False)):
                pooling = resolve(one)
                if not self._surely_fits(prompt, keep):
                    self._job(prompt, index, pooling, keep, "")
        self._run_jobs(groups(), lambda _: on_finished())
        return jobs

    def _surely_fits(self, prompt: Prompt, keep: int | None) -> bool:
        """Texts too short to be too long, which most are, need no tokenizer for that: a byte is a token at most."""
        if not isinstance(prompt, str) or not prompt or self._offline.tokenizer is None:
            return False
        return keep is None and 4 * len(prompt) + SPECIAL_TOKENS <= self._offline.limits.max_model_len

    def _job(self, prompt: Prompt, index: int, pooling: Pooling, keep: int | None, request_id: str) -> VectorJob:
        text: Any = prompt if isinstance(prompt, str) else None
        ids: Any = None if isinstance(prompt, str | dict) else prompt
        adds_special_tokens = True
        if isinstance(prompt, dict):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            adds_special_tokens = prompt.get(ADDS_SPECIAL_TOKENS, True)
        if ids is None and not isinstance(text, str):
            raise ValueError(f"prompt {index} has neither a text nor token ids")
        if ids is None:
            ids = self._offline.text_tokenizer().encode(str(text), adds_special_tokens, keep)
        ids = [int(token) for token in ids][:keep]
        limit = self._offline.limits.max_model_len
        if not ids:
            raise ValueError(f"prompt {index} has no tokens")
        if len(ids) > limit:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens, the context holds {limit}; truncate_prompt_tokens=-1 cuts it"
            )
        return VectorJob(GenerationRequest(request_id, ids, UNSAMPLED, pooling=pooling))


def embedding_output(job: VectorJob) -> EmbeddingRequestOutput:
    ids = [int(token) for token in job.request.prompt_token_ids]
    embedding = EmbeddingOutput(job.vector.tolist())
    return EmbeddingRequestOutput(job.request.request_id, embedding, ids, job.num_cached_tokens)


def as_pairs(text_1: str | Sequence[str], text_2: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """The first texts, one or as many as second ones, and these. Raises ValueError."""
    first = [text_1] if isinstance(text_1, str) else list(text_1)
    second = [text_2] if isinstance(text_2, str) else list(text_2)
    if len(first) not in (1, len(second)):
        raise ValueError(
            f"text_1 has {len(first)} texts and text_2 {len(second)}; give one text_1, or one for each text_2"
        )
    return first, second


def scores(jobs: list[VectorJob], num_first: int) -> list[ScoringRequestOutput]:
    """Of each second text with its first one; the jobs are of the `num_first` first texts, then of the others."""
    first, second = jobs[:num_first], jobs[num_first:]
    outputs = []
    for one, other in zip(first if num_first > 1 else first * len(second), second, strict=True):
        ids = [int(token) for job in (one, other) for token in job.request.prompt_token_ids]
        score = ScoringOutput(cosine(one.vector, other.vector))
        outputs.append(ScoringRequestOutput(other.request.request_id, score, ids))
    return outputs
