"""A process that was started for another one ends with it."""

import asyncio
import os

_CHECK_S = 0.5


async def parent_ended(pid: int) -> None:
    """Returns when this process is no longer a child of `pid`; never for pid 0.

    Polled, because Linux's parent-death signal is tied to the thread that started the child, not to its process.
    """
    while pid == 0 or os.getppid() == pid:
        await asyncio.sleep(_CHECK_S)
