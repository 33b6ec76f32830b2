"""Draws which sequence holds which physical KV blocks, and which blocks several of them share."""

from manta.protos import engine_pb2 as pb

_NAME_WIDTH = 24


def draw_blocks(tables: pb.BlockTablesResponse, width: int = 120) -> str:
    """One paragraph per sequence under a line of totals, at most `width` characters wide where names allow.

    A block is its number; `7*3` is block 7, shared by 3 sequences. Runs of consecutive unshared blocks are written
    `12-15`. `|` stands between the blocks whose KV is computed and those that wait for it.
    """
    num_used = tables.num_blocks - tables.num_free_blocks
    shared = {
        (sequence.replica, block)
        for sequence in tables.sequences
        for block, refs in zip(sequence.blocks, sequence.ref_counts, strict=False)
        if refs > 1
    }
    share = 100 * num_used / tables.num_blocks if tables.num_blocks else 0.0
    lines = [
        f"{num_used} of {tables.num_blocks} blocks in use ({share:.1f} %), {len(shared)} shared, "
        f"{tables.num_free_blocks} free ({tables.num_cached_blocks} of them cached), "
        f"{tables.block_size} tokens per block"
    ]
    if not tables.sequences:
        return f"{lines[0]}\nno sequences"
    lines.append(f"{'replica:slot':>12}  {'request':<{_NAME_WIDTH}}  {'status':<9}  {'computed':>13}  blocks")
    for sequence in sorted(tables.sequences, key=lambda one: (one.replica, one.slot < 0, one.slot)):
        lines += _draw_sequence(sequence, tables.block_size, width)
    return "\n".join(lines)


def _draw_sequence(sequence: pb.SequenceBlocks, block_size: int, width: int) -> list[str]:
    place = f"{sequence.replica}:{sequence.slot}" if sequence.slot >= 0 else f"{sequence.replica}:-"
    name = sequence.request_id
    if len(name) > _NAME_WIDTH:
        name = f"{name[: _NAME_WIDTH - 9]}…{name[-8:]}"
    computed = f"{sequence.num_computed}/{sequence.num_tokens}"
    head = f"{place:>12}  {name:<{_NAME_WIDTH}}  {sequence.status:<9}  {computed:>13}  "
    lines = [head]
    for word in _words(sequence, block_size) or ["(none)"]:
        if len(lines[-1]) + len(word) > width and lines[-1].strip():
            lines.append(" " * len(head))
        lines[-1] += f"{word} "
    return [line.rstrip() for line in lines]


def _words(sequence: pb.SequenceBlocks, block_size: int) -> list[str]:
    num_filled = -(-sequence.num_computed // block_size) if block_size else len(sequence.blocks)
    refs = list(sequence.ref_counts) + [1] * (len(sequence.blocks) - len(sequence.ref_counts))
    words: list[str] = []
    run: list[int] = []  # consecutive unshared blocks not yet written
    for index, (block, num_refs) in enumerate(zip(sequence.blocks, refs, strict=True)):
        breaks = index == num_filled and index > 0
        if run and (num_refs > 1 or breaks or block != run[-1] + 1):
            words.append(_run(run))
            run = []
        if breaks:
            words.append("|")
        if num_refs > 1:
            words.append(f"{block}*{num_refs}")
        else:
            run.append(block)
    return [*words, _run(run)] if run else words


def _run(blocks: list[int]) -> str:
    if len(blocks) < 3:
        return " ".join(map(str, blocks))
    return f"{blocks[0]}-{blocks[-1]}"
