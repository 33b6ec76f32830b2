"""Finds stop strings in text that arrives in pieces."""

from collections.abc import Sequence


def _failure(pattern: str) -> list[int]:
    """Failure function of Knuth, Morris and Pratt, "Fast pattern matching in strings" (1977)."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        table[i] = length
    return table


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may still become one.

    The stop string that ends first wins, of several that end at the same character the longest; so the verdict does
    not depend on how the text is cut into pieces. A character costs O(1) amortised per stop string.
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self.matched: str | None = None
        self._stops = sorted(stops, key=len, reverse=True)
        self._failures = [_failure(stop) for stop in self._stops]
        self._lengths = [0] * len(stops)  # characters of each stop string that the text so far ends with
        self._first_characters = {stop[0] for stop in stops}
        self._include = include_in_output
        self._held = ""  # not yet let through: the longest end of the text that begins a stop string

    def push(self, text: str) -> str:
        """The text that may go out now. `matched` is set when a stop string is complete; what follows it is dropped."""
        if self.matched is not None:
            return ""
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        buffer = self._held + text
        for position in range(len(self._held), len(buffer)):
            stop = self._advance(buffer[position])
            if stop is not None:
                self.matched = stop
                self._held = ""
                end = position + 1
                return buffer[: end if self._include else end - len(stop)]
        self._held = buffer[len(buffer) - max(self._lengths) :]
        return buffer[: len(buffer) - len(self._held)]

    def flush(self) -> str:
        """What is still held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        found = None
        for index, stop in enumerate(self._stops):
            failure, length = self._failures[index], self._lengths[index]
            while length and stop[length] != character:
                length = failure[length - 1]
            if stop[length] == character:
                length += 1
            self._lengths[index] = length
            if length == len(stop) and found is None:
                found = stop
        return found
