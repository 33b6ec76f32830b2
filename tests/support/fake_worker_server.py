"""A gRPC worker that follows protos/worker.proto without a model: it refuses wrong differences, remembers which token's
KV each block holds, and "samples" tokens by arithmetic that a test can redo."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal

import grpc
import grpc.aio
import numpy as np

from manta.configs.schema import ServeConfig
from manta.protos import worker_pb2 as pb
from manta.protos import worker_pb2_grpc
from manta.workers.links import LinkServer

VOCAB_SIZE = 1000
BAD_GRAMMAR = "(("
Transport = Literal["grpc", "unix", "tcp"]  # what plans travel over


def fake_next_token(last_token: int, position: int, seed: int) -> int:
    """The token at `position` of a sequence whose token before it is `last_token`."""
    return (last_token * 31 + position * 17 + seed) % VOCAB_SIZE


def fake_tokens(prompt: list[int], num_tokens: int, seed: int) -> list[int]:
    """What a fake worker generates after `prompt`."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(fake_next_token(tokens[-1], len(tokens), seed))
    return tokens[len(prompt) :]


def fake_record(token: int, position: int, num_best: int) -> bytes:
    """Of the token at `position`: -token / 4, rank position, the best are 0, 1, ... with 0, -1, ..."""
    floats = np.array([-token / 4, *range(0, -num_best, -1)], "<f4")
    return floats[:1].tobytes() + np.array([position, *range(num_best)], "<i4").tobytes() + floats[1:].tobytes()


class WrongPlanError(Exception):
    """The plan breaks the protocol; the message says how."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise WrongPlanError(message)


@dataclass
class _Slot:
    lane: int
    tokens: list[int]
    num_computed: int
    max_length: int
    blocks: list[int]
    num_prompt_tokens: int
    sampling: Any
    decoding: bool = False


@dataclass
class FakeDevice:
    """Slots and KV of one rank; `run` does what the comments of StepPlan say."""

    num_blocks: int
    block_size: int
    epoch: int = 0
    step: int = 0
    slots: dict[int, _Slot] = field(default_factory=dict)
    kv: dict[int, dict[int, int]] = field(default_factory=dict)  # block -> offset -> token
    logprobs: bytes = b""  # of the step

    def run(self, plan: pb.StepPlan) -> list[int]:
        """Returns the sampled tokens in row order. Raises WrongPlanError."""
        self._enter(plan)
        self.logprobs = b""
        for slot in _column(plan.frees):
            require(slot in self.slots, f"free of the empty slot {slot}")
            del self.slots[slot]
        for add in plan.adds:
            self._add(add)
        for slot, block in zip(plan.grow[::2], plan.grow[1::2], strict=True):
            require(slot in self.slots, f"growth of the empty slot {slot}")
            self.slots[slot].blocks.append(block)
        for source, destination in _column(plan.copies).reshape(-1, 2).tolist():
            self.kv[destination] = dict(self.kv.get(source, {}))
        return self._decode(plan) + self._prefill(plan)

    def _enter(self, plan: pb.StepPlan) -> None:
        require(plan.epoch >= self.epoch, f"epoch {plan.epoch} after {self.epoch}")
        if plan.epoch > self.epoch:
            self.epoch, self.step = plan.epoch, 0
            self.slots.clear()
        require(plan.step == self.step + 1, f"step {plan.step} after {self.step}")
        self.step = plan.step

    def _add(self, add: pb.SeqAdd) -> None:
        require(add.slot not in self.slots, f"slot {add.slot} is taken")
        tokens = np.frombuffer(add.tokens, "<i4").tolist()
        require(add.num_computed < len(tokens), "nothing is left to compute")
        require(len(tokens) < add.max_length, "the sequence cannot grow")
        blocks = _column(add.blocks).tolist()
        self.slots[add.slot] = _Slot(
            add.lane, tokens, add.num_computed, add.max_length, blocks, add.num_prompt_tokens, add.sampling
        )

    def _decode(self, plan: pb.StepPlan) -> list[int]:
        held = set(_column(plan.holds).tolist())
        sampled = []
        for number in sorted(self.slots):
            slot = self.slots[number]
            runs = slot.lane == plan.lane and slot.decoding and number not in held
            if runs and len(slot.tokens) < slot.max_length:
                self._compute(slot, 1)
                sampled.append(self._sample(slot))
        return sampled

    def _prefill(self, plan: pb.StepPlan) -> list[int]:
        sampled = []
        for number, length in zip(_column(plan.prefill_slots), _column(plan.prefill_lengths), strict=True):
            require(int(number) in self.slots, f"prefill of the empty slot {number}")
            slot = self.slots[int(number)]
            require(slot.lane == plan.lane and not slot.decoding, f"slot {number} does not prefill in this lane")
            require(0 < length <= len(slot.tokens) - slot.num_computed, f"prefill length {length}")
            self._compute(slot, int(length))
            if slot.num_computed == len(slot.tokens):
                slot.decoding = True
                sampled.append(self._sample(slot))
        return sampled

    def _compute(self, slot: _Slot, length: int) -> None:
        """Writes the KV of the next tokens, after checking that all KV before it is this sequence's."""
        end = slot.num_computed + length
        require(end <= len(slot.blocks) * self.block_size, "the block table does not cover the tokens")
        require(max(slot.blocks) < self.num_blocks, "a block outside the pool")
        for position in range(slot.num_computed, end):
            block, offset = divmod(position, self.block_size)
            self.kv.setdefault(slot.blocks[block], {})[offset] = slot.tokens[position]
        for position in range(end):
            block, offset = divmod(position, self.block_size)
            held = self.kv.get(slot.blocks[block], {}).get(offset)
            require(held == slot.tokens[position], f"KV of position {position} holds token {held}")
        asked = slot.sampling
        if asked.HasField("num_prompt_logprobs"):
            for position in range(slot.num_computed + 1, min(end, slot.num_prompt_tokens - 1) + 1):
                self.logprobs += fake_record(slot.tokens[position], position, asked.num_prompt_logprobs)
        slot.num_computed = end

    def _sample(self, slot: _Slot) -> int:
        token = fake_next_token(slot.tokens[-1], len(slot.tokens), int(slot.sampling.seed))
        if slot.sampling.HasField("num_logprobs"):
            self.logprobs += fake_record(token, len(slot.tokens), slot.sampling.num_logprobs)
        slot.tokens.append(token)
        return token


