"""Log-probabilities on a GPU: those of the chosen tokens with their ranks, and of each row's best, by one program per
row.

log softmax(x) = x - max - log(sum(exp(x - max))). The best tokens are taken one after the other, each the first of the
greatest behind the one before; from a short list where one can be made, else from the whole row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from manta.kernels.row_search_triton import (
    LOG2_E,
    NUM_WARPS,
    STAGES,
    TILE,
    collect,
    find_best,
    find_cutoff,
    store_columns,
    sum_from,
)

MAX_BEST = 256


@triton.jit
def _store_best(
    source, ids, count, log_sum, num_best, best_ids, best_logprobs, IS_LIST: tl.constexpr, TILE: tl.constexpr
):
    """Writes the num_best greatest of the source; those of equal logits by their ids."""
    column = tl.arange(0, TILE)
    x_before, id_before = log_sum * 0 + float("inf"), -1
    for i in range(num_best):
        best = tl.full([TILE], float("-inf"), tl.float32)
        best_id = tl.full([TILE], 0x7FFFFFFF, tl.int32)
        for start in tl.range(0, count, TILE, num_stages=STAGES):
            at = start + column
            x = tl.load(source + at, mask=at < count, other=float("-inf"))
            token = tl.load(ids + at, mask=at < count, other=0) if IS_LIST else at
            is_left = (at < count) & ((x < x_before) | ((x == x_before) & (token > id_before)))
            is_better = is_left & ((x > best) | (best_id == 0x7FFFFFFF))  # ids ascend: the first of equals stays
            best_id = tl.where(is_better, token, best_id)
            best = tl.where(is_better, x, best)
        x_before = tl.max(best, axis=0)
        id_before = tl.min(tl.where(best == x_before, best_id, 0x7FFFFFFF), axis=0)
        tl.store(best_ids + i, id_before.to(tl.int64))
        tl.store(best_logprobs + i, x_before - log_sum)


@triton.jit
def _count_above(source, count, limit, TILE: tl.constexpr):
    """How many of the source are greater than the limit."""
    column = tl.arange(0, TILE)
    above = tl.zeros([TILE], tl.int32)
    for start in tl.range(0, count, TILE, num_stages=STAGES):
        x = tl.load(source + start + column, mask=start + column < count, other=float("-inf"))
        above += (x > limit).to(tl.int32)
    return tl.sum(above, axis=0)


@triton.jit(do_not_specialize=["num_best"])
def _logprobs_kernel(
    logits, stride, tokens, chosen, ranks, best_ids, best_logprobs, list_values, list_ids, num_best,
    VOCAB_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    vocab_size = tl.full((), VOCAB_SIZE, tl.int32)
    best, _best_at, _has_nan = find_best(logits, vocab_size, TILE)
    top = tl.max(best, axis=0)
    scale = top * 0 + LOG2_E
    log_sum = top + tl.log(sum_from(logits, vocab_size, top, scale, 0, TILE)).to(tl.float32)
    x = tl.load(logits + tl.load(tokens + row))
    tl.store(chosen + row, x - log_sum)
    tl.store(ranks + row, _count_above(logits, vocab_size, x, TILE).to(tl.int64) + 1)
    if num_best > 0:
        values, ids = list_values + row * TILE, list_ids + row * TILE
        store_columns(best, values, TILE)
        length = tl.full((), TILE, tl.int32)
        bound = find_cutoff(values, length, top, scale, num_best, 0, vocab_size > 0, TILE)
        tl.debug_barrier()
        length += 1
        if bound > 0:
            length = collect(logits, vocab_size, top, scale, bound, values, ids, TILE)
        best_ids += row * num_best
        best_logprobs += row * num_best
        if length <= TILE:
            _store_best(values, ids, length, log_sum, num_best, best_ids, best_logprobs, True, TILE)
        else:
            _store_best(logits, ids, vocab_size, log_sum, num_best, best_ids, best_logprobs, False, TILE)


def logprobs(logits: Tensor, tokens: Tensor, num_best: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log-probabilities float32 [N] and ranks int64 [N] of tokens (int64 [N]), then ids (int64) and
    log-probabilities (float32) of the num_best (up to MAX_BEST) most probable tokens [N, num_best], descending.

    logits: float32 [N, vocab], rows contiguous, as the model gives them: samplers may change them in place.
    """
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    num_rows, vocab_size = logits.shape
    assert 0 <= num_best <= min(MAX_BEST, vocab_size), f"the {num_best} best of {vocab_size} tokens"
    device = logits.device
    chosen = torch.empty(num_rows, dtype=torch.float32, device=device)
    ranks = torch.empty(num_rows, dtype=torch.int64, device=device)
    best = torch.empty(num_rows, num_best, dtype=torch.float32, device=device)
    ids = torch.empty(num_rows, num_best, dtype=torch.int64, device=device)
    if not num_rows:
        return chosen, ranks, ids, best
    values = torch.empty(num_rows, TILE, dtype=torch.float32, device=device)
    list_ids = torch.empty(num_rows, TILE, dtype=torch.int32, device=device)
    _logprobs_kernel[(num_rows,)](
        logits, logits.stride(0), tokens, chosen, ranks, ids, best, values, list_ids, num_best,
        VOCAB_SIZE=vocab_size, TILE=TILE, num_warps=NUM_WARPS,
    )  # fmt: skip
    return chosen, ranks, ids, best
