"""Log-probabilities as a frontend gets them and as callers read them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token at one place; vLLM's names."""

    logprob: float
    rank: int | None = None  # 1 for the most probable token
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class Records:
    """What the engine says of N tokens: of the model's own distribution, natural logarithms."""

    chosen: list[float]  # [N]
    ranks: list[int]  # [N], 1 for the most probable token
    best_ids: list[list[int]]  # [N, k], most probable first
    best: list[list[float]]  # [N, k]

    def __len__(self) -> int:
        return len(self.chosen)

    def extend(self, other: "Records") -> None:
        """Appends those of further tokens."""
        self.chosen.extend(other.chosen)
        self.ranks.extend(other.ranks)
        self.best_ids.extend(other.best_ids)
        self.best.extend(other.best)

    def first(self, num_tokens: int) -> "Records":
        """Of the first so many tokens."""
        return Records(
            self.chosen[:num_tokens], self.ranks[:num_tokens], self.best_ids[:num_tokens], self.best[:num_tokens]
        )

    def by_token(
        self, token_ids: list[int], decode: Callable[[int], str] | None, num_best: int | None = None
    ) -> list[dict[int, Logprob]]:
        """vLLM's form: for each of token_ids [N] first itself, then the num_best (all there are, if None) best."""

        def entry(token: int, logprob: float, rank: int) -> Logprob:
            return Logprob(logprob, rank, None if decode is None else decode(token))

        places = []
        for token, chosen, rank, ids, best in zip(
            token_ids, self.chosen, self.ranks, self.best_ids, self.best, strict=True
        ):
            place = {token: entry(token, chosen, rank)}
            for other, (other_id, logprob) in enumerate(zip(ids[:num_best], best[:num_best], strict=True), start=1):
                if other_id != token:
                    place[other_id] = entry(other_id, logprob, other)
            places.append(place)
        return places


def no_records() -> Records:
    """Of no token, to be extended."""
    return Records([], [], [], [])


def read_records(data: bytes, num_best: int) -> Records:
    """Records as in manta.worker.v1.StepResult, with so many of the best each. Raises ValueError for other data."""
    words = np.frombuffer(data, "<i4").reshape(-1, 2 + 2 * num_best)
    return Records(
        words[:, 0].copy().view("<f4").tolist(),
        words[:, 1].tolist(),
        words[:, 2 : 2 + num_best].tolist(),
        words[:, 2 + num_best :].copy().view("<f4").tolist(),
    )
