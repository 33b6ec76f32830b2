from manta.cluster.doors.block_picture import draw_blocks
from manta.protos import engine_pb2 as pb


def test_picture_shows_holders_and_shared_blocks() -> None:
    tables = pb.BlockTablesResponse(num_blocks=100, num_free_blocks=93, num_cached_blocks=5, block_size=16)
    tables.sequences.add(
        request_id="cmpl-one", slot=1, status="running", num_tokens=100, num_computed=90,
        blocks=[4, 7, 20, 21, 22, 23, 30], ref_counts=[2, 2, 1, 1, 1, 1, 1],
    )  # fmt: skip
    tables.sequences.add(
        request_id="cmpl-a-very-long-request-id-0123456789", slot=0, status="running", num_tokens=33, num_computed=33,
        blocks=[4, 7, 9], ref_counts=[2, 2, 1],
    )  # fmt: skip
    tables.sequences.add(request_id="cmpl-late", slot=-1, status="waiting", num_tokens=10)
    lines = draw_blocks(tables).splitlines()
    assert lines == [
        "7 of 100 blocks in use (7.0 %), 2 shared, 93 free (5 of them cached), 16 tokens per block",
        "replica:slot  request                   status          computed  blocks",
        "         0:0  cmpl-a-very-lon…23456789  running            33/33  4*2 7*2 9",
        "         0:1  cmpl-one                  running           90/100  4*2 7*2 20-23 | 30",
        "         0:-  cmpl-late                 waiting             0/10  (none)",
    ]


def test_long_tables_are_wrapped() -> None:
    tables = pb.BlockTablesResponse(num_blocks=1000, num_free_blocks=900, block_size=16)
    blocks = list(range(0, 400, 4))
    tables.sequences.add(
        request_id="long", status="running", num_tokens=1600, num_computed=1600, blocks=blocks, ref_counts=[1] * 100
    )
    lines = draw_blocks(tables, width=100).splitlines()[2:]
    assert max(map(len, lines)) <= 100
    assert [int(word) for line in lines for word in line[65:].split()] == blocks


def test_empty_engine() -> None:
    assert "0 of 0 blocks" in draw_blocks(pb.BlockTablesResponse())
