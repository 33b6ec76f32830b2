"""The order in which a rank reads its tensors: as they lie on disk, read ahead, with a word now and then on how far it
is."""

import logging
import time
from collections.abc import Callable, Collection, Iterator

from manta.workers.checkpoint import Checkpoint
from manta.workers.read_ahead import ReadAhead

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 5.0


class Progress:
    """Says how much has been read, every few seconds and at the end."""

    def __init__(self, total_bytes: int, now_s: Callable[[], float] = time.perf_counter) -> None:
        self._total_bytes = total_bytes
        self._now_s = now_s
        self._began_s = self._reported_s = now_s()
        self._done_bytes = 0

    def add(self, num_bytes: int) -> None:
        """So many bytes more have been read and copied."""
        self._done_bytes += num_bytes
        now_s = self._now_s()
        if now_s - self._reported_s >= REPORT_EVERY_S and self._done_bytes < self._total_bytes:
            self._reported_s = now_s
            logger.info("read %s of %s of weights, %s/s", *self._figures(now_s))

    def finish(self) -> None:
        now_s = self._now_s()
        done, _, rate = self._figures(now_s)
        logger.info("read %s of weights in %.1f s, %s/s", done, now_s - self._began_s, rate)

    def _figures(self, now_s: float) -> tuple[str, str, str]:
        rate = self._done_bytes / max(now_s - self._began_s, 1e-9)
        return _gib(self._done_bytes), _gib(self._total_bytes), _gib(rate)


def in_disk_order(checkpoint: Checkpoint, names: Collection[str], *, ahead: bool) -> Iterator[str]:
    """The names, each when it should be read; when the next is asked for, the last one has been.

    Tensors count with all their bytes, also those of which a rank reads a part. `ahead`: whether threads fetch what
    comes next, which is quicker only where there are cores for them.
    """
    ordered = disk_order(checkpoint, names)
    extents = {name: checkpoint.extent(name) for name in ordered}
    progress = Progress(sum(extent.end - extent.begin for extent in extents.values()))
    with ReadAhead([extents[name] for name in ordered] if ahead else []) as fetching:
        for name in ordered:
            yield name
            num_bytes = extents[name].end - extents[name].begin
            fetching.advance(num_bytes)
            progress.add(num_bytes)
    progress.finish()


def disk_order(checkpoint: Checkpoint, names: Collection[str]) -> list[str]:
    """File by file, as their bytes lie."""
    return sorted(names, key=checkpoint.extent)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
