"""What a sequence's own tokens change about its next one, on a GPU, in place: penalties, and no end before min_tokens.

Meanings as in vLLM: the repetition penalty (Keskar et al., CTRL, 2019, section 4.1) counts prompt and output, presence
and frequency penalties count the output alone. A program counts one row's history in numbers of its own, one per token
of the vocabulary, and then goes through the history again: whoever takes a token's number penalises it and leaves 0.
The cost is that of the histories, not of the vocabulary.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from manta.kernels.sampling_rows import FLOATS, INTS, SamplingRows

CHUNK = 1024  # tokens of the history that a program looks at together
MAX_PROGRAMS = 64  # 33 MB of numbers for 128 thousand tokens

_SLOT = tl.constexpr(INTS.index("slot"))
_POSITION = tl.constexpr(INTS.index("position"))
_NUM_PROMPT = tl.constexpr(INTS.index("num_prompt_tokens"))
_MIN_TOKENS = tl.constexpr(INTS.index("min_tokens"))
_STOP = tl.constexpr(len(INTS))
_PRESENCE = tl.constexpr(FLOATS.index("presence_penalty"))
_FREQUENCY = tl.constexpr(FLOATS.index("frequency_penalty"))
_REPETITION = tl.constexpr(FLOATS.index("repetition_penalty"))


@triton.jit
def _penalise(
    logits, history, counts, begin, end, num_prompt, presence, frequency, repetition, CHUNK: tl.constexpr
):  # fmt: skip
    for start in range(begin, end, CHUNK):
        place = start + tl.arange(0, CHUNK)
        token = tl.load(history + place, mask=place < end, other=0)
        tl.atomic_or(counts + token, 1, mask=place < tl.minimum(num_prompt, end), sem="relaxed")
        tl.atomic_add(counts + token, 2, mask=(place >= num_prompt) & (place < end), sem="relaxed")
    tl.debug_barrier()
    for start in range(begin, end, CHUNK):
        place = start + tl.arange(0, CHUNK)
        token = tl.load(history + place, mask=place < end, other=0)
        count = tl.atomic_xchg(counts + token, 0, mask=place < end, sem="relaxed")
        is_own = (place < end) & (count > 0)
        x = tl.load(logits + token, mask=is_own, other=0.0)
        x = tl.where(x > 0, x / repetition, x * repetition)
        x = tl.where(count > 1, x - (frequency * (count // 2).to(tl.float32) + presence), x)
        tl.store(logits + token, x, mask=is_own)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["floats_stride", "ints_stride", "history_stride", "num_rows", "num_stop_tokens"])
def _penalties_kernel(
    logits, stride, floats, floats_stride, ints, ints_stride, history, history_stride, counts, num_rows,
    num_stop_tokens, VOCAB_SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    counts += tl.program_id(0).to(tl.int64) * VOCAB_SIZE
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        slot = tl.load(ints + _SLOT * ints_stride + row)
        end = tl.load(ints + _POSITION * ints_stride + row).to(tl.int32)
        num_prompt = tl.load(ints + _NUM_PROMPT * ints_stride + row).to(tl.int32)
        presence = tl.load(floats + _PRESENCE * floats_stride + row)
        frequency = tl.load(floats + _FREQUENCY * floats_stride + row)
        repetition = tl.load(floats + _REPETITION * floats_stride + row)
        own = logits + (tl.zeros((), tl.int64) + row) * stride
        if (slot >= 0) & ((presence != 0) | (frequency != 0) | (repetition != 1)):
            begin = tl.where(repetition == 1, num_prompt, 0)
            _penalise(
                own, history + slot * history_stride, counts, begin, end, num_prompt, presence, frequency, repetition,
                CHUNK,
            )  # fmt: skip
        if (slot >= 0) & (end - num_prompt < tl.load(ints + _MIN_TOKENS * ints_stride + row)):
            for i in range(num_stop_tokens):
                token = tl.load(ints + (_STOP + i) * ints_stride + row)
                tl.store(own + token, float("-inf"), mask=token >= 0)


def make_counts(num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """The zeros that `apply_penalties` counts in, for up to so many rows: int32 [programs, vocab]."""
    return torch.zeros(min(num_rows, MAX_PROGRAMS), vocab_size, dtype=torch.int32, device=device)


def apply_penalties(logits: Tensor, rows: SamplingRows, history: Tensor, counts: Tensor) -> None:
    """Applies penalties and masks stop tokens of the rows that ask for any, in place.

    logits float32 [N, vocab], rows contiguous; history int32 [slots, length]: each slot's tokens before its position;
    counts: of `make_counts`, zeros before and after.
    """
    assert logits.stride(1) == history.stride(1) == 1
    assert counts.shape[1] == logits.shape[1]
    num_rows, vocab_size = logits.shape
    _penalties_kernel[(min(num_rows, counts.shape[0]),)](
        logits, logits.stride(0), rows.floats, rows.floats.stride(0), rows.ints, rows.ints.stride(0), history,
        history.stride(0), counts, num_rows, rows.num_stop_tokens, VOCAB_SIZE=vocab_size, CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
