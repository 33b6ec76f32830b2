"""Forms in pieces of any size, as httpx writes them, and what is no form."""

from dataclasses import dataclass

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.cluster.doors.multipart import (
    MAX_HEADER_BYTES,
    MAX_PARTS,
    MultipartError,
    MultipartReader,
    PartBegin,
    PartData,
    read_boundary,
)

# httpx writes quotes, backslashes and control characters as a browser does: such names cannot be read back.
CHARACTERS = st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_characters='"\\')
NAMES = st.text(CHARACTERS, min_size=1, max_size=9)
# Data that looks like boundaries, and is none.
PIECES = [b"\r", b"\n", b"-", b"\r\n--", b"\r\n--edg", b"\r\n-edge", b"edge", b"a", b"\0\xff"]
DATA = st.lists(st.sampled_from(PIECES)).map(b"".join).filter(lambda data: b"\r\n--edge" not in data)


@dataclass
class Part:
    name: str
    filename: str | None
    data: bytes = b""
    is_complete: bool = False


def read(body: bytes, boundary: bytes, sizes: list[int]) -> tuple[list[Part], MultipartReader]:
    """The parts of a body that comes in pieces of these sizes, again and again."""
    reader, parts, start = MultipartReader(boundary), list[Part](), 0
    while start < len(body):
        size = sizes[start % len(sizes)]
        for event in reader.feed(body[start : start + size]):
            if isinstance(event, PartBegin):
                parts.append(Part(event.name, event.filename))
            elif isinstance(event, PartData):
                assert event.data
                assert not parts[-1].is_complete
                parts[-1].data += event.data
            else:
                parts[-1].is_complete = True
        start += size
    return parts, reader


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(NAMES, NAMES, DATA), min_size=1, max_size=4), st.lists(st.integers(1, 60), min_size=1))
def test_what_httpx_writes_is_read(files: list[tuple[str, str, bytes]], sizes: list[int]) -> None:
    request = httpx.Request(
        "POST", "http://x", files=[(name, (filename, data)) for name, filename, data in files],
        headers={"content-type": "multipart/form-data; boundary=edge"},
    )  # fmt: skip
    boundary = read_boundary(request.headers["content-type"])
    parts, reader = read(request.read(), boundary, sizes)
    assert reader.is_complete
    assert parts == [Part(name, filename, data, True) for name, filename, data in files]


def test_fields_preamble_epilogue_and_spaces() -> None:
    body = (
        b'nobody reads this\r\n--edge  \r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch'
        b'\r\n--edge\r\nContent-Type: a/b\r\ncontent-disposition: form-data; name=empty; filename=""\r\n\r\n'
        b"\r\n--edge--\r\nnor this --edge"
    )
    for sizes in ([1], [7], [1000]):
        parts, reader = read(body, b"edge", sizes)
        assert parts == [Part("purpose", None, b"batch", True), Part("empty", "", b"", True)]
        assert reader.is_complete


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"x" * (MAX_HEADER_BYTES + 1), "does not begin"),
        (b"--edges\r\n", "does not end its line"),
        (b"--edge" + b" " * (MAX_HEADER_BYTES + 1), "does not end its line"),
        (b"--edge\r\n\r\ndata\r\n--edge--", "Content-Disposition"),
        (b"--edge\r\nContent-Disposition: attachment; name=a\r\n\r\n", "Content-Disposition"),
        (b"--edge\r\nX: " + b"a" * MAX_HEADER_BYTES, "headers"),
        (b'--edge\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * (MAX_PARTS + 1), "parts"),
    ],
)
def test_what_is_no_form(body: bytes, named: str) -> None:
    with pytest.raises(MultipartError, match=named):
        read(body, b"edge", [1000])


@pytest.mark.parametrize(
    "text", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 999]
)
def test_a_content_type_without_a_boundary(text: str) -> None:
    with pytest.raises(MultipartError, match="multipart/form-data"):
        read_boundary(text)


def test_an_unfinished_form_is_not_complete() -> None:
    body = b'--edge\r\nContent-Disposition: form-data; name="a"\r\n\r\ndata\r\n--edge'
    assert not read(body, b"edge", [3])[1].is_complete
