"""Scheduler and worker in one process, without streams between them: what a model and a device can do.

Needs torch, transformers, grpcio, protobuf, pydantic and numpy, and Triton on a GPU.
"""

import gc
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from manta.cluster.engine.codec import encode_plan, encode_sampling
from manta.configs.sampling import SamplingParams
from manta.configs.schema import ServeConfig
from manta.protos.worker_pb2 import StepPlan
from manta.scheduler.scheduler import Scheduler
from manta.scheduler.types import Capacity, Request, StepResult
from manta.workers.rank import LoadedRank, Placement, load_rank
from manta.workers.runner import Step

_ALONE = Placement(tp_rank=0, pp_rank=0, num_workers_on_host=1, rendezvous_host="", rendezvous_port=0, store=None)


@dataclass
class Result:
    """What one call of `generate` gave and took."""

    total_s: float
    first_token_s: float  # of the first request that got one
    tokens: list[list[int]]
    device_us: list[int] = field(default_factory=list)  # by step
    idle_us: list[int] = field(default_factory=list)

    @property
    def num_output_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def idle_share(self) -> float:
        """Of the device's time from the second step on: the first one waits for the call."""
        device, idle = sum(self.device_us[1:]), sum(self.idle_us[1:])
        return idle / (device + idle) if device + idle else 0.0


class InlineEngine:
    """Greedy, to the full length, at most two plans in flight as in a deployment."""

    def __init__(self, config: ServeConfig) -> None:
        begin_s = time.perf_counter()
        self.rank: LoadedRank = load_rank(config, _ALONE)
        self._runner = self.rank.start(self.rank.num_blocks)
        self.start_s = time.perf_counter() - begin_s
        capacity = Capacity(
            self.rank.num_blocks,
            config.block_size,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.max_model_len or self.rank.spec.max_position,
        )
        self._scheduler = Scheduler(
            [capacity], enable_prefix_caching=config.enable_prefix_caching, max_num_queued_reqs=1 << 20
        )
        self._sampling = encode_sampling(SamplingParams(temperature=0.0, seed=0))
        self._num_requests = 0

    def close(self) -> None:
        """Lets go of the model, its cache and its recordings; a GPU has their memory back."""
        del self._runner, self.rank
        gc.unfreeze()  # a rank hides what lives at its start from the collector
        gc.collect()
        torch.cuda.empty_cache()

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> Result:
        """All prompts at once."""
        outputs: dict[int, list[int]] = {}
        begin_s = time.perf_counter()
        for prompt, length in zip(prompts, output_lens, strict=True):
            self._num_requests += 1
            outputs[self._num_requests] = []
            tokens = np.array(prompt, np.int32)
            self._scheduler.add(Request(self._num_requests, tokens, max_tokens=length, sampling=self._sampling))
        result = Result(0.0, 0.0, [])
        in_flight: deque[tuple[int, int, Step]] = deque()
        num_unfinished = len(outputs)
        while num_unfinished:
            while (plan := self._scheduler.plan()) is not None:
                step = self._runner.run(StepPlan.FromString(encode_plan(plan)))
                in_flight.append((plan.epoch, plan.step, step))
            epoch, number, step = in_flight.popleft()
            sampled: NDArray[np.int32] = np.frombuffer(step.tokens(), "<i4")
            times = step.time()
            result.device_us.append(times.device_us)
            result.idle_us.append(times.idle_us)
            events = self._scheduler.apply(StepResult(epoch, number, sampled))
            if len(events.tokens) and not result.first_token_s:
                result.first_token_s = time.perf_counter() - begin_s
            for request, token in zip(events.request_ids.tolist(), events.tokens.tolist(), strict=True):
                outputs[request].append(token)
            num_unfinished -= len(events.finished)
        while in_flight:  # a plan that was made before the last end was known
            epoch, number, step = in_flight.popleft()
            self._scheduler.apply(StepResult(epoch, number, np.frombuffer(step.tokens(), "<i4")))
        result.total_s = time.perf_counter() - begin_s
        result.tokens = list(outputs.values())
        return result
