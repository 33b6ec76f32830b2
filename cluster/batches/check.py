"""The check of an input file, line by line, before a batch of it begins."""

import reprlib
from pathlib import Path
from typing import Any

from manta.cluster.batches.lines import BatchLineError, read_line
from manta.cluster.batches.records import Line

MAX_REQUESTS = 50_000  # of one batch, as in the OpenAI API
MAX_ERRORS = 100  # that are told; the rest of the file is not looked at


class InputCheck:
    """Reads the file in parts, so that others get their turn between them. `errors` are as batches tell them."""

    def __init__(self, path: Path, endpoint: str, max_line_bytes: int) -> None:
        """Raises OSError."""
        self.errors: list[dict[str, Any]] = []
        self.num_requests = 0
        self._endpoint = endpoint
        self._max_line_bytes = max_line_bytes
        self._file = path.open("rb")
        self._number = 0  # of the last line that was read
        self._position = 0  # bytes before the next one
        self._seen: dict[str, int] = {}  # custom_id -> number of its line

    def close(self) -> None:
        self._file.close()

    def read(self, num_bytes: int) -> list[Line] | None:
        """The requests on the next lines, of about so many bytes; None at the end of the check. Raises OSError."""
        end = self._position + num_bytes
        lines: list[Line] = []
        while self._position < end:
            if len(self.errors) >= MAX_ERRORS or self.num_requests > MAX_REQUESTS:
                return None
            start, data = self._position, self._next_line()
            if data is not None and not data:
                if not lines:
                    self._end()
                    return None
                break
            if data is None or data.strip():
                line = self._check(start, data)
                if line is not None:
                    lines.append(line)
        return lines

    def _next_line(self) -> bytes | None:
        """Empty at the end of the file; None for a line that is too long."""
        data = self._file.readline(self._max_line_bytes + 1)
        self._position += len(data)
        self._number += bool(data)
        if len(data) <= self._max_line_bytes:
            return data
        while data and not data.endswith(b"\n"):
            data = self._file.readline(1 << 20)
            self._position += len(data)
        return None

    def _check(self, start: int, data: bytes | None) -> Line | None:
        try:
            return self._request(start, data)
        except BatchLineError as error:
            told = {"code": error.code, "line": self._number, "message": str(error), "param": error.param}
            self.errors.append(told)
            return None

    def _request(self, start: int, data: bytes | None) -> Line:
        number = self._number
        if data is None:
            limit = f"{self._max_line_bytes / 2**20:g} MiB"
            raise BatchLineError(f"line {number} is longer than {limit}", code="line_too_long")
        request = read_line(data, number, self._endpoint)
        first = self._seen.setdefault(request.custom_id, number)
        if first != number:
            shown = reprlib.repr(request.custom_id)
            message = f"line {number}: custom_id {shown} is that of line {first}, too; it must be unique"
            raise BatchLineError(message, request.custom_id, "custom_id", "duplicate_custom_id")
        self.num_requests += 1
        if self.num_requests > MAX_REQUESTS:
            message = f"line {number}: a batch has at most {MAX_REQUESTS} requests; make several of it"
            raise BatchLineError(message, request.custom_id, None, "too_many_tasks")
        return Line(number, start, len(data), request.custom_id)

    def _end(self) -> None:
        if not self.num_requests and not self.errors:
            message = "the input file holds no request"
            self.errors.append({"code": "empty_file", "line": None, "message": message, "param": None})
