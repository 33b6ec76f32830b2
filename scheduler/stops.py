"""Which sampled tokens might end a sequence."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from manta.scheduler.types import Tokens

_NUM_MARKS = 1 << 20  # token ids above share the last mark; vocabularies are smaller


class StopTable:
    """Marks every stop id of any resident sequence, so that a step's tokens are checked with one look-up; only a
    marked token is compared with the stop ids of its own sequence."""

    def __init__(self) -> None:
        self._marks = np.zeros(_NUM_MARKS, np.bool_)
        self._counts: Counter[int] = Counter()

    def add(self, token_ids: Iterable[int]) -> None:
        for token in token_ids:
            mark = min(token, _NUM_MARKS - 1)
            self._counts[mark] += 1
            self._marks[mark] = True

    def remove(self, token_ids: Iterable[int]) -> None:
        for token in token_ids:
            mark = min(token, _NUM_MARKS - 1)
            self._counts[mark] -= 1
            if not self._counts[mark]:
                del self._counts[mark]
                self._marks[mark] = False

    def agrees_with(self, token_ids: Iterable[int]) -> bool:
        """Whether exactly these ids, as often as they are there, have been added and not removed."""
        expected = Counter(min(token, _NUM_MARKS - 1) for token in token_ids)
        num_marked = np.count_nonzero(self._marks)
        return self._counts == expected and num_marked == len(expected) and bool(self._marks[list(expected)].all())

    def candidates(self, tokens: Tokens) -> list[int]:
        """Indices of tokens that end some sequence, perhaps not their own."""
        marked = self._marks.take(tokens, mode="clip")
        return np.flatnonzero(marked).tolist() if np.count_nonzero(marked) else []  # almost always none
