"""What the gRPC door itself costs, without gRPC and without an engine: microseconds on one core.

    python bench/rpc_door_cost.py MODEL_FOLDER

Of a message that is read and checked, of a call with one token, and of each response of a stream. The folder needs no
weights.
"""

import argparse
import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from manta.cluster.doors.generation import Running
from manta.cluster.doors.limits import read_limits
from manta.cluster.doors.rpc_generate import generate
from manta.cluster.doors.rpc_messages import reader
from manta.cluster.doors.service import Service
from manta.cluster.doors.text import load_tokenizer
from manta.cluster.doors.validate import Validator
from manta.cluster.engine.client import GenerationRequest, TokenChunk
from manta.configs.schema import ServeConfig
from manta.protos import inference_pb2 as pb

NUM_TOKENS = 200
NUM_ROUNDS = 300


class Engine:
    """Gives every request its max_tokens at once, one by one."""

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        for _ in range((request.sampling.max_tokens or 1) - 1):
            yield TokenChunk([9])
        yield TokenChunk([9], "length")


def build_service(model: str) -> Service:
    config = ServeConfig(model=model)
    tokenizer: Any = load_tokenizer(config)
    client: Any = Engine()
    validator = Validator(read_limits(config, 4 * NUM_TOKENS), tokenizer, random.Random(0))
    return Service(client, config, validator, Running(client, tokenizer), 0.0)


async def best_s(work: Callable[[], Awaitable[None]]) -> float:
    """Of many times; the rest is what else the host did."""
    best = float("inf")
    for _ in range(NUM_ROUNDS):
        begin_s = time.perf_counter()
        await work()
        best = min(best, time.perf_counter() - begin_s)
    return best


async def main(model: str) -> None:
    service, read = build_service(model), reader(pb.GenerateRequest)
    sampling = pb.SamplingParams(temperature=0.5, top_p=0.9, max_tokens=1, ignore_eos=True)
    request = pb.GenerateRequest(text="x", stream=True, sampling=sampling)
    short = request.SerializeToString()
    request.sampling.max_tokens = NUM_TOKENS
    long = request.SerializeToString()

    async def message() -> None:
        for _ in range(100):
            read(short)

    async def call(data: bytes) -> None:
        async for _ in generate(service, read(data)):
            pass

    one_s, all_s = await best_s(lambda: call(short)), await best_s(lambda: call(long))
    print(f"a message   {1e4 * await best_s(message):7.2f} us")
    print(f"a call      {1e6 * one_s:7.2f} us")
    print(f"a response  {1e6 * (all_s - one_s) / (NUM_TOKENS - 1):7.2f} us")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model; config.json and a tokenizer are enough")
    asyncio.run(main(parser.parse_args().model))
