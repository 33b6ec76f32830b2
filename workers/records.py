"""What a step tells about its tokens' log-probabilities, as `protos/worker.proto` has it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from manta.workers.columns import Ints
from manta.workers.pooler import Vectors
from manta.workers.transfer import download


@dataclass(frozen=True, slots=True)
class Records:
    """Of M tokens, on the device or on their way to the host."""

    rows: Ints  # int64 [M]: the step's rows that they belong to, ascending
    num_best: Ints  # int64 [M]: of how many of the best tokens each tells, K at most
    chosen: Tensor  # float32 [M]
    ranks: Tensor  # int64 [M]
    ids: Tensor  # int64 [M, K]
    best: Tensor  # float32 [M, K]

    def download(self) -> "Records":
        """In host memory; on a GPU the copies are only launched."""
        return Records(self.rows, self.num_best, *map(download, (self.chosen, self.ranks, self.ids, self.best)))

    def words(self, width: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """int32 [M, 2 + 2 * width], and which of them count, as bool of the same shape. In host memory only."""
        num_best = self.ids.shape[1]
        words = np.zeros((len(self.rows), 2 + 2 * width), "<i4")
        words[:, 0] = self.chosen.numpy().view("<i4")
        words[:, 1] = self.ranks.numpy()
        words[:, 2 : 2 + num_best] = self.ids.numpy()
        words[:, 2 + width : 2 + width + num_best] = self.best.numpy().view("<i4")
        is_told = np.arange(width)[None, :] < self.num_best[:, None]
        counts = np.concatenate([np.ones((len(self.rows), 2), np.bool_), is_told, is_told], axis=1)
        return words, counts


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step tells of its rows, on the ranks of the last stage."""

    tokens: Tensor | None = None  # int64 [N], the sampled ids; None where nothing is sampled
    records: Sequence[Records] = ()  # of rows that asked for log-probabilities, on the rank that answers
    vectors: Vectors | None = None  # of prompts that become vectors, there too


NOTHING = StepOutput()


def encode(parts: Sequence[Records]) -> bytes:
    """The column of a StepResult: by row, and of one row in the order of the parts."""
    if not parts:
        return b""
    width = max(part.ids.shape[1] for part in parts)
    words, counts = zip(*(part.words(width) for part in parts), strict=True)
    order = np.argsort(np.concatenate([part.rows for part in parts]), kind="stable")
    column: bytes = np.concatenate(words)[order][np.concatenate(counts)[order]].tobytes()
    return column
