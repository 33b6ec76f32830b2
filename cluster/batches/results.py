"""Results on their way to the disk."""

import asyncio
import logging

from manta.cluster.batches.database import Database, StorageError
from manta.cluster.batches.records import Result, add_results

RETRY_S = 2.0
logger = logging.getLogger("manta.batches")


class ResultLog:
    """Results of one batch. Those that come while others are being written go together in the next transaction."""

    def __init__(self, database: Database, place: int) -> None:
        self._database = database
        self._place = place
        self._unsaved: list[Result] = []
        self._turn = asyncio.Lock()

    async def save(self, result: Result) -> None:
        """Returns when it is on the disk. A disk that is full is tried again and again."""
        self._unsaved.append(result)
        async with self._turn:
            if not any(each is result for each in self._unsaved):
                return  # whoever had the turn before took it along
            results, self._unsaved = self._unsaved, []
            while True:
                try:
                    await self._database.write(add_results, self._place, results)
                    return
                except StorageError as error:
                    logger.error("%d results of a batch wait to be written: %s", len(results), error)
                    await asyncio.sleep(RETRY_S)