def _column(data: bytes) -> Any:
    return np.frombuffer(data, "<u4").astype(int)


@dataclass(frozen=True)
class _Waiting:
    plan: pb.StepPlan
    arrived_s: float


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """One rank. The attributes set by a test take effect at once."""

    def __init__(self, num_blocks: int = 256, step_s: float = 0.0) -> None:
        self.num_blocks = num_blocks
        self.step_s = step_s
        self.load_error: str | None = None  # Load fails with it
        self.fail_at_step: int | None = None  # that step of the current epoch reports `step_error`, once
        self.step_error = "out of memory"
        self.stalled = False  # reads plans, answers none
        self.compiles = asyncio.Event()  # Compile waits for it
        self.compiles.set()
        self.has_runner = True  # False: Compile comes before Start
        self.compiled: list[str] = []  # texts of the grammars that it was asked for
        self.imports = asyncio.Event()  # ImportBlocks waits for it with every block
        self.imports.set()
        self.num_imports = 0
        self.num_steps = 0
        self.max_queued = 0  # plans in the worker at once, the running one included
        self.started_blocks: int | None = None
        self.load: pb.LoadRequest | None = None
        self.device: FakeDevice | None = None
        self.links: LinkServer | None = None
        self._config: ServeConfig | None = None
        self.num_meetings = 0  # with other ranks, after the first
        self._has_left = False  # the ranks it was with, since the last Start
        self._last = (0, 0)  # epoch and step before the last Start
        self._num_queued = 0
        self._idle_from_s = time.perf_counter()

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        port = 12345 if request.open_rendezvous else 0
        response = pb.DescribeResponse(host="127.0.0.1", rendezvous_port=port, device="cpu", pid=1)
        if self.links is not None:
            response.link_port, response.link_socket = self.links.port, self.links.socket_name
            response.link_key = self.links.key
        return response

    async def Load(self, request: pb.LoadRequest, context: Any) -> pb.LoadResponse:
        if self.load_error is not None:
            await context.abort(grpc.StatusCode.INTERNAL, self.load_error)
        if self.load is not None and request.meeting != self.load.meeting and request.meeting:
            self.num_meetings += 1
            self._has_left = True
        self.load = request
        self._config = ServeConfig.model_validate_json(request.config_json)
        return pb.LoadResponse(num_blocks=self.num_blocks, weight_bytes=1000, bytes_per_block=64, load_s=0.1)

    async def Start(self, request: pb.StartRequest, context: Any) -> pb.StartResponse:
        assert self._config is not None
        while self.links is not None and self._num_queued:  # as a real one, it first does what has come over links
            await asyncio.sleep(0.001)
        if self._has_left:
            self._last, self._has_left = (0, 0), False
        elif self.device is not None and self.device.epoch:
            self._last = self.device.epoch, self.device.step
        self.started_blocks = request.num_blocks
        self.device = FakeDevice(request.num_blocks, self._config.block_size)
        return pb.StartResponse(warmup_s=0.0, last_epoch=self._last[0], last_step=self._last[1])

    async def Compile(self, request: pb.CompileRequest, context: Any) -> pb.CompileResponse:
        self.compiled.append(request.grammar.text)
        await self.compiles.wait()
        if not self.has_runner:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "Compile came before Start")
        if request.grammar.text == BAD_GRAMMAR:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a bad grammar")
        return pb.CompileResponse()

    async def ImportBlocks(self, request: pb.ImportBlocksRequest, context: Any) -> pb.ImportBlocksResponse:
        device = self.device
        assert device is not None
        self.num_imports += 1
        async with grpc.aio.insecure_channel(request.peer) as channel:
            export = pb.ExportBlocksRequest(epoch=request.peer_epoch, blocks=request.peer_blocks)
            try:
                blocks = iter(_column(request.blocks).tolist())
                async for chunk in worker_pb2_grpc.WorkerStub(channel).ExportBlocks(export):
                    await self.imports.wait()
                    if device is not self.device or not self._admits_blocks(request.epoch):
                        await context.abort(grpc.StatusCode.ABORTED, f"epoch {request.epoch} is over")
                    tokens = np.frombuffer(chunk.data, "<i4").tolist()
                    device.kv[next(blocks)] = {place: token for place, token in enumerate(tokens) if token >= 0}
            except grpc.aio.AioRpcError as error:
                await context.abort(grpc.StatusCode.ABORTED, f"the blocks did not come: {error.details()}")
        return pb.ImportBlocksResponse(num_bytes=len(request.blocks) * 16, took_s=0.001)

    def _admits_blocks(self, epoch: int) -> bool:
        assert self.device is not None
        return epoch >= self.device.epoch

    async def ExportBlocks(self, request: pb.ExportBlocksRequest, context: Any) -> AsyncIterator[pb.BlockChunk]:
        assert self.device is not None
        for block in _column(request.blocks).tolist():
            if request.epoch != self.device.epoch:
                await context.abort(grpc.StatusCode.ABORTED, f"epoch {request.epoch} is over")
            held = self.device.kv.get(block, {})
            tokens = [held.get(place, -1) for place in range(self.device.block_size)]
            yield pb.BlockChunk(num_blocks=1, data=np.array(tokens, "<i4").tobytes())

    async def Run(self, plans: AsyncIterator[pb.StepPlan], context: Any) -> AsyncIterator[pb.StepResult]:
        queue: asyncio.Queue[_Waiting] = asyncio.Queue()

        async def read() -> None:
            async for plan in plans:
                queue.put_nowait(self._arrived(plan))

        reader = asyncio.create_task(read())
        try:
            while True:
                result = await self._answer(await queue.get())
                if result.error or self._is_output():
                    yield result
        finally:
            reader.cancel()

    def open_links(self, over_tcp: bool) -> None:
        """Takes links on the running event loop; `over_tcp` hides the Unix socket, as from a scheduler far away."""
        loop = asyncio.get_running_loop()

        def read(plans: Iterator[pb.StepPlan], queue: SimpleQueue[_Waiting | None]) -> None:
            with contextlib.suppress(OSError):
                for plan in plans:
                    queue.put(self._arrived(plan))
            queue.put(None)

        def serve(plans: Iterator[pb.StepPlan]) -> Iterator[pb.StepResult]:
            queue: SimpleQueue[_Waiting | None] = SimpleQueue()
            Thread(target=read, args=(plans, queue), daemon=True).start()

            def answers() -> Iterator[pb.StepResult]:
                with contextlib.suppress(CancelledError):  # the test is over
                    while (waiting := queue.get()) is not None:
                        yield asyncio.run_coroutine_threadsafe(self._answer(waiting), loop).result()

            results = answers()
            try:
                for result in results:
                    if result.error or self._is_output():
                        yield result
            finally:  # whoever does not listen any more: what has come is done
                for _ in results:
                    pass

        self.links = LinkServer("127.0.0.1", serve)
        if over_tcp:
            self.links.socket_name = ""
        self.links.start()

    def _arrived(self, plan: pb.StepPlan) -> _Waiting:
        self._num_queued += 1
        self.max_queued = max(self.max_queued, self._num_queued)
        return _Waiting(plan, time.perf_counter())

    async def _answer(self, waiting: _Waiting) -> pb.StepResult:
        start_s = time.perf_counter()
        result = await self._step(waiting.plan)
        end_s = time.perf_counter()
        result.device_us = int((end_s - start_s) * 1e6)
        result.queue_us = int((start_s - waiting.arrived_s) * 1e6)
        result.idle_us = max(int((start_s - self._idle_from_s) * 1e6), 0)  # plans of two epochs may overlap
        self._idle_from_s = end_s
        self._num_queued -= 1
        return result

    async def _step(self, plan: pb.StepPlan) -> pb.StepResult:
        assert self.device is not None
        while self.stalled:
            await asyncio.sleep(0.01)
        if self.step_s:
            await asyncio.sleep(self.step_s)
        result = pb.StepResult(epoch=plan.epoch, step=plan.step)
        if self.fail_at_step == plan.step:
            self.fail_at_step = None
            result.error = self.step_error
            return result
        try:
            result.tokens = np.array(self.device.run(plan), "<i4").tobytes()
            result.logprobs = self.device.logprobs
        except WrongPlanError as error:
            result.error = f"wrong plan at step {plan.step}: {error}"
        self.num_steps += 1
        return result

    def _is_output(self) -> bool:
        assert self.load is not None
        assert self._config is not None
        return self.load.tp_rank == 0 and self.load.pp_rank == self._config.pipeline_parallel_size - 1


class FakeWorkerServer:
    """A FakeWorker behind a real gRPC server on this event loop, and behind links where `transport` says so."""

    def __init__(self, worker: FakeWorker | None = None, transport: Transport = "grpc") -> None:
        self.worker = worker or FakeWorker()
        self.transport = transport
        self.address = ""
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        options = (("grpc.http2.max_ping_strikes", 0), ("grpc.so_reuseport", 0))
        if self.transport != "grpc":
            self.worker.open_links(over_tcp=self.transport == "tcp")
        self._server = grpc.aio.server(options=options)
        worker_pb2_grpc.add_WorkerServicer_to_server(self.worker, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self.address

    async def stop(self) -> None:
        """Also how a test kills the worker: the streams break and nobody listens any more."""
        if self.worker.links is not None:
            self.worker.links.stop()
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
