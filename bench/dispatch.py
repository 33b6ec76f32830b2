"""Does the device ever wait for the scheduler? Real processes and streams around a device that takes exactly D.

    python bench/dispatch.py                      one replica of 1, 2, 4 and 8 ranks on this host
    python bench/dispatch.py --replicas 1 2 4 8   that many replicas of one rank each
    python bench/dispatch.py --grpc               plans, results and tokens over gRPC streams instead of links

256 running sequences decode, two plans in flight. Columns:

    idle         share of the device's time without a step: of the rank that answers, and of the worst rank
    plan-device  from the beginning of Scheduler.plan until the last rank's device has the plan, ms
    result-plan  from a result's arrival until the next plan is written to all ranks, ms
    cpu          of the scheduler process per step, us, all its threads
    worker cpu   of all worker processes together per step, us
    bytes        of a plan
    clock late   of the fake device itself, us: how long after its end a step's answer is begun
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import numpy as np
from dispatch_figures import HEADER, Window, figures, read_traces, row
from processes import cpu_s, spawn

from manta.cluster.engine.client import EngineClient
from manta.cluster.engine.streams import build_submit
from manta.cluster.engine.types import GenerationRequest
from manta.cluster.streams import Stream, open_stream
from manta.configs.sampling import SamplingParams
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2 as pb

PROMPT_TOKENS = 32
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 65536,
    "eos_token_id": 2,
}  # fmt: skip


class Load:
    """One frontend whose messages nobody reads closer than needed."""

    def __init__(self, stream: Stream, num_requests: int) -> None:
        self._stream = stream
        self._num_requests = num_requests
        self._last_handle = 0

    @classmethod
    async def connect(cls, address: str, num_requests: int, over_grpc: bool) -> "Load":
        """A stream as a frontend opens it."""
        if over_grpc:
            channel = grpc.aio.insecure_channel(address)
            return cls(await open_stream(None, channel, "/manta.engine.v1.Engine/Connect"), num_requests)
        client = EngineClient(address)
        return cls(await client._open(10.0), num_requests)

    async def begin(self, step_ms: float) -> None:
        """Returns when all requests decode."""
        rng = np.random.default_rng(self._last_handle)
        for _ in range(self._num_requests):
            self._last_handle += 1
            prompt = rng.integers(3, 32000, PROMPT_TOKENS).tolist()
            sampling = SamplingParams(max_tokens=60_000, seed=round(step_ms * 1000), ignore_eos=True)
            submit = build_submit(self._last_handle, GenerationRequest("bench", prompt, sampling))
            self._stream.write(pb.FrontendMessage(submit=submit).SerializeToString())
        decoding: set[int] = set()
        while len(decoding) < self._num_requests:
            message = pb.EngineMessage.FromString(await self._stream.read())
            assert not message.refused, message.refused
            decoding.update(np.frombuffer(message.handles, "<u8").tolist())

    async def run(self, duration_s: float) -> None:
        end_s = time.monotonic() + duration_s
        while time.monotonic() < end_s:
            await self._stream.read()

    async def end(self) -> None:
        handles = range(self._last_handle - self._num_requests + 1, self._last_handle + 1)
        self._stream.write(pb.FrontendMessage(abort=pb.Abort(handles=handles)).SerializeToString())
        num_ended = 0
        while num_ended < self._num_requests:
            num_ended += len(pb.EngineMessage.FromString(await self._stream.read()).finished)

    def close(self) -> None:
        self._stream.close()


@asynccontextmanager
async def deployment(
    ranks: int, replicas: int, args: argparse.Namespace, folder: Path
) -> AsyncIterator[tuple[str, list[int]]]:
    """The scheduler's address, and the process ids of workers and scheduler; traces are in `folder` afterwards."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    config = ServeConfig(
        model=str(folder), load_format="dummy", device="cpu", tensor_parallel_size=ranks, data_parallel_size=replicas,
        max_num_seqs=args.running // replicas, max_num_batched_tokens=8192, port=0, grpc_port=0,
    )  # fmt: skip
    parent = ["--parent-pid", str(os.getpid())]
    workers = [
        spawn(f"worker {i}", "fake_device", ["--trace", str(folder / f"worker{i}.npy"), *parent])
        for i in range(ranks * replicas)
    ]
    children = list(workers)
    try:
        addresses = [worker.wait_for_address(60) for worker in workers]
        groups = ";".join(",".join(addresses[i : i + ranks]) for i in range(0, len(addresses), ranks))
        argv = [str(folder / "engine.npz"), "--config-json", config.model_dump_json(), "--workers", groups, *parent]
        children.append(spawn("scheduler", "grpc_engine" if args.grpc else "traced_engine", argv))
        yield await asyncio.to_thread(children[-1].wait_for_address, 60), [child.pid for child in children]
    finally:
        for child in reversed(children):
            child.terminate()
        for child in children:
            await asyncio.to_thread(child.join, 10)


async def measure(ranks: int, replicas: int, args: argparse.Namespace) -> list[str]:
    """A table row per step time."""
    windows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with deployment(ranks, replicas, args, folder) as (address, pids):
            load = await Load.connect(address, args.running, args.grpc)
            for step_ms in args.step_ms:
                await load.begin(step_ms)
                await load.run(0.3)
                begin_ns, scheduler_s, workers_s = time.monotonic_ns(), cpu_s(pids[-1:]), cpu_s(pids[:-1])
                await load.run(args.duration_s)
                scheduler_s, workers_s = cpu_s(pids[-1:]) - scheduler_s, cpu_s(pids[:-1]) - workers_s
                windows.append(Window(step_ms, begin_ns, time.monotonic_ns(), scheduler_s, workers_s))
                await load.end()
            load.close()
        traces = read_traces(folder, ranks, replicas)
    return [row(f"{replicas} x {ranks}", window, figures(window, traces)) for window in windows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", help="of one replica; default 1 2 4 8")
    parser.add_argument("--replicas", type=int, nargs="*", default=[], help="of one rank each")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[0.5, 1, 2, 5, 10])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--duration-s", type=float, default=3.0)
    parser.add_argument("--grpc", action="store_true", help="no links: for comparison")
    args = parser.parse_args()
    print(HEADER)
    ranks = args.ranks if args.ranks is not None else [] if args.replicas else [1, 2, 4, 8]
    for sizes in [*((number, 1) for number in ranks), *((1, number) for number in args.replicas)]:
        for line in asyncio.run(measure(*sizes, args)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
