"""The next token of every row on the CPU, in one call: stop tokens, penalties, then the best token or a draw.

Rows are handed out one by one to the threads that compute steps (see `cpu_decoder.team`), which are still awake: other
threads would have to be woken, and would fight those for the cores.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import int64
from numpy.typing import NDArray
from torch import Tensor

from manta.kernels.argmax_cpu import best_token
from manta.kernels.cpu_decoder import program
from manta.kernels.cpu_decoder.memory import zeros
from manta.kernels.cpu_decoder.team import running_team
from manta.kernels.cpu_decoder.threads import atomic_add
from manta.kernels.cpu_scalars import (
    jit,
    kernel_address,
    load,
    load_int32,
    load_int64,
    num_chunks,
    store,
    store_int64,
)
from manta.kernels.sample_row_cpu import draw_token, row_floats, scratch_bytes, uniform
from manta.kernels.sample_vectors_cpu import store_int32
from manta.kernels.sampling_parameters import Parameters
from manta.kernels.table_call import run_alone, run_together

_F32 = np.float32(0)
_ONE = np.float32(1)
_LOWEST = np.float32(-np.inf)
_LINE_BYTES, _HUGE_PAGE_BYTES = 64, 1 << 21
MIN_SHARED_LOGITS = 1 << 19  # to be weighed: 0.3 to 0.8 ms of one thread; to wake another takes up to 0.1 ms

# The table of a call, 8 bytes a field
(
    KERNEL, NEXT_ROW, NUM_ROWS, LOGITS, STRIDE, VOCAB, SLOTS, POSITIONS, TOKENS,
    SEED, TEMPERATURE, TOP_K, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION, NUM_PROMPT_TOKENS, MIN_TOKENS,
    STOP_TOKEN_IDS, MAX_STOP_TOKENS, HISTORY, HISTORY_STRIDE, SCRATCH, SCRATCH_BYTES, COUNTS_AT, FIELDS,
) = range(27)  # fmt: skip


@jit()
def _mask_stop_tokens(table: Any, logits: Any, slot: Any) -> None:
    width = load_int64(table, MAX_STOP_TOKENS)
    for i in range(width):
        token = load_int64(load_int64(table, STOP_TOKEN_IDS), slot * width + i)
        if token >= 0:
            store(logits, token, _LOWEST, _F32)


@jit()
def _penalise(
    logits: Any, history: Any, num_prompt: Any, length: Any, presence: Any, frequency: Any, repetition: Any,
    counts: Any,
) -> None:  # fmt: skip
    """Penalises every token of the history once. counts: int32 [vocab], zeros before and after."""
    for i in range(length):
        token = load_int32(history, i)
        count = load_int32(counts, token)
        store_int32(counts, token, count + 2 if i >= num_prompt else count | 1)
    for i in range(length):
        token = load_int32(history, i)
        count = load_int32(counts, token)
        if count != 0:
            store_int32(counts, token, 0)
            x = load(logits, token, _F32)
            x = x / repetition if x > _F32 else x * repetition
            num_output = count >> 1
            if num_output > 0:
                x = x - (frequency * np.float32(num_output) + presence)
            store(logits, token, x, _F32)


@jit()
def _choose(table: Any, row: Any, scratch: Any) -> Any:
    """The token of one row."""
    slot = load_int64(load_int64(table, SLOTS), row)
    position = load_int64(load_int64(table, POSITIONS), row)
    vocab_size = load_int64(table, VOCAB)
    logits = load_int64(table, LOGITS) + 4 * row * load_int64(table, STRIDE)
    num_prompt = load_int64(load_int64(table, NUM_PROMPT_TOKENS), slot)
    if position - num_prompt < load_int64(load_int64(table, MIN_TOKENS), slot):
        _mask_stop_tokens(table, logits, slot)
    presence = load(load_int64(table, PRESENCE), slot, _F32)
    frequency = load(load_int64(table, FREQUENCY), slot, _F32)
    repetition = load(load_int64(table, REPETITION), slot, _F32)
    if presence != _F32 or frequency != _F32 or repetition != _ONE:
        history = load_int64(table, HISTORY) + 4 * slot * load_int64(table, HISTORY_STRIDE)
        counts = scratch + load_int64(table, COUNTS_AT)
        _penalise(logits, history, num_prompt, position, presence, frequency, repetition, counts)
    temperature = load(load_int64(table, TEMPERATURE), slot, _F32)
    if temperature == _F32:
        return best_token(logits, vocab_size)
    return draw_token(
        logits,
        vocab_size,
        temperature,
        load_int64(load_int64(table, TOP_K), slot),
        load(load_int64(table, TOP_P), slot, _F32),
        load(load_int64(table, MIN_P), slot, _F32),
        uniform(load_int64(load_int64(table, SEED), slot), position),
        scratch,
    )


def _sample(table: Any, thread: Any, threads: Any) -> None:
    """What each thread does: rows, as long as there are any."""
    scratch = load_int64(table, SCRATCH) + thread * load_int64(table, SCRATCH_BYTES)
    while True:
        row = atomic_add(table + 8 * NEXT_ROW, 1)
        if row >= load_int64(table, NUM_ROWS):
            break
        store_int64(load_int64(table, TOKENS), row, _choose(table, row, scratch))


@cache
def _address() -> int:
    return kernel_address(_sample, 3, 0)


def _num_weighed(p: Parameters, slots: NDArray[np.int64], vocab_size: int) -> int:
    """Work in logits: a row with top_k or min_p takes about a quarter of the time of others, as few are weighed."""
    draws = p.temperature[slots] > 0
    short = draws & ((p.top_k[slots] > 0) | (p.min_p[slots] > 0))
    return vocab_size * (4 * int(np.count_nonzero(draws)) - 3 * int(np.count_nonzero(short))) // 4


class RowSampler:
    """Chooses tokens with the threads that compute steps; owns what they need for it. One thread calls it."""

    def __init__(self) -> None:
        self._table = np.zeros(FIELDS, np.int64)
        self._address = self._table.ctypes.data
        self._table[KERNEL] = _address()
        self._vocab_size = 0
        self._num_threads = torch.get_num_threads()
        self._rows = np.zeros((2, 0), np.int64)  # slots and positions
        self._columns: tuple[NDArray[Any], ...] = ()
        run_alone.compile((int64,))
        if self._num_threads > 1 and running_team(self._num_threads) is None:
            run_together.compile((int64, int64))

    def __call__(
        self,
        logits: Tensor,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        parameters: Parameters,
        history: Tensor,
    ) -> Tensor:
        """Token ids int64 [N] of logits float32 [N, vocab], rows contiguous, which it overwrites.

        Row i belongs to slots[i] and chooses the token at positions[i]. history: int32 [slots, length], each slot's
        tokens before its position.
        """
        assert logits.dtype == torch.float32
        assert logits.stride(1) == 1
        assert history.dtype == torch.int32
        assert history.stride(1) == 1
        table, (num_rows, vocab_size) = self._table, logits.shape
        self._reserve(num_rows, vocab_size)
        self._rows[0, :num_rows], self._rows[1, :num_rows] = slots, positions
        self._set_columns(parameters)
        tokens = torch.empty(num_rows, dtype=torch.int64)
        table[NEXT_ROW:SLOTS] = 0, num_rows, logits.data_ptr(), logits.stride(0), vocab_size
        table[TOKENS] = tokens.data_ptr()
        table[HISTORY:SCRATCH] = history.data_ptr(), history.stride(0)
        self._run(_num_weighed(parameters, slots, vocab_size))
        return tokens

    def _run(self, num_logits: int) -> None:
        if self._num_threads == 1 or num_logits < MIN_SHARED_LOGITS:
            run_alone(self._address)
        elif (team := running_team(self._num_threads)) is not None:
            team.run(program.CALL_JOB, self._address)
        else:
            run_together(self._address, min(num_chunks(num_logits), self._num_threads))

    def _set_columns(self, p: Parameters) -> None:
        """Addresses of the parameters, which seldom change: asking numpy for them takes longer than drawing does."""
        columns: tuple[NDArray[Any], ...] = (
            p.seed, p.temperature, p.top_k, p.top_p, p.min_p, p.presence_penalty, p.frequency_penalty,
            p.repetition_penalty, p.num_prompt_tokens, p.min_tokens, p.stop_token_ids,
        )  # fmt: skip
        if list(map(id, columns)) != list(map(id, self._columns)):
            self._columns = columns
            self._table[SEED:MAX_STOP_TOKENS] = [column.ctypes.data for column in columns]
            self._table[MAX_STOP_TOKENS] = p.stop_token_ids.shape[1]

    def _reserve(self, num_rows: int, vocab_size: int) -> None:
        """Room for the rows, and scratch for every thread. Scratch takes memory only as it is written."""
        if num_rows > self._rows.shape[1]:
            self._rows = np.zeros((2, num_rows + num_rows // 4), np.int64)
            self._table[SLOTS : POSITIONS + 1] = [row.ctypes.data for row in self._rows]
        if vocab_size > self._vocab_size:
            counts_at = -(-scratch_bytes(vocab_size) // _LINE_BYTES) * _LINE_BYTES
            each = counts_at + 4 * row_floats(vocab_size)
            self._scratch = zeros((max(_HUGE_PAGE_BYTES, self._num_threads * each + _LINE_BYTES),), torch.uint8)
            self._vocab_size = vocab_size
            self._table[SCRATCH] = -(-self._scratch.data_ptr() // _LINE_BYTES) * _LINE_BYTES
            self._table[SCRATCH_BYTES : COUNTS_AT + 1] = each, counts_at
