"""How much of the engine batches may have: what other requests leave, found out by asking how it is loaded."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from manta.cluster.engine.client import EngineError
from manta.protos import engine_pb2 as pb

POLL_S = 0.05  # between two questions while there are lines to run
QUIET_S = 0.5  # without other requests, until batches take what there is
LOAD_TIMEOUT_S = 5.0
RESERVE = 8  # one slot in so many stays free for whoever comes next
FULL_CACHE = 0.9  # of the KV blocks: batches take no more
STARTING = 16  # one line in so many, and two at least, may be without its first token; one beside other requests
T = TypeVar("T")
logger = logging.getLogger("manta.batches")


class Place:
    """A line's leave to run. It may have to pause: what it has in the engine leaves, and comes back later."""

    def __init__(self, num_sequences: int, on_begin: Callable[[], None] = lambda: None) -> None:
        self.num_sequences = num_sequences
        self.has_begun = False  # it has a token since it last entered the engine: its prompt is computed
        self._on_begin = on_begin
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._readers: set[asyncio.Task[object]] = set()

    @property
    def is_paused(self) -> bool:
        return not self._may_run.is_set()

    def begin(self) -> None:
        if not self.has_begun:
            self.has_begun = True
            self._on_begin()

    def set_running(self, runs: bool) -> None:
        if runs:
            self._may_run.set()
        elif not self.is_paused:
            self._may_run.clear()
            self.has_begun = False
            for task in self._readers:
                task.cancel()

    async def wait_running(self) -> None:
        await self._may_run.wait()

    async def unless_paused(self, work: Awaitable[T]) -> T | None:
        """What `work` gives; None, with `work` cancelled, as soon as the line has to pause."""
        task = asyncio.current_task()
        assert task is not None
        self._readers.add(task)
        try:
            return await work
        except asyncio.CancelledError:
            if self.is_paused and task.uncancel() == 0:
                return None
            raise  # the line is given up
        finally:
            self._readers.discard(task)


@dataclass(frozen=True, slots=True)
class Room:
    """What there is for batches at most, in sequences."""

    num_slots: int  # of all replicas together
    num_beside: int  # while other requests run

    @property
    def num_alone(self) -> int:
        return max(1, self.num_slots - max(1, self.num_slots // RESERVE))


class Gate:
    """Hands out places in the order in which they are asked for. While `watch` runs, the number of sequences that have
    one follows the engine's load:

    - Nobody else is there: up to Room.num_alone.
    - Other requests are there: up to Room.num_beside. Places beyond it pause, the youngest first.
    - Other requests wait for slots or blocks: fewer and fewer, down to none.

    Few begin at a time: lines that ended together would otherwise put all their successors' prompts into one step, and
    whoever comes next waits for it.
    """

    def __init__(self, load: Callable[[], Awaitable[pb.LoadResponse]], room: Room) -> None:
        self._load = load
        self._room = room
        self._allowed = 0  # sequences
        self._places: dict[Place, None] = {}  # the oldest first
        self._waiting: deque[tuple[Place, asyncio.Future[None]]] = deque()
        self._is_wanted = asyncio.Event()  # somebody has a place or waits for one
        self._busy_s = -QUIET_S  # when other requests were last seen, by the loop's clock
        self._is_busy = False  # they are there, or were a moment ago

    async def enter(self, num_sequences: int) -> Place:
        """Waits for a place, which must be given back with `leave`."""
        place = Place(num_sequences, self._grant)
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((place, granted))
        self._is_wanted.set()
        self._grant()
        try:
            await granted
        except BaseException:
            self.leave(place)
            raise
        return place

    def leave(self, place: Place) -> None:
        """Whoever waits next gets the room."""
        self._places.pop(place, None)
        self._grant()

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._is_wanted.wait()
            self._allowed = self._allowed_by(await self._ask())
            self._divide()
            self._grant()
            if not self._places and not self._waiting:
                self._is_wanted.clear()
                self._allowed = 0
            await asyncio.sleep(POLL_S)

    async def _ask(self) -> pb.LoadResponse | None:
        """None when the engine does not tell."""
        try:
            return await asyncio.wait_for(self._load(), LOAD_TIMEOUT_S)
        except (EngineError, TimeoutError) as error:
            logger.warning("batches wait: the engine does not tell its load: %s", error)
            return None

    def _allowed_by(self, load: pb.LoadResponse | None) -> int:
        used = sum(place.num_sequences for place in self._places if not place.is_paused)
        if load is None or not load.healthy:
            return min(self._allowed, used)
        now_s = asyncio.get_running_loop().time()
        num_all = load.num_running + load.num_waiting
        if num_all > load.num_background:
            self._busy_s = now_s
        self._is_busy = now_s < self._busy_s + QUIET_S
        is_full = load.num_running >= self._room.num_slots or load.kv_cache_usage > FULL_CACHE
        allowed = self._room.num_beside if self._is_busy else self._room.num_alone
        if is_full and self._is_busy and load.num_waiting:
            return min(allowed, used - max(1, used // 4)) if used else 0
        return min(allowed, used) if is_full else allowed

    def _divide(self) -> None:
        """Lets the oldest places run as far as there is room; a single one may have more sequences than that."""
        used = 0
        for place in self._places:
            has_room = self._has_room(used, place)
            if not has_room or (place.is_paused and self._may_begin()):
                place.set_running(has_room)
            used += place.num_sequences

    def _grant(self) -> None:
        used = sum(place.num_sequences for place in self._places)  # those that pause come before those that wait
        while self._waiting:
            place, granted = self._waiting[0]
            if not granted.done():
                if not self._has_room(used, place) or not self._may_begin():
                    return
                self._places[place] = None
                granted.set_result(None)
                used += place.num_sequences
            self._waiting.popleft()

    def _has_room(self, used: int, place: Place) -> bool:
        return self._allowed > 0 and (not used or used + place.num_sequences <= self._allowed)

    def _may_begin(self) -> bool:
        num_beginning = sum(not place.has_begun and not place.is_paused for place in self._places)
        return num_beginning < (1 if self._is_busy else max(2, self._allowed // STARTING))
