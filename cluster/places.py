"""A bounded number of places, for which requests wait in turn."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator


class Places:
    """`num_places` of them. Used in one event loop."""

    def __init__(self, num_places: int) -> None:
        self._num_places = self._num_free = num_places
        self._waiting: OrderedDict[str, tuple[asyncio.Future[bool], int]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def taken(self, name: str, num_wanted: int) -> AsyncIterator[None]:
        """Waits for so many (at most all) of them and holds them until the block ends. `name` is the waiting one's."""
        num_wanted = min(num_wanted, self._num_places)
        holds = await self._take(name, num_wanted)
        try:
            yield
        finally:
            if holds:
                self._give_back(num_wanted)

    def let_through(self, name: str) -> None:
        """Ends the waiting of this one, without a place; nothing where it does not wait."""
        future, _ = self._waiting.pop(name, (None, 0))
        if future is not None and not future.done():
            future.set_result(False)
        self._hand_out()

    def let_all_through(self) -> None:
        for name in list(self._waiting):
            self.let_through(name)

    async def _take(self, name: str, num_wanted: int) -> bool:
        if not self._waiting and self._num_free >= num_wanted:
            self._num_free -= num_wanted
            return True
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[name] = (future, num_wanted)
        try:
            return await future
        except asyncio.CancelledError:
            if self._waiting.pop(name, None) is not None:
                self._hand_out()  # those behind may want less
            elif not future.cancelled() and future.result():
                self._give_back(num_wanted)
            raise

    def _give_back(self, num_places: int) -> None:
        self._num_free += num_places
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting:
            name, (future, num_wanted) = next(iter(self._waiting.items()))
            if not future.done():  # that of a task that is being cancelled is
                if num_wanted > self._num_free:
                    return
                self._num_free -= num_wanted
                future.set_result(True)
            del self._waiting[name]
