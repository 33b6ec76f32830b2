"""What a seed makes of a simulated cluster: its sizes, who asks for what and when, and what goes wrong meanwhile."""

import asyncio
import gc
import logging
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from manta.cluster.engine.client import EngineClient
from manta.cluster.engine.engine import Engine
from manta.cluster.engine.types import Beams, GenerationRequest
from manta.configs.schema import ServeConfig
from manta.scheduler.move_cost import MoveFigures
from tests.support.fake_deployment import fake_config, request
from tests.support.fake_worker_server import fake_record, fake_tokens
from tests.support.simulation.cluster import Cluster, Sizes, simulated
from tests.support.simulation.loop import Process, VirtualLoop
from tests.support.simulation.net import Network

logger = logging.getLogger(__name__)

DEADLINE_S = 900.0  # of the clock that jumps


@dataclass
class Ask:
    """One call of a client: a request, or several that are submitted together."""

    at_s: float
    client: int
    requests: list[GenerationRequest]
    leaves_after: int | None = None  # tokens, then the reader goes away
    answers: list[tuple[list[int], bytes, str | None]] = field(default_factory=list)  # tokens, records, finish_reason

    @property
    def is_search(self) -> bool:
        return self.requests[0].beams is not None


@dataclass
class Story:
    config: ServeConfig
    sizes: Sizes
    num_clients: int
    asks: list[Ask]
    faults: list[tuple[float, str]]  # when, and what


FAULTS = (
    "worker dies", "worker dies before a result", "worker dies after a result", "worker's host vanishes",
    "worker stops", "worker stops for a while", "worker is cut off for a while", "worker's streams break",
    "step fails", "result is late", "result comes twice", "result of an old epoch",
    "scheduler dies", "scheduler stops", "scheduler stops for a while", "new workers die while they load",
    "client dies", "client's stream breaks", "client is cut off for a while",
)  # fmt: skip


