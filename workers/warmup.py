"""Steps of made-up tokens: such as no other takes more memory than, and small ones before the first request, so that it
does not pay for compilation. Plans that every rank of the replica runs; they use nothing but the cache's first block,
which small ones copy to the second.
"""

from collections.abc import Iterator

import numpy as np

from manta.configs.schema import ServeConfig
from manta.protos.sampling_pb2 import Pooling, Sampling
from manta.protos.worker_pb2 import SeqAdd, StepPlan
from manta.workers.runner import Runner

WARMUP_PREFILL_TOKENS = 32
WARMUP_ROWS = 4
SMALL_STEPS = 4
LONG_STEPS = 3
FEW_TOKENS = 64  # so few queries upon a long context that attention splits its keys into the most parts
EVERY_FILTER = Sampling(
    temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.1, seed=1
)
WITH_LOGPROBS = Sampling(num_logprobs=20, num_prompt_logprobs=20)
WITH_LOGPROBS.MergeFrom(EVERY_FILTER)
MEAN = Pooling(kind=Pooling.MEAN, num_dims=1, normalizes=True)
LAST = Pooling(kind=Pooling.LAST, num_dims=1, normalizes=True)


def run_largest_steps(runner: Runner, config: ServeConfig, max_model_len: int, *, generates: bool = True) -> None:
    """As many tokens as a step may have, in as many rows as may sample, and upon the longest context; then few tokens
    upon the longest context, which attention splits: of a prompt, of a row that decodes beside a prompt, and of one
    that decodes alone. Everything is asked for that takes memory. Where nothing can be generated, prompts alone."""
    _run(runner, _largest_plans(config, max_model_len) if generates else _largest_pooled_plans(config, max_model_len))


def run_small_steps(runner: Runner, config: ServeConfig, max_model_len: int, *, generates: bool = True) -> None:
    """A short prefill and a copied block, a prefill beside decodes, decodes of several rows and of a single one; where
    nothing can be generated, prompts alone."""
    _run(runner, _small_plans(config, max_model_len) if generates else _small_pooled_plans(config, max_model_len))


def _run(runner: Runner, plans: Iterator[StepPlan]) -> None:
    for plan in plans:
        runner.run(plan).tokens()
    runner.clear()


def _largest_plans(config: ServeConfig, max_model_len: int) -> Iterator[StepPlan]:
    longest = max_model_len - 1  # a prompt leaves room for a token
    if longest < 1:
        return
    lengths = _most_tokens(config, longest)
    yield _plan(1, [_add(config, slot, length, 0) for slot, length in enumerate(lengths)], lengths)
    for step, most in ((2, config.max_num_batched_tokens), (3, FEW_TOKENS)):
        chunk = min(most, config.max_num_batched_tokens, longest)
        frees = range(len(lengths)) if step == 2 else range(1)
        yield _plan(step, [_add(config, 0, longest, longest - chunk)], [chunk], frees)
    length = max_model_len - LONG_STEPS
    if length < 1 or len(lengths) < 2:
        return
    yield _plan(4, [_add(config, 0, length, length - 1, num_new=LONG_STEPS)], [1], range(1))
    beside = min(FEW_TOKENS, config.max_num_batched_tokens - 1, longest)
    yield _plan(5, [_add(config, 1, beside, 0)], [beside])
    yield StepPlan(step=6)


def _largest_pooled_plans(config: ServeConfig, max_model_len: int) -> Iterator[StepPlan]:
    lengths = _most_tokens(config, max_model_len)
    yield _plan(1, [_add_pooled(config, slot, length, 0, MEAN) for slot, length in enumerate(lengths)], lengths)
    for step, most in ((2, config.max_num_batched_tokens), (3, FEW_TOKENS)):
        chunk = min(most, config.max_num_batched_tokens, max_model_len)
        frees = range(len(lengths)) if step == 2 else range(1)
        yield _plan(step, [_add_pooled(config, 0, max_model_len, max_model_len - chunk, LAST)], [chunk], frees)


def _most_tokens(config: ServeConfig, longest: int) -> list[int]:
    """Lengths of prompts that fill a step, in as many rows as there may be."""
    left = config.max_num_batched_tokens
    lengths: list[int] = []
    for row in range(min(config.max_num_seqs, left)):
        others = min(config.max_num_seqs, config.max_num_batched_tokens) - row - 1
        lengths.append(min(longest, left - others))
        left -= lengths[-1]
    return lengths


def _small_pooled_plans(config: ServeConfig, max_model_len: int) -> Iterator[StepPlan]:
    rows = min(WARMUP_ROWS, config.max_num_seqs)
    length = min(WARMUP_PREFILL_TOKENS, config.max_num_batched_tokens // rows, max_model_len)
    plan = _plan(1, [_add_pooled(config, slot, length, 0, MEAN) for slot in range(rows)], [length] * rows)
    plan.copies = np.array([0, 1], "<u4").tobytes()
    yield plan
    yield _plan(2, [_add_pooled(config, 0, length, 0, LAST)], [length], range(rows))


def _small_plans(config: ServeConfig, max_model_len: int) -> Iterator[StepPlan]:
    rows = min(WARMUP_ROWS, config.max_num_seqs)
    length = min(WARMUP_PREFILL_TOKENS, config.max_num_batched_tokens // rows, max_model_len - SMALL_STEPS)
    if length < 1:
        return
    adds = [_add(config, slot, length, 0, num_new=SMALL_STEPS, sampling=EVERY_FILTER) for slot in range(rows)]
    first = max(1, rows - 1)
    plan = _plan(1, adds[:first], [length] * first)
    plan.copies = np.array([0, 1], "<u4").tobytes()
    yield plan
    if rows > first:
        yield _plan(2, adds[first:], [length])  # beside decodes
    yield StepPlan(step=3)
    yield StepPlan(step=4, holds=np.arange(1, rows, dtype="<u4").tobytes())


def _plan(step: int, adds: list[SeqAdd], lengths: list[int], frees: range = range(0)) -> StepPlan:
    """Prefills so many tokens of each added sequence."""
    return StepPlan(
        step=step,
        frees=np.array(frees, "<u4").tobytes(),
        adds=adds,
        prefill_slots=np.array([add.slot for add in adds], "<u4").tobytes(),
        prefill_lengths=np.array(lengths, "<u4").tobytes(),
    )


def _add_pooled(config: ServeConfig, slot: int, length: int, num_computed: int, pooling: Pooling) -> SeqAdd:
    add = _add(config, slot, length, num_computed, num_new=0)
    add.ClearField("sampling")
    add.pooling.CopyFrom(pooling)
    return add


def _add(
    config: ServeConfig, slot: int, length: int, num_computed: int, num_new: int = 1, sampling: Sampling = WITH_LOGPROBS
) -> SeqAdd:
    """A prompt of zeros, all of whose blocks are the first one."""
    num_blocks = -(-(length + num_new) // config.block_size)
    return SeqAdd(
        slot=slot,
        tokens=np.zeros(length, "<i4").tobytes(),
        num_prompt_tokens=length,
        num_computed=num_computed,
        max_length=length + num_new,
        blocks=np.zeros(num_blocks, "<u4").tobytes(),
        sampling=sampling,
    )
