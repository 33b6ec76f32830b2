"""How much batches may have of an engine whose load is made up, and lines that leave it and come back."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from manta.cluster.batches import gate
from manta.cluster.batches.background import BackgroundClient, current_place
from manta.cluster.batches.gate import Gate, Place, Room
from manta.cluster.engine.client import EngineClient, EngineLostError, GenerationRequest
from manta.cluster.engine.types import BACKGROUND
from manta.protos import engine_pb2 as pb
from tests.support.fake_deployment import fake_deployment, request, run, until

ROOM = Room(num_slots=64, num_beside=6)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "POLL_S", 0.001)
    monkeypatch.setattr(gate, "QUIET_S", 0.02)


class Engine:
    """Its load is what the gate lets in, and others."""

    def __init__(self) -> None:
        self.gate = Gate(self.load, ROOM)
        self.places: list[Place] = []
        self.num_others = self.num_waiting = 0
        self.kv_cache_usage = 0.0
        self.is_lost = False
        self.most_beginning = 0

    @property
    def num_running(self) -> int:
        return sum(place.num_sequences for place in self.running)

    async def load(self) -> pb.LoadResponse:
        self.note_beginning()
        if self.is_lost:
            raise EngineLostError("it is gone")
        return pb.LoadResponse(
            num_running=self.num_running + self.num_others, num_waiting=self.num_waiting, healthy=True,
            num_background=self.num_running, kv_cache_usage=self.kv_cache_usage,
        )  # fmt: skip

    async def take(self, num_lines: int, num_sequences: int = 1) -> None:
        for _ in range(num_lines):
            self.places.append(await self.gate.enter(num_sequences))
            self.note_beginning()

    def note_beginning(self) -> None:
        """Soon every line that runs has its first token."""
        for place in self.places:
            self.most_beginning = max(self.most_beginning, sum(not each.has_begun for each in self.running))
            if not place.is_paused:
                asyncio.get_running_loop().call_later(0.002, place.begin)

    @property
    def running(self) -> list[Place]:
        return [place for place in self.places if not place.is_paused]

    def leave(self, place: Place) -> None:
        self.places.remove(place)
        self.gate.leave(place)


def with_engine(test: Callable[[Engine], Coroutine[Any, Any, None]]) -> None:
    async def go() -> None:
        engine = Engine()
        watching = asyncio.create_task(engine.gate.watch())
        await test(engine)
        watching.cancel()

    run(go())


async def settled(engine: Engine) -> None:
    """Several answers later."""
    for _ in range(20):
        await asyncio.sleep(gate.POLL_S)


def test_alone_they_take_nearly_all_slots_bit_by_bit() -> None:
    async def test(engine: Engine) -> None:
        taking = asyncio.create_task(engine.take(200))
        await until(lambda: engine.num_running == ROOM.num_alone, "all slots but some")
        await settled(engine)
        assert engine.num_running == ROOM.num_alone == 56
        assert 1 < engine.most_beginning <= 56 // gate.STARTING
        engine.leave(engine.places[3])
        await until(lambda: engine.num_running == 56, "the next one")
        taking.cancel()

    with_engine(test)


def test_others_make_the_youngest_pause() -> None:
    async def test(engine: Engine) -> None:
        taking = asyncio.create_task(engine.take(40))
        await until(lambda: engine.num_running == 40, "all of them")
        engine.num_others = 1
        await until(lambda: engine.num_running == ROOM.num_beside, "that most pause")
        assert [place.is_paused for place in engine.places] == [False] * 6 + [True] * 34
        engine.leave(engine.places[0])  # the oldest that pauses takes its place
        await until(lambda: engine.num_running == 6, "the next one")
        engine.num_others = 0
        await until(lambda: engine.num_running == 39, "that all go on")
        assert taking.done()

    with_engine(test)


def test_they_make_way_for_those_who_wait() -> None:
    async def test(engine: Engine) -> None:
        await engine.take(4)
        engine.num_others, engine.num_waiting = ROOM.num_slots, 3
        await until(lambda: engine.num_running == 0, "that all pause")
        engine.num_waiting = 0
        engine.num_others = 10
        await until(lambda: engine.num_running == 4, "that they go on")
        engine.kv_cache_usage, engine.num_waiting = 0.95, 1
        await until(lambda: engine.num_running == 0, "that all pause")

    with_engine(test)


def test_a_full_cache_lets_nobody_in() -> None:
    async def test(engine: Engine) -> None:
        await engine.take(4)
        engine.kv_cache_usage = 0.95
        await settled(engine)
        taking = asyncio.create_task(engine.take(4))
        await settled(engine)
        assert engine.num_running == 4
        engine.kv_cache_usage = 0.5
        await taking

    with_engine(test)


def test_a_lost_engine_gets_nothing_new() -> None:
    async def test(engine: Engine) -> None:
        await engine.take(2)
        engine.is_lost = True
        await settled(engine)
        taking = asyncio.create_task(engine.take(1))
        await settled(engine)
        assert len(engine.places) == 2
        engine.is_lost = False
        await taking

    with_engine(test)


def test_a_line_with_more_sequences_than_there_is_room_runs_alone() -> None:
    async def test(engine: Engine) -> None:
        engine.num_others = 1
        taking = asyncio.create_task(engine.take(2, num_sequences=50))
        await until(lambda: len(engine.places) == 1, "the first")
        await settled(engine)
        assert engine.num_running == 50
        engine.leave(engine.places[0])
        await taking

    with_engine(test)


def test_who_gives_up_waiting_is_passed_over() -> None:
    async def test(engine: Engine) -> None:
        engine.is_lost = True
        waiting = [asyncio.create_task(engine.take(1)) for _ in range(3)]
        await settled(engine)
        waiting[0].cancel()
        engine.is_lost = False
        await asyncio.gather(*waiting[1:])
        assert len(engine.places) == 2

    with_engine(test)


def test_what_paused_ends_as_if_nothing_had_been() -> None:
    """Through a real engine: pauses at any time change no token, and others get what the line had."""

    async def test() -> None:
        async with fake_deployment() as running:
            client = running.client
            asked = request([3, 1, 4], 60, seed=7, logprobs=1, name="line")
            alone = [chunk async for chunk in client.generate(asked)]
            for pause_after in (0, 1, 5, 40):
                chunks = await interrupted(client, asked, pause_after)
                assert [t for c in chunks for t in c.token_ids] == [t for c in alone for t in c.token_ids]
                assert b"".join(c.logprobs for c in chunks) == b"".join(c.logprobs for c in alone)
                assert chunks[-1].finish_reason == alone[-1].finish_reason == "length"

    run(test())


async def interrupted(client: EngineClient, asked: GenerationRequest, pause_after: int) -> list[Any]:
    """The chunks of a request that pauses when it has so many tokens, until the engine has nothing of it."""
    place = Place(1)
    current_place.set(place)
    chunks: list[Any] = []

    async def read() -> None:
        async for chunk in BackgroundClient(client).generate(asked):
            chunks.append(chunk)
            if place_changes and sum(len(each.token_ids) for each in chunks) >= pause_after:
                place.set_running(place_changes.pop())

    place_changes = [False]
    if not pause_after:
        place.set_running(place_changes.pop())
    reading = asyncio.create_task(read())
    await until(lambda: place.is_paused, "the pause")
    while (await client.load()).num_running:
        await asyncio.sleep(0.001)
    assert not reading.done()
    place.set_running(True)
    await reading
    return chunks


def test_lines_have_the_lowest_priority_and_are_counted() -> None:
    async def test() -> None:
        async with fake_deployment() as running:
            client = running.client
            current_place.set(Place(1))
            background = BackgroundClient(client)
            streams = [background.generate(request([1], 400)), client.generate(request([2], 400))]
            for stream in streams:
                await anext(stream)
            load = await client.load()
            assert (load.num_running, load.num_background) == (2, 1)
            group = background.generate_group([request([1], 2, seed=seed) for seed in range(2)])
            assert all(each.priority == BACKGROUND for each in group._requests)  # type: ignore[attr-defined]
            group.close()

    run(test())
