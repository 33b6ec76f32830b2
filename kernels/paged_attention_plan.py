"""How paged attention is laid out on a GPU: query tiles, key tiles, and into how many parts a long sequence is split.

Everything here is plain arithmetic on what the host knows of a step; nothing waits for the device. As in FlashInfer
(Ye et al. 2025, section 3.3) planning is apart from running: a plan depends on a few integers, so that the layers of
a step, after the first, find it in a cache.
"""

from dataclasses import dataclass
from functools import lru_cache

from manta.kernels.gpu import Gpu

PROGRAMS_PER_SM = 2  # that a device is taken to run at once
MIN_SPLIT_TILES = 4  # fewer key tiles than these are not worth a program, its partial result and the merge of it
MAX_SPLITS = 64
INVARIANT_SPLIT = 2048  # keys of each part in the batch-invariant form, from position 0 on
MAX_PARTIAL_VALUES = 1 << 26  # float32 values of partial results in one launch, unless a single token has more


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of one program's work: block_m query rows (tokens x heads of a group) over block_n keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread


@dataclass(frozen=True, slots=True)
class Plan:
    """One launch. The grid is [num_tiles, KV heads, num_splits]; a query tile has `block_q` tokens of one row."""

    tile: Tile
    block_q: int
    num_tiles: int
    num_splits: int
    one_token: bool  # every row has exactly one token: row r is token r
    fixed_split: int  # keys of each split, at fixed positions; 0: a row's keys are shared evenly
    tokens_per_launch: int  # partial results bound how many are taken at a time


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """At least 16, the least size of a matrix product."""
    return max(16, 1 << (n - 1).bit_length())


def choose_tile(kind: str, head_dim: int, group: int, element_bytes: int, is_fp8: bool, capability: int) -> Tile:
    """Few query rows for steps that only "decode", many for those that only "prefill", between them for "mixed" ones.

    A tile has at least one token with all heads of its group, and 16 rows, which matrix units take at once. Sizes are
    the largest that `tests/kernels/triton/test_resources.py` finds no spills with (docs/kernels.md).
    """
    padded = next_power_of_2(head_dim)
    least, is_wide, is_old = next_power_of_2(group), padded > 128, capability < 90  # before Hopper
    if element_bytes == 4:  # no matrix units: for tests and small models
        return Tile(least, 32 if padded <= 64 else 16, 4, 2)
    if kind == "decode":
        num_warps = 8 if is_wide or head_dim != padded or least > 64 else 4
        # Left to itself the assembler aims at more programs per SM for these shapes, and spills.
        max_registers = 128 if num_warps == 8 else 192 if is_fp8 else None
        return Tile(least, 32 if is_wide else 64, num_warps, 3, max_registers)
    if kind == "mixed":
        num_keys = 32 if is_wide or (is_old and is_fp8) else 64
        return Tile(max(least, 64), num_keys, 8 if is_wide or is_old or least > 64 else 4, 3)
    num_rows = 64 if is_wide and is_old else 128
    return Tile(max(least, num_rows), 32 if is_wide or (is_old and padded > 64) else 64, 8, 3)


def choose_num_splits(num_programs: int, num_key_tiles: int, num_slots: int) -> int:
    """Parts to split every row's keys into, so that `num_programs` without splitting fill `num_slots` of a device.

    The rule is Flash-Decoding's as FlashAttention-2 has it (`num_splits_heuristic`): the least number of splits whose
    last wave of programs is nearly (85 % of the best) as full as with any other number. `num_key_tiles` is the most
    that any row has.
    """
    if num_programs >= 0.8 * num_slots:
        return 1
    most = min(MAX_SPLITS, ceil_div(num_key_tiles, MIN_SPLIT_TILES), ceil_div(2 * num_slots, num_programs))
    efficiency = [1.0] * (most + 1)
    for splits in range(1, most + 1):
        waves = num_programs * splits / num_slots
        efficiency[splits] = waves / ceil_div(num_programs * splits, num_slots)
    best = max(efficiency[1:], default=1.0)
    return next((splits for splits in range(1, most + 1) if efficiency[splits] >= 0.85 * best), 1)


@lru_cache(maxsize=4096)
def make_plan(
    num_tokens: int,
    num_rows: int,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
    window: int | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    element_bytes: int,
    is_fp8: bool,
    gpu: Gpu,
    batch_invariant: bool,
) -> Plan:
    """The plan of a step of num_tokens tokens in num_rows rows, of which none has more than max_seq_len keys.

    Batch-invariant: tiles are those of a mixed step whatever the step, and keys are split at fixed positions, so that
    a token's result takes the same operations in the same order in every batch, as "batch-invariant" kernels do
    (He et al., "Defeating nondeterminism in LLM inference", 2025: fixed split sizes). With a window there is no split.
    """
    group = num_heads // num_kv_heads
    one_token = max_query_len == 1 and num_tokens == num_rows and not batch_invariant
    # A few new tokens after long contexts, as of speculation, are nearer to decoding than to a prompt.
    is_mixed = num_decodes > 0 or batch_invariant or max_query_len <= 16
    kind = "decode" if one_token else "mixed" if is_mixed else "prefill"
    tile = choose_tile(kind, head_dim, group, element_bytes, is_fp8, gpu.capability)
    block_q = 1 if one_token else tile.block_m // group
    num_tiles = num_rows if one_token else num_tokens // block_q + num_rows
    most_keys = max_seq_len if window is None else min(max_seq_len, window + block_q)
    fixed_split = INVARIANT_SPLIT if batch_invariant and window is None else 0
    if batch_invariant:
        splits = max(1, ceil_div(max_seq_len, fixed_split)) if fixed_split else 1
    else:
        programs = num_tiles * num_kv_heads
        splits = choose_num_splits(programs, ceil_div(most_keys, tile.block_n), PROGRAMS_PER_SM * gpu.num_sms)
    tokens_per_launch = max(1, MAX_PARTIAL_VALUES // (num_heads * head_dim * splits)) if splits > 1 else num_tokens
    return Plan(tile, block_q, num_tiles, splits, one_token, fixed_split, tokens_per_launch)
