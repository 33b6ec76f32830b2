"""Reads multipart/form-data as it comes in (RFC 7578): the parts of a form, whatever their size."""

import re
from dataclasses import dataclass
from email.message import Message

MAX_HEADER_BYTES = 8 * 2**10  # of one part
MAX_PARTS = 32
_LARGEST_BOUNDARY = 200  # the standard has 70
_PARAMETER = re.compile(r';\s*([\w*-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;"]*)', re.ASCII | re.DOTALL)


class MultipartError(ValueError):
    """The body is no such form; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class PartBegin:
    """A part of this name begins; `filename` only where it is a file."""

    name: str
    filename: str | None


@dataclass(frozen=True, slots=True)
class PartData:
    """The next bytes of the part; never empty."""

    data: bytes


@dataclass(frozen=True, slots=True)
class PartEnd:
    """The part is complete."""


Event = PartBegin | PartData | PartEnd


def read_boundary(content_type: str) -> bytes:
    """The boundary that a Content-Type header names. Raises MultipartError."""
    message = Message()
    message["content-type"] = content_type
    if message.get_content_type() != "multipart/form-data":
        raise MultipartError(f"Content-Type must be multipart/form-data, not {message.get_content_type()!r}")
    boundary = message.get_param("boundary")
    if not isinstance(boundary, str) or not boundary.isascii() or not 0 < len(boundary) <= _LARGEST_BOUNDARY:
        raise MultipartError("Content-Type: multipart/form-data must name a boundary")
    return boundary.encode()


class MultipartReader:
    """`feed` it the body in pieces of any size. It holds little more than the piece at hand."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._buffer = bytearray(b"\r\n")  # so that the first delimiter looks like all others
        self._step = self._skip_preamble
        self._num_parts = 0
        self.is_complete = False

    def feed(self, data: bytes) -> list[Event]:
        """What became known by these bytes. Raises MultipartError."""
        self._buffer += data
        events: list[Event] = []
        while not self.is_complete and self._step(events):
            pass
        if self.is_complete:
            self._buffer.clear()  # what follows the form means nothing
        return events

    def _skip_preamble(self, events: list[Event]) -> bool:
        """These methods return whether they came to their end and the next one can go on."""
        found = self._buffer.find(self._delimiter)
        if found < 0:
            self._limit(len(self._buffer), "the form does not begin with its boundary")
            return False
        del self._buffer[: found + len(self._delimiter)]
        self._step = self._read_delimiter_end
        return True

    def _read_delimiter_end(self, events: list[Event]) -> bool:
        if self._buffer.startswith(b"--"):
            self.is_complete = True
            return False
        end = self._buffer.find(b"\r\n")
        if end < 0:
            self._limit(len(self._buffer), "a boundary of the form does not end its line")
            return False
        if self._buffer[:end].strip(b" \t"):
            raise MultipartError("a boundary of the form does not end its line")
        del self._buffer[:end]  # the line break stays: a part without headers has nothing else before its empty line
        self._step = self._read_headers
        return True

    def _read_headers(self, events: list[Event]) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        self._limit(end if end >= 0 else len(self._buffer), "the headers of a part of the form do not end")
        if end < 0:
            return False
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise MultipartError(f"the form has more than {MAX_PARTS} parts")
        events.append(_part(bytes(self._buffer[2:end])))
        del self._buffer[: end + 4]
        self._step = self._read_data
        return True

    def _read_data(self, events: list[Event]) -> bool:
        found = self._buffer.find(self._delimiter)
        end = found if found >= 0 else len(self._buffer) - len(self._delimiter) + 1
        if end > 0:
            events.append(PartData(bytes(self._buffer[:end])))
            del self._buffer[:end]
        if found < 0:
            return False
        del self._buffer[: len(self._delimiter)]
        events.append(PartEnd())
        self._step = self._read_delimiter_end
        return True

    @staticmethod
    def _limit(num_bytes: int, message: str) -> None:
        if num_bytes > MAX_HEADER_BYTES:
            raise MultipartError(message)


def _part(headers: bytes) -> PartBegin:
    for line in headers.split(b"\r\n"):
        title, _, value = line.partition(b":")
        if title.strip().lower() != b"content-disposition":
            continue
        kind, _, rest = value.decode("utf-8", "replace").partition(";")
        words = {name.lower(): text for name, text in _PARAMETER.findall(";" + rest)}
        if kind.strip().lower() == "form-data" and "name" in words:
            filename = words.get("filename")
            return PartBegin(_unquoted(words["name"]), None if filename is None else _unquoted(filename))
    raise MultipartError("a part of the form has no 'Content-Disposition: form-data; name=\"...\"'")


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text.strip()
    return re.sub(r"\\([\"\\])", r"\1", text[1:-1])
