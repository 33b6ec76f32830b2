"""Attention over pages against the reference. Pages hold NaN or infinity wherever no token was written."""

import pytest
import torch
from torch import Tensor

from manta.kernels import reference
from manta.kernels.metadata import AttentionMetadata
from tests.support.decoder_kernels import INFINITY, NAN, VARIANTS, PagedHeads, Variant
from tests.support.paging import PagedSequences
from tests.support.tolerances import KERNEL, relative_error

# heads, KV heads, head dim, block size
SHAPES = [
    (1, 1, 16, 8),
    (4, 4, 64, 16),
    (6, 3, 20, 16),
    (6, 2, 80, 8),
    (8, 2, 96, 32),
    (5, 1, 128, 64),
    (12, 2, 24, 8),
    (7, 1, 256, 16),
    (16, 2, 64, 64),
    (3, 3, 48, 32),
]
MIXED = [[(0, 30), (1, 1), (2, 16), (6, 200)], [(0, 1), (1, 1), (6, 1), (2, 1), (3, 33), (4, 17), (5, 2)]]
PREFILL = [[(0, 130), (1, 3)], [(0, 75), (2, 1), (1, 13)]]
DECODE = [[(0, 140), (1, 7), (2, 127), (3, 15)], [(3, 1), (2, 1), (1, 1), (0, 1), (4, 1)]]
LONG = [[(0, 1500), (1, 3), (2, 511), (3, 1024)], [(0, 1), (1, 1), (2, 1), (3, 1)]]
STEPS = {"mixed": MIXED, "prefill": PREFILL, "decode": DECODE}


def fill(
    heads: PagedHeads, steps: list[list[tuple[int, int]]], amplitude: float = 1.0
) -> tuple[Tensor, AttentionMetadata]:
    """Writes the steps' tokens to the pages; the last step's qkv and metadata."""
    sequences = PagedSequences(heads.block_size, num_blocks=heads.keys.shape[0])
    for rows in steps:
        metadata = sequences.step(rows)
        qkv = torch.randn(metadata.positions.numel(), heads.qkv_size) * amplitude
        heads.write(qkv, metadata)
    return qkv, metadata


def expected_attention(
    heads: PagedHeads, qkv: Tensor, metadata: AttentionMetadata, scale: float, window: int | None
) -> Tensor:
    keys, values = heads.unpaged()
    q = qkv[:, : heads.num_heads * heads.dim]
    return reference.paged_attention(q, keys, values, metadata, scale, window)


