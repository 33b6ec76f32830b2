"""Streams whose sequences move between replicas all the time, with real workers on a tiny checkpoint: nobody who reads
them notices, also when a worker is killed in the midst."""

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from manta import AsyncLLM, RequestOutput, SamplingParams
from manta.cluster.engine.engine import Engine
from manta.scheduler.move_cost import MoveFigures
from tests.cluster.test_llm import params, worker_pids
from tests.support.checkpoints import make_checkpoint
from tests.support.small_tokenizers import TEXTS, VOCAB_SIZE, write_model_folder

FIELDS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "block_size": 8,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "max_model_len": 512,
    "kv_cache_memory_bytes": "8MiB",
    "data_parallel_size": 2,
}
SHARED = [7, 3, 9, 40, 41, 42, 43, 50] * 5  # tokens that several prompts begin with
LONG = {"max_tokens": 90, "ignore_eos": True}
ASKED: dict[str, tuple[Any, SamplingParams]] = {
    "greedy": (TEXTS[0], params(**LONG)),
    "long": ([*range(20, 90)] * 4, params(**LONG)),
    "seeded": ([*SHARED, 5], params(temperature=1.0, seed=7, top_p=0.9, **LONG)),
    "penalties": (
        [*SHARED, 6],
        params(temperature=0.8, seed=3, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.4, **LONG),
    ),
    "samples": ([*SHARED, 8], params(temperature=1.0, n=3, seed=5, **LONG)),
    "log-probabilities": (TEXTS[1], params(logprobs=2, prompt_logprobs=1, temperature=1.0, seed=2, **LONG)),
    "stop string": (TEXTS[2], params(max_tokens=120, temperature=1.0, seed=21, min_tokens=50, stop=["e", "a"])),
    "grammar": (TEXTS[0], params(max_tokens=60, structured_outputs={"regex": "([a-f][0-9]){20,40}"})),
    "beams": (TEXTS[2], SamplingParams(use_beam_search=True, n=2, best_of=3, max_tokens=30, ignore_eos=True)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    return make_checkpoint(folder, "llama", vocab_size=VOCAB_SIZE, eos_token_id=1)


async def last_of(llm: AsyncLLM, name: str) -> RequestOutput:
    async for output in llm.generate(*ASKED[name]):
        last = output
    return last


def same(output: RequestOutput) -> list[Any]:
    """What has to be equal."""
    completions = [(each.token_ids, each.text, each.finish_reason, each.stop_reason) for each in output.outputs]
    return [completions, output.prompt_logprobs, [each.logprobs for each in output.outputs]]


def stir(engine: Engine, rng: random.Random) -> int:
    """Some of what runs begins to move. Returns how many have moved with their blocks so far."""
    engine._mover.meter.figures = lambda: MoveFigures(1, 1e9, 0.0, 1.0)  # type: ignore[method-assign]
    scheduler = engine.scheduler
    for replica in scheduler._replicas:
        running = list(replica.residents.values())
        scheduler.moves.wish(rng.sample(running, min(len(running), 2)))
    engine._mover._begin()
    scheduler.check()
    return scheduler.counters.num_moves_copied


async def stirred(llm: AsyncLLM, kills: int | None) -> tuple[dict[str, RequestOutput], int]:
    """The requests, all at once, moving; with the worker `kills` killed when some have moved."""
    rng, num_moved = random.Random(1), 0
    tasks = {name: asyncio.create_task(last_of(llm, name)) for name in ASKED}
    while not all(task.done() for task in tasks.values()):
        num_moved = await asyncio.to_thread(llm._offline.thread.call, lambda engine: stir(engine, rng))
        if kills is not None and num_moved >= 10:
            os.kill(kills, signal.SIGKILL)
            kills = None
        await asyncio.sleep(0.01)
    return {name: await task for name, task in tasks.items()}, num_moved


def test_nobody_notices(folder: Path) -> None:
    before = worker_pids()

    async def test() -> None:
        async with AsyncLLM(str(folder), **FIELDS) as llm:
            expected = {name: same(await last_of(llm, name)) for name in ASKED}
            for kills in (None, max(worker_pids() - before)):
                outputs, num_moved = await stirred(llm, kills)
                for name, output in outputs.items():
                    assert same(output) == expected[name], name
                assert num_moved > 20

            def is_idle(engine: Engine) -> bool:
                engine.scheduler.check()
                return engine.scheduler.num_running == 0

            assert llm._offline.thread.call(is_idle)

    asyncio.run(test())
    assert worker_pids() == before
