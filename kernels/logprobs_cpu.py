"""Log-probabilities on the CPU: those of the chosen tokens with their ranks, and of each row's best.

log softmax(x) = x - max - log(sum(exp(x - max))). One pass finds the maxima of blocks of 64 logits, a second one the
sum. The best tokens are kept in a sorted list, into which a block is looked at only if its maximum would go.

Rows are handed out one by one to the threads that compute steps, as `sample_cpu` does with its rows.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manta.kernels.cpu_decoder import program
from manta.kernels.cpu_decoder.team import running_team
from manta.kernels.cpu_decoder.threads import atomic_add
from manta.kernels.cpu_scalars import jit, kernel_address, load, load_int64, num_chunks, store, store_int64
from manta.kernels.sample_row_cpu import row_floats
from manta.kernels.sample_vectors_cpu import BLOCK, BLOCK_VECTORS, maxima, weigh
from manta.kernels.table_call import run_alone, run_together

_F32 = np.float32(0)
_LOWEST = np.float32(-np.inf)
_LOG2_E = np.float32(math.log2(math.e))
MAX_BEST = 256
MIN_SHARED_LOGITS = 1 << 20  # half a millisecond of one thread; to wake another takes up to 0.1 ms

# The table of a call, 8 bytes a field
(
    KERNEL, NEXT_ROW, NUM_ROWS, LOGITS, STRIDE, VOCAB, TOKENS, CHOSEN, RANKS, IDS, BEST, NUM_BEST, SCRATCH,
    SCRATCH_BYTES, HIGHEST_AT, FIELDS,
) = range(16)  # fmt: skip


@jit()
def _rank(logits: Any, vocab_size: Any, x: Any) -> Any:
    above = 0
    for i in range(vocab_size):
        above += 1 if load(logits, i, _F32) > x else 0
    return above + 1


@jit()
def _insert(values: Any, ids: Any, length: Any, num_best: Any, value: Any, token: Any) -> Any:
    """Puts the token behind all that are as great; returns the list's new length."""
    place = min(length, num_best - 1)
    while place > 0 and load(values, place - 1, _F32) < value:
        store(values, place, load(values, place - 1, _F32), _F32)
        store_int64(ids, place, load_int64(ids, place - 1))
        place -= 1
    store(values, place, value, _F32)
    store_int64(ids, place, token)
    return min(length + 1, num_best)


@jit()
def _find_best(logits: Any, vocab_size: Any, highest: Any, num_best: Any, values: Any, ids: Any) -> None:
    """The greatest logits, descending, equal ones by their ids. highest: maxima of whole blocks."""
    length, whole = 0, vocab_size // BLOCK
    for block in range((vocab_size + BLOCK - 1) // BLOCK):
        is_full = length == num_best
        if is_full and block < whole and not load(highest, block, _F32) > load(values, num_best - 1, _F32):
            continue
        for i in range(block * BLOCK, min(block * BLOCK + BLOCK, vocab_size)):
            value = load(logits, i, _F32)
            if length < num_best or value > load(values, num_best - 1, _F32):
                length = _insert(values, ids, length, num_best, value, i)


@jit()
def _log_sum(logits: Any, vocab_size: Any, highest: Any, scratch: Any) -> Any:
    """The logarithm of the sum of e ** x; writes the maxima of whole blocks to `highest`."""
    whole = vocab_size // BLOCK
    top = maxima(logits, whole, highest)
    for i in range(whole * BLOCK, vocab_size):
        x = load(logits, i, _F32)
        top = x if x > top or x != x else top
    total = weigh(logits, whole * BLOCK_VECTORS, top, _LOG2_E, scratch)
    for i in range(whole * BLOCK, vocab_size):
        total += math.exp(load(logits, i, _F32) - top)
    return np.float32(top + math.log(total))


def _logprobs(table: Any, thread: Any, threads: Any) -> None:
    """What each thread does: rows, as long as there are any."""
    vocab_size, num_best = load_int64(table, VOCAB), load_int64(table, NUM_BEST)
    scratch = load_int64(table, SCRATCH) + thread * load_int64(table, SCRATCH_BYTES)
    highest = scratch + load_int64(table, HIGHEST_AT)
    while True:
        row = atomic_add(table + 8 * NEXT_ROW, 1)
        if row >= load_int64(table, NUM_ROWS):
            break
        logits = load_int64(table, LOGITS) + 4 * row * load_int64(table, STRIDE)
        log_sum = _log_sum(logits, vocab_size, highest, scratch)
        x = load(logits, load_int64(load_int64(table, TOKENS), row), _F32)
        store(load_int64(table, CHOSEN), row, x - log_sum, _F32)
        store_int64(load_int64(table, RANKS), row, _rank(logits, vocab_size, x))
        if num_best > 0:
            values = load_int64(table, BEST) + 4 * row * num_best
            ids = load_int64(table, IDS) + 8 * row * num_best
            _find_best(logits, vocab_size, highest, num_best, values, ids)
            for i in range(num_best):
                store(values, i, load(values, i, _F32) - log_sum, _F32)


@cache
def _address() -> int:
    return kernel_address(_logprobs, 3, 0)


def logprobs(logits: Tensor, tokens: Tensor, num_best: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log-probabilities float32 [N] and ranks int64 [N] of tokens (int64 [N]), then ids (int64) and
    log-probabilities (float32) of the num_best (up to MAX_BEST) most probable tokens [N, num_best], descending.

    logits: float32 [N, vocab], rows contiguous, as the model gives them: samplers may change them in place.
    """
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    assert tokens.dtype == torch.int64
    num_rows, vocab_size = logits.shape
    assert 0 <= num_best <= min(MAX_BEST, vocab_size), f"the {num_best} best of {vocab_size} tokens"
    tokens = tokens.contiguous()
    chosen, best = torch.empty(num_rows), torch.empty(num_rows, num_best)
    ranks, ids = (torch.empty(shape, dtype=torch.int64) for shape in ((num_rows,), (num_rows, num_best)))
    num_threads = torch.get_num_threads()
    is_shared = num_threads > 1 and num_rows > 1 and num_rows * vocab_size >= MIN_SHARED_LOGITS
    scratch = torch.empty(num_threads if is_shared else 1, row_floats(vocab_size) + row_floats(vocab_size // BLOCK))
    table = np.zeros(FIELDS, np.int64)
    table[KERNEL:] = (
        _address(), 0, num_rows, logits.data_ptr(), logits.stride(0), vocab_size, tokens.data_ptr(), chosen.data_ptr(),
        ranks.data_ptr(), ids.data_ptr(), best.data_ptr(), num_best, scratch.data_ptr(), 4 * scratch.shape[1],
        4 * row_floats(vocab_size),
    )  # fmt: skip
    if not is_shared:
        run_alone(table.ctypes.data)
    elif (team := running_team(num_threads)) is not None:
        team.run(program.CALL_JOB, table.ctypes.data)
    else:
        run_together(table.ctypes.data, min(num_chunks(num_rows * vocab_size), num_threads))
    return chosen, ranks, ids, best