def close(out: Tensor, expected: Tensor) -> bool:
    return relative_error(out, expected) < KERNEL[out.dtype]


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim", "block_size"), SHAPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_attention(
    variant: Variant, num_heads: int, num_kv_heads: int, dim: int, block_size: int, window: int | None
) -> None:
    filler = NAN if window is None else INFINITY
    for name, steps in STEPS.items():
        heads = PagedHeads(variant, num_heads, num_kv_heads, dim, block_size, 480 // block_size + 12, filler)
        qkv, metadata = fill(heads, steps)
        out = heads.attend(qkv, metadata, dim**-0.5, window)
        assert close(out, expected_attention(heads, qkv, metadata, dim**-0.5, window)), name


@pytest.mark.parametrize("window", [None, 40, 700])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim", "block_size"), [(6, 2, 20, 8), (4, 4, 64, 16), (8, 1, 32, 64)]
)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_long_sequences_in_parts(
    variant: Variant, num_heads: int, num_kv_heads: int, dim: int, block_size: int, window: int | None
) -> None:
    heads = PagedHeads(variant, num_heads, num_kv_heads, dim, block_size, 3100 // block_size + 9, NAN)
    qkv, metadata = fill(heads, LONG)
    whole = heads.attend(qkv, metadata, dim**-0.5, window)
    expected = expected_attention(heads, qkv, metadata, dim**-0.5, window)
    assert close(whole, expected)
    for num_threads in (2, 5, 40):
        out = heads.attend(qkv, metadata, dim**-0.5, window, num_threads)
        assert close(out, expected), num_threads
        assert close(out, whole), num_threads


@pytest.mark.parametrize("window", [None, 40, 700])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim", "block_size"),
    [(3, 1, 64, 16), (2, 2, 128, 8), (5, 1, 20, 32), (1, 1, 256, 64)],
)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_long_prompts(
    variant: Variant, num_heads: int, num_kv_heads: int, dim: int, block_size: int, window: int | None
) -> None:
    """Several chunks of a sequence for items of many tiles, whose queries begin in the middle of it."""
    heads = PagedHeads(variant, num_heads, num_kv_heads, dim, block_size, 2100 // block_size + 9, NAN)
    qkv, metadata = fill(heads, [[(0, 301), (1, 5)], [(0, 580), (1, 711), (2, 1)]])
    expected = expected_attention(heads, qkv, metadata, dim**-0.5, window)
    for num_threads in (1, 40):
        assert close(heads.attend(qkv, metadata, dim**-0.5, window, num_threads), expected), num_threads


@pytest.mark.parametrize("group", [11, 47, 49, 64, 385])
def test_large_groups(group: int) -> None:
    """Queries that fill an item alone, or do not fit into one that others fill."""
    heads = PagedHeads(VARIANTS[0], group, 1, 16, 8, 40, NAN)
    qkv, metadata = fill(heads, MIXED[1:])
    assert close(heads.attend(qkv, metadata, 0.25), expected_attention(heads, qkv, metadata, 0.25, None))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("num_threads", [1, 4])
def test_large_scores_do_not_overflow(num_threads: int, variant: Variant) -> None:
    heads = PagedHeads(variant, 2, 1, 16, 16, 60, NAN)
    qkv, metadata = fill(heads, [[(0, 700), (1, 40)], [(0, 1), (1, 1)]], amplitude=100.0)
    qkv = qkv.to(variant.left).float()  # or the softmax picks other keys
    out = heads.attend(qkv, metadata, 1.0, num_threads=num_threads)
    assert relative_error(out, expected_attention(heads, qkv, metadata, 1.0, None)) < 5 * KERNEL[out.dtype]


@pytest.mark.parametrize("num_threads", [1, 4])
def test_falling_and_rising_scores(num_threads: int) -> None:
    """The greatest score in the first or the last chunk, by far: what was summed before it must shrink to nothing."""
    for direction in (1.0, -1.0):
        heads = PagedHeads(VARIANTS[0], 1, 1, 16, 16, 60, NAN)
        sequences = PagedSequences(16, num_blocks=60)
        metadata = sequences.step([(0, 800)])
        qkv = torch.randn(800, 48)
        qkv[:, 16:32] = (torch.arange(800) // 8)[:, None] * direction / 4  # scores, multiples of 4, are exact
        heads.write(qkv, metadata)
        metadata = sequences.step([(0, 1)])
        qkv = torch.cat((torch.ones(1, 16), torch.zeros(1, 32)), dim=1)
        heads.write(qkv, metadata)
        out = heads.attend(qkv, metadata, 1.0, num_threads=num_threads)
        assert close(out, expected_attention(heads, qkv, metadata, 1.0, None))


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("steps", [*STEPS, "long"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_bad_sequence_harms_no_other(variant: Variant, steps: str, value: float) -> None:
    """Every other row's bits are what they are beside a good one, also where sequences are cut into parts."""
    heads = PagedHeads(variant, 4, 2, 16, 8, 400, NAN)
    qkv, metadata = fill(heads, LONG if steps == "long" else STEPS[steps])
    expected = heads.attend(qkv, metadata, 0.25, num_threads=4)
    num_bad = int(metadata.query_start[1])
    qkv[:num_bad] = value
    blocks = metadata.block_tables[0, : -(-int(metadata.seq_lens[0]) // 8)].long()
    for pages in (heads.keys, heads.values):
        pages[blocks] = value
    out = heads.attend(qkv, metadata, 0.25, num_threads=4)
    assert torch.equal(out[num_bad:], expected[num_bad:])
    assert not out[:num_bad].isfinite().any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_pages_taken_over_from_a_bad_sequence(variant: Variant) -> None:
    """A sequence that grows token by token over pages full of infinities, of even and odd lengths."""
    clean, dirty = (PagedHeads(variant, 2, 1, 16, 8, 8, filler) for filler in (0.0, INFINITY))
    sequences = PagedSequences(8, num_blocks=8)
    for _ in range(33):
        metadata = sequences.step([(0, 1)])
        qkv = torch.randn(1, clean.qkv_size)
        outs = []
        for heads in (clean, dirty):
            heads.write(qkv, metadata)
            outs.append(heads.attend(qkv, metadata, 0.25))
        assert outs[0].isfinite().all()
        assert torch.equal(*outs)
