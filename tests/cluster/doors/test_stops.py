"""Stop strings, against a search over the whole text."""

from hypothesis import given
from hypothesis import strategies as st

from manta.cluster.doors.stops import StopStrings

ALPHABET = "abX"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4, unique=True)
PIECES = st.lists(st.text(ALPHABET, max_size=4), max_size=12)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(STOPS, PIECES, st.booleans())
def test_equals_a_search_over_the_whole_text(stops: list[str], pieces: list[str], include: bool) -> None:
    checker = StopStrings(stops, include)
    sent = ""
    for piece in pieces:
        sent += checker.push(piece)
    sent += checker.flush()
    assert (sent, checker.matched) == expected("".join(pieces), stops, include)


@given(STOPS, PIECES)
def test_holds_back_no_more_than_needed(stops: list[str], pieces: list[str]) -> None:
    checker = StopStrings(stops)
    sent = ""
    text = ""
    for piece in pieces:
        sent += checker.push(piece)
        text += piece
        if checker.matched:
            return
        lengths = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        assert len(text) - len(sent) == max(lengths, default=0)


def test_nothing_follows_a_match() -> None:
    checker = StopStrings(["END"])
    assert checker.push("one EN") == "one "
    assert checker.push("D two") == ""
    assert checker.matched == "END"
    assert checker.push("three") == ""
    assert checker.flush() == ""
