"""Lines of a batch against a fake server: each gets exactly one line, whatever is on it and however it ends."""

import asyncio
import json
from typing import Any

import pytest

from manta.cluster.batches import run
from manta.cluster.batches.lines import BatchLineError, read_line
from manta.cluster.batches.run import Counts, SendError, run_lines


def request(custom_id: str = "a", url: str = "/v1/completions", **body: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode() + b"\n"


class FakeServer:
    """Answers with what it was asked; the largest number of calls at once is kept."""

    def __init__(self) -> None:
        self.num_running = self.most_running = 0
        self.statuses: dict[str, list[int]] = {}  # prompt -> statuses of the first answers
        self.calls: list[tuple[str, Any]] = []

    async def __call__(self, url: str, body: bytes) -> tuple[int, bytes]:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        asked = json.loads(body)
        self.calls.append((url, asked))
        await asyncio.sleep(0)
        self.num_running -= 1
        if asked.get("prompt") == "gone":
            raise SendError("no connection")
        status = next(iter(self.statuses.get(asked.get("prompt"), [])), 200)
        if status != 200:
            self.statuses[asked["prompt"]].pop(0)
        return status, json.dumps({"id": "cmpl-1", "asked": asked}).encode()


def run_all(lines: list[bytes], server: FakeServer, window: int = 4) -> tuple[Counts, list[dict[str, Any]]]:
    written: list[bytes] = []
    counts = asyncio.run(run_lines(lines, server, written.append, window))
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in written)
    return counts, [json.loads(line) for line in written]


def test_every_request_gets_its_answer() -> None:
    server = FakeServer()
    lines = [request(str(index), prompt=f"p{index}", max_tokens=index) for index in range(50)]
    counts, written = run_all([*lines, b"\n", b"  \n"], server, window=7)
    assert counts == Counts(answered=50)
    assert server.most_running == 7
    assert sorted(int(line["custom_id"]) for line in written) == list(range(50))
    for line in written:
        asked = line["response"]["body"]["asked"]
        assert asked == {"prompt": f"p{line['custom_id']}", "max_tokens": int(line["custom_id"])}
        assert (line["response"]["status_code"], line["response"]["request_id"]) == (200, "cmpl-1")
        assert line["error"] is None
    assert len({line["id"] for line in written}) == 50


BAD_LINES = [
    (b"{", None, "not valid JSON"),
    (b"[1]", None, "JSON object"),
    (b"{}", None, "custom_id"),
    (b'{"custom_id": 3, "url": "/v1/completions", "body": {}}', None, "custom_id"),
    (b'{"custom_id": "a", "url": "/v1/images", "body": {}}', "a", "/v1/images"),
    (b'{"custom_id": "a", "url": ["/v1/completions"], "body": {}}', "a", "url"),
    (b'{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}', "a", "GET"),
    (b'{"custom_id": "a", "url": "/v1/completions"}', "a", "body"),
    (request("a", stream=True), "a", "stream"),
    (b"\xff\xfe", None, "not valid JSON"),
]


@pytest.mark.parametrize(("line", "custom_id", "named"), BAD_LINES, ids=[str(line) for line, _, _ in BAD_LINES])
def test_a_bad_line_harms_no_other(line: bytes, custom_id: str | None, named: str) -> None:
    counts, written = run_all([request("x", prompt="1"), line, request("y", prompt="2")], FakeServer())
    assert counts == Counts(answered=2, failed=1)
    (bad,) = [each for each in written if each["error"]]
    assert (bad["custom_id"], bad["response"]) == (custom_id, None)
    assert bad["error"]["code"] == "invalid_request"
    assert "line 2" in bad["error"]["message"]
    assert named in bad["error"]["message"]


def test_refusals_and_lost_answers_are_told() -> None:
    server = FakeServer()
    server.statuses["bad"] = [400]
    counts, written = run_all([request("a", prompt="bad"), request("b", prompt="gone"), request("c")], server)
    assert counts == Counts(answered=1, refused=1, failed=1)
    by_id = {line["custom_id"]: line for line in written}
    assert by_id["a"]["response"]["status_code"] == 400
    assert by_id["b"]["error"] == {"code": "no_answer", "message": "no connection"}


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "FIRST_PAUSE_S", 0.0)
    server = FakeServer()
    server.statuses = {"later": [503, 429, 503], "never": [503] * 100}
    counts, written = run_all([request("a", prompt="later"), request("b", prompt="never")], server)
    assert counts == Counts(answered=1, refused=1)
    assert {line["custom_id"]: line["response"]["status_code"] for line in written} == {"a": 200, "b": 503}
    assert [asked["prompt"] for _, asked in server.calls].count("never") == run.MAX_TRIES


def test_an_output_that_cannot_be_written_ends_the_batch() -> None:
    def write(line: bytes) -> None:
        raise OSError(28, "No space left on device")

    async def go() -> None:
        await run_lines((request(str(index)) for index in range(10_000)), FakeServer(), write, 2)
        raise AssertionError("went on")

    with pytest.raises(OSError, match="No space left"):
        asyncio.run(go())
    assert FakeServer().num_running == 0


def test_a_file_may_begin_with_a_byte_order_mark() -> None:
    line = b'\xef\xbb\xbf{"custom_id": "a", "url": "/v1/completions", "body": {}}'
    assert read_line(line, 1).custom_id == "a"
    with pytest.raises(BatchLineError, match="not valid JSON"):
        read_line(line, 2)


def test_lines_are_read_as_they_are_needed() -> None:
    server = FakeServer()
    most_ahead = 0
    num_written = 0

    def lines() -> Any:
        nonlocal most_ahead
        for index in range(200):
            most_ahead = max(most_ahead, index - num_written)
            yield request(str(index))

    def write(line: bytes) -> None:
        nonlocal num_written
        num_written += 1

    asyncio.run(run_lines(lines(), server, write, 5))
    assert num_written == 200
    assert most_ahead <= 6
