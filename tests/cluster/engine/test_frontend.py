"""What the engine keeps for one frontend."""

import asyncio

import numpy as np
import pytest

from manta.cluster.engine.frontend import Frontend, SlowFrontendError
from manta.cluster.engine.request_table import RequestTable
from manta.cluster.engine.streams import StreamTable
from manta.protos import engine_pb2 as pb
from tests.support.fake_deployment import request, run


def handles(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_steps_that_were_not_taken_come_as_one_message() -> None:
    async def test() -> None:
        frontend = Frontend(1)
        frontend.add_started(pb.Started(handle=2, num_cached_tokens=16, queue_s=0.5))
        frontend.add_tokens(handles(2, 2**63), tokens(10, 20))
        frontend.add_tokens(handles(2), tokens(11))
        frontend.add_finished(pb.Finished(handle=2, reason="stop", stop_token=11))
        message = await frontend.take()
        assert message is not None
        assert np.frombuffer(message.handles, "<u8").tolist() == [2, 2**63, 2]
        assert np.frombuffer(message.tokens, "<i4").tolist() == [10, 20, 11]

        table = StreamTable()
        _, stream = table.open([request([1], 8)] * 2)
        assert stream.handle == 2
        table.feed(message)
        chunk = await stream.next_chunk()
        assert (chunk.token_ids, chunk.finish_reason, chunk.stop_token) == ([10, 11], "stop", 11)
        assert (chunk.num_cached_tokens, chunk.queue_s) == (16, 0.5)

        waiting = asyncio.create_task(frontend.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        frontend.close()
        assert await waiting is None

    run(test())


def test_memory_is_bounded() -> None:
    async def test() -> None:
        frontend = Frontend(1, max_pending_bytes=1200)
        for _ in range(10_000):
            frontend.add_tokens(handles(*range(10)), tokens(*range(10)))
        assert sum(map(len, frontend._tokens)) <= 1200
        with pytest.raises(SlowFrontendError, match="at most 1200"):
            await frontend.take()

    run(test())


def test_request_ids_are_unique_and_find_their_rows() -> None:
    table = RequestTable(num_rows=2)
    first = [table.open(frontend=1, handle=100 + i, tenant=0, now_s=float(i)) for i in range(5)]
    assert len(set(first)) == 5
    rows = table.rows(np.array(first))
    assert table.handle[rows].tolist() == [100, 101, 102, 103, 104]
    assert table.arrival_s[rows].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    table.last_token_s[table.row(first[2])] = 7.0
    table.close(first[2])
    again = table.open(frontend=2, handle=9, tenant=0, now_s=8.0)
    assert table.row(again) == table.row(first[2])
    assert again not in first
    assert table.last_token_s[table.row(again)] == 0.0
