"""How long a stream pauses when its sequence moves to another replica: with its KV blocks copied, and computed again.

python bench/moves.py MODEL [--contexts 256 1024 4096] [--rounds 3]

Two replicas on this host, one core each on a machine with two. A stream runs in one of them, and one more beside it in
each; when it has some tokens it is told to move. The pause is the longest time between two of its tokens from then on;
what others feel is the longest of theirs in that time.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

from manta import AsyncLLM, SamplingParams
from manta.cluster.engine.engine import Engine
from manta.scheduler.move_cost import MoveFigures

NUM_BEFORE, NUM_AFTER = 8, 24  # tokens of the stream before and after it moves
FORCED = {"copied": MoveFigures(1, 1e12, 0.0, 1.0), "computed again": MoveFigures(1, 1.0, 1e9, 1e12)}


class Stream:
    """One request and when its tokens came."""

    def __init__(self, llm: AsyncLLM, num_prompt: int, num_tokens: int) -> None:
        self.times_s: list[float] = []
        self.prompt = [random.randrange(10, 30_000) for _ in range(num_prompt)]
        self._params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        self._news = asyncio.Event()
        self.task = asyncio.create_task(self._read(llm))

    async def _read(self, llm: AsyncLLM) -> None:
        async for _ in llm.generate({"prompt_token_ids": self.prompt}, self._params):
            self.times_s.append(time.perf_counter())
            self._news.set()

    async def has(self, num_tokens: int) -> None:
        while len(self.times_s) < num_tokens and not self.task.done():
            self._news.clear()
            await self._news.wait()

    def longest_s(self, since_s: float, until_s: float) -> float:
        """The longest time between two tokens of which the second came in that time."""
        gaps = [after - before for before, after in pairwise(self.times_s) if since_s <= after <= until_s]
        return max(gaps, default=0.0)


async def call(llm: AsyncLLM, act: object) -> object:
    return await asyncio.to_thread(llm._offline.thread.call, act)


def move(engine: Engine, num_prompt: int) -> None:
    """The sequence with that prompt goes to the other replica."""
    for replica in engine.scheduler._replicas:
        chosen = [each for each in replica.residents.values() if len(each.request.prompt) == num_prompt]
        engine.scheduler.moves.wish(chosen)
    engine._mover._begin()


async def measure(llm: AsyncLLM, context: int, how: str) -> tuple[float, float]:
    """The pause of the stream that moves, and the longest of the others'."""

    def force(engine: Engine) -> None:
        engine._mover.meter.figures = lambda: FORCED[how]  # type: ignore[method-assign]

    await call(llm, force)
    others = [Stream(llm, 32 + nth, 1500) for nth in range(2)]
    for other in others:
        await other.has(2)
    stream = Stream(llm, context, NUM_BEFORE + NUM_AFTER)
    await stream.has(NUM_BEFORE)
    began_s = time.perf_counter()
    await call(llm, lambda engine: move(engine, context))
    await stream.task
    for other in others:
        other.task.cancel()
    await asyncio.gather(*(other.task for other in others), return_exceptions=True)
    ended_s = stream.times_s[-1]
    return stream.longest_s(began_s, ended_s), max(other.longest_s(began_s, ended_s) for other in others)


async def run(args: argparse.Namespace) -> None:
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": args.max_num_batched_tokens}
    sizes = {"data_parallel_size": 2, "kv_cache_memory_bytes": args.kv_cache_memory_bytes}
    async with AsyncLLM(args.model, skip_tokenizer_init=True, device="cpu", **limits, **sizes) as llm:
        await measure(llm, 64, "copied")  # everything has run once
        block_bytes = llm._offline.thread.info.bytes_per_block / llm.config.block_size
        columns = ("context", "MiB", "copied, ms", "computed again, ms", "ratio", "others, ms", "others, again, ms")
        print(f"| {' | '.join(columns)} |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for context in args.contexts:
            pauses: dict[str, list[tuple[float, float]]] = {how: [] for how in FORCED}
            for _ in range(args.rounds):
                for how in FORCED:
                    pauses[how].append(await measure(llm, context, how))
            copied, again = ([medians(pauses[how])[which] * 1e3 for which in range(2)] for how in FORCED)
            mib = (context + NUM_BEFORE) * block_bytes / 2**20
            print(
                f"| {context:,} | {mib:.0f} | {copied[0]:.0f} | {again[0]:,.0f} | {again[0] / copied[0]:.1f} "
                f"| {copied[1]:.0f} | {again[1]:,.0f} |",
                flush=True,
            )


def medians(pauses: Sequence[tuple[float, float]]) -> tuple[float, float]:
    own, others = zip(*pauses, strict=True)
    return statistics.median(own), statistics.median(others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--kv-cache-memory-bytes", default="1GiB")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
