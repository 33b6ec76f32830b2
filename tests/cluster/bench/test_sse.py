"""Events come out whole, wherever the stream is cut."""

import pytest

from manta.cluster.bench.sse import EventParser

STREAM = (
    b": a comment\n\n"
    b'data: {"a": "\xc3\xa9"}\n\n'
    b"event: ping\nid: 3\ndata:no space\n\n"
    b"data: two\ndata:  lines\n\n\n"
    b"data\n\nretry: 5\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [b'{"a": "\xc3\xa9"}', b"no space", b"two\n lines", b"[DONE]"]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_split_at_every_byte(newline: bytes) -> None:
    stream = STREAM.replace(b"\n", newline)
    expected = [event.replace(newline, b"\n") for event in EVENTS]
    for cut in range(len(stream) + 1):
        parser = EventParser()
        assert parser.feed(stream[:cut]) + parser.feed(stream[cut:]) == expected
    parser = EventParser()
    assert [event for byte in stream for event in parser.feed(bytes([byte]))] == expected


def test_end_without_a_blank_line() -> None:
    parser = EventParser()
    assert parser.feed(b"data: 1\n\ndata: [DONE]") == [b"1"]
    assert parser.close() == [b"[DONE]"]
    assert EventParser().close() == []