def make_story(seed: int) -> Story:
    rng = random.Random(seed)
    tp, pp, dp = rng.choice([(1, 1, 1), (1, 1, 2), (1, 1, 3), (2, 1, 1), (2, 1, 2), (1, 2, 1), (1, 2, 2), (2, 2, 1)])
    config = fake_config(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        data_parallel_size=dp,
        max_num_seqs=rng.choice([2, 4, 16]),
        max_num_batched_tokens=rng.choice([16, 64]),
        scheduling_policy=rng.choice(["fcfs", "priority", "fair"]),
        enable_prefix_caching=rng.random() < 0.7,
        enable_chunked_prefill=rng.random() < 0.8,
    )
    if not config.enable_chunked_prefill:  # prompts have up to 60 tokens
        config = config.model_copy(update={"max_num_batched_tokens": 64})
    num_clients = rng.choice([1, 1, 2, 3])
    asks = [_make_ask(rng, number, num_clients, config) for number in range(rng.randint(3, 9))]
    faults = [(rng.uniform(0.0, 1.2), rng.choice(FAULTS)) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
    if rng.random() < 0.3:
        faults = [(faults[0][0], what) for _, what in faults]  # all at once
    sizes = Sizes(num_blocks=rng.choice([24, 40, 256]), step_s=rng.choice([0.002, 0.01, 0.03]))
    return Story(config, sizes, num_clients, asks, sorted(faults))


def _make_ask(rng: random.Random, number: int, num_clients: int, config: ServeConfig) -> Ask:
    prefix = rng.choice([[], [5] * 12, [7] * 20])
    prompt = [*prefix, *(rng.randrange(1000) for _ in range(rng.choice([1, 3, 15, 40])))]
    max_tokens = rng.choice([1, 5, 20, 40])
    seed, name = rng.randrange(1000), f"r{number}"
    who = {"priority": rng.randrange(3), "tenant": rng.choice(["", "one", "two"])}
    kind = rng.choice(["plain", "plain", "stop", "logprobs", "samples", "search", "leaves"])
    at_s, client = rng.choice([0.0, rng.uniform(0, 1.5)]), rng.randrange(num_clients)
    if kind == "samples":
        count = rng.choice([2, 3])
        return Ask(at_s, client, [replace(request(prompt, max_tokens, seed + i, name), **who) for i in range(count)])
    if kind == "search" and config.max_num_seqs >= 3:
        one = replace(request(prompt, min(max_tokens, 8), seed, name), beams=Beams(2), **who)
        return Ask(at_s, client, [one] * rng.choice([1, 2]))
    options: dict[str, Any] = {}
    if kind == "stop":
        options["stop_token_ids"] = [rng.choice(fake_tokens(prompt, max_tokens, seed))]
    if kind == "logprobs":
        options["logprobs"] = 1
    one = replace(request(prompt, max_tokens, seed, name, **options), **who)
    return Ask(at_s, client, [one], leaves_after=rng.randrange(max_tokens) if kind == "leaves" else None)


def expected(one: GenerationRequest) -> tuple[list[int], bytes, str]:
    """What a request that is no search gets from an undisturbed cluster."""
    prompt = list(one.prompt_token_ids)
    assert one.sampling.max_tokens is not None
    assert one.sampling.seed is not None
    tokens = fake_tokens(prompt, one.sampling.max_tokens, one.sampling.seed)
    stops = [place for place, token in enumerate(tokens) if token in one.sampling.stop_token_ids]
    if stops:
        tokens = tokens[: stops[0] + 1]
    records = b""
    if one.sampling.logprobs is not None:
        records = b"".join(fake_record(token, len(prompt) + i, 1) for i, token in enumerate(tokens))
    return tokens, records, "stop" if stops else "length"


def play(story: Story, seed: int) -> None:
    """Raises AssertionError for whatever is not as if nothing had gone wrong."""
    searches = [ask for ask in story.asks if ask.is_search]
    undisturbed = [Ask(0.0, 0, ask.requests) for ask in searches]
    if searches:
        _run(Story(story.config, story.sizes, 1, undisturbed, []), seed)
    _run(story, seed)
    for ask, before in zip(searches, undisturbed, strict=True):
        assert not ask.answers or ask.answers == before.answers, f"{ask.requests[0].request_id} is another search"


def _run(story: Story, seed: int) -> None:
    collecting = gc.isenabled()
    gc.disable()  # what it ends would end at another place in another run
    try:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(_Play(story, seed).run())
            loop = runner.get_loop()
            assert isinstance(loop, VirtualLoop)
            assert not loop.errors, loop.errors
    finally:
        if collecting:
            gc.enable()


class _Play:
    def __init__(self, story: Story, seed: int) -> None:
        self._story = story
        self._rng = random.Random(f"{seed} plays")
        self._moves = random.Random(f"{seed} moves")
        self._network = Network(random.Random(f"{seed} travels"))
        self._clients: list[tuple[Process, EngineClient]] = []
        self._cluster: Cluster

    async def run(self) -> None:
        with simulated(self._network):
            async with asyncio.timeout(DEADLINE_S):
                await self._tell()
            await self._look_for_leaks()

    async def _tell(self) -> None:
        story = self._story
        self._cluster = await Cluster.start(self._network, story.config, story.sizes, self._rng)
        self._clients = [await self._cluster.connect(f"client {i}") for i in range(story.num_clients)]
        reading = [self._clients[ask.client][0].spawn(self._ask(ask)) for ask in story.asks]
        disturbing = [asyncio.create_task(self._disturb(at_s, what)) for at_s, what in story.faults]
        stirring = asyncio.create_task(self._stir())
        await asyncio.gather(*disturbing)
        results = await asyncio.gather(*reading, return_exceptions=True)
        stirring.cancel()
        await asyncio.gather(stirring, return_exceptions=True)
        for ask, result in zip(story.asks, results, strict=True):
            if not self._clients[ask.client][0].is_alive:
                continue
            if result is not None:
                raise AssertionError(f"{ask.requests[0].request_id} failed: {result!r}") from result
            self._compare(ask)
        await self._cluster.settled()
        self._check_books()

    async def _stir(self) -> None:
        """Where there are several replicas, sequences move between them all the time, for no reason."""
        while self._story.config.data_parallel_size > 1:
            await asyncio.sleep(0.04)
            scheduler, engine = self._cluster.scheduler, self._cluster.engine
            if engine is not None and scheduler.is_alive and not scheduler.is_stopped:
                scheduler.spawn(self._move_one(engine))

    async def _move_one(self, engine: Engine) -> None:
        engine._mover.meter.figures = lambda: MoveFigures(1, 1e9, 0.0, 1.0)  # type: ignore[method-assign]
        running = [each for replica in engine.scheduler._replicas for each in replica.residents.values()]
        if running:
            engine.scheduler.moves.wish([self._moves.choice(running)])
            engine._mover._begin()

    async def _ask(self, ask: Ask) -> None:
        await asyncio.sleep(ask.at_s)
        client = self._clients[ask.client][1]
        if len(ask.requests) == 1 and not ask.is_search:
            ask.answers = [await self._read(client.generate(ask.requests[0]), ask.leaves_after)]
            return
        group = client.generate_group(ask.requests)
        reads = [self._read(group.chunks(place), None) for place in range(len(ask.requests))]
        try:
            ask.answers = list(await asyncio.gather(*reads))
        finally:
            group.close()

    @staticmethod
    async def _read(chunks: Any, leaves_after: int | None) -> tuple[list[int], bytes, str | None]:
        tokens: list[int] = []
        records, reason = b"", None
        async for chunk in chunks:
            assert reason is None, "it ends twice"
            tokens += chunk.token_ids
            records += chunk.logprobs
            reason = chunk.finish_reason
            assert reason != "error", chunk.error
            if leaves_after is not None and len(tokens) >= leaves_after:
                await chunks.aclose()
                break
        return tokens, records, reason

    @staticmethod
    def _compare(ask: Ask) -> None:
        if ask.is_search:
            return
        for one, (tokens, records, reason) in zip(ask.requests, ask.answers, strict=True):
            should, its_records, its_reason = expected(one)
            if ask.leaves_after is not None:
                assert tokens == should[: len(tokens)], f"{one.request_id}: {tokens} is no beginning of {should}"
            else:
                assert (tokens, reason) == (should, its_reason), f"{one.request_id} has other tokens"
                assert records == its_records, f"{one.request_id} has other log-probabilities"

    def _check_books(self) -> None:
        engine = self._cluster.engine
        assert engine is not None
        scheduler = engine.scheduler
        scheduler.check()
        assert (scheduler.num_running, scheduler.num_waiting) == (0, 0), "something runs or waits still"
        load = engine.load()
        assert load.num_free_blocks == load.num_blocks, f"{load.num_blocks - load.num_free_blocks} blocks are lost"
        assert engine._publisher.num_open == 0, f"{engine._publisher.num_open} requests are open"
        for process, client in self._clients:
            assert not (process.is_alive and len(client._streams)), f"{process.name} has open streams"
        for mesh in self._cluster.meshes:
            assert not mesh.wrong, mesh.wrong

    async def _look_for_leaks(self) -> None:
        for process, client in self._clients:
            if process.is_alive:
                await process.spawn(client.close())
        await self._cluster.close()
        await asyncio.sleep(60)
        left = [task.get_coro() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, f"tasks are left: {left}"
        assert not self._network.sockets, f"{len(self._network.sockets)} sockets are left"

    async def _disturb(self, at_s: float, what: str) -> None:
        await asyncio.sleep(at_s)
        logger.info("fault: %s", what)
        result = self._acts()[what]()
        if isinstance(result, Coroutine):
            await result

    def _acts(self) -> dict[str, Callable[[], object]]:
        cluster, network, rng = self._cluster, self._network, self._rng
        worker = rng.choice([worker for replica in cluster.workers for worker in replica])
        client = rng.choice(self._clients)[0]
        scheduler = cluster.scheduler

        def dies(when: str) -> Callable[[], None]:
            return lambda: setattr(worker.faults, "dies", when)

        def vanish() -> None:
            worker.process.has_vanished = True
            worker.process.kill()

        async def stop(process: Process, for_s: float | None) -> None:
            process.is_stopped = True
            if for_s is not None:
                await asyncio.sleep(for_s)
                process.is_stopped = False
                network.changed()

        async def cut(one: Process) -> None:
            pair = frozenset((one, scheduler))
            network.cuts.add(pair)
            await asyncio.sleep(rng.choice([0.3, 2.0, 30.0]))
            network.cuts.discard(pair)
            network.changed()

        def loading_fails() -> None:
            cluster.dies_in_load = 1
            worker.process.kill()

        return {
            "worker dies": worker.process.kill,
            "worker dies before a result": dies("before"),
            "worker dies after a result": dies("after"),
            "worker's host vanishes": vanish,
            "worker stops": lambda: stop(worker.process, None),
            "worker stops for a while": lambda: stop(worker.process, rng.choice([0.2, 1.0, 3.0])),
            "worker is cut off for a while": lambda: cut(worker.process),
            "worker's streams break": lambda: network.drop_connections(worker.process, scheduler),
            "step fails": lambda: setattr(worker.faults, "fails", True),
            "result is late": lambda: setattr(worker.faults, "answers_late_s", rng.choice([0.5, 5.0, 100.0])),
            "result comes twice": lambda: setattr(worker.faults, "answers_twice", True),
            "result of an old epoch": lambda: setattr(worker.faults, "answers_old_epoch", True),
            "scheduler dies": scheduler.kill,
            "scheduler stops": lambda: stop(scheduler, None),
            "scheduler stops for a while": lambda: stop(scheduler, rng.choice([0.2, 1.0, 3.0])),
            "new workers die while they load": loading_fails,
            "client dies": client.kill,
            "client's stream breaks": lambda: network.drop_connections(client, scheduler),
            "client is cut off for a while": lambda: cut(client),
        }
