"""Server-sent events from pieces of any size (WHATWG HTML, section 9.2)."""


class EventParser:
    """Collects the `data:` of each event. Comments and other fields are skipped; lines end with LF or CRLF."""

    def __init__(self) -> None:
        self._rest = b""  # a line that has not ended yet
        self._data: list[bytes] = []  # of the event that has not ended yet

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that this piece completes."""
        lines = (self._rest + piece).split(b"\n") if self._rest else piece.split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif not line and self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
        return events

    def close(self) -> list[bytes]:
        """What a server left without its closing blank line: some end with a bare `data: [DONE]`."""
        return self.feed(b"\n\n")
