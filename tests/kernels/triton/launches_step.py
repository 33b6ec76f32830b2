"""Launches of what stands around the layers of a step: inputs, the slots' progress, copies of blocks."""

import torch
from torch import Tensor

from manta.kernels import step_inputs_triton
from manta.kernels.block_copy_triton import BlockCopier
from manta.kernels.step_tensors import SlotColumns, StepInputs
from tests.support.aot import Launches

META = torch.device("meta")


def _ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=META)


def _step(num_tokens: int, num_rows: int, num_blocks: int) -> None:
    columns = SlotColumns(_ints(1024), _ints(1024), _ints(1024, 2048), _ints(1024, 32768))
    slots, query_start = _ints(num_rows), _ints(num_rows + 1)
    out = StepInputs.empty(num_tokens, num_rows, num_blocks, META)
    step_inputs_triton.build_inputs(columns, slots, query_start, 16, out)
    sampled = torch.empty(num_rows, dtype=torch.int64, device=META)
    step_inputs_triton.advance(columns, slots, query_start, out, sampled)


def _copies(dtype: torch.dtype) -> None:
    kv_cache = [tuple(torch.empty(64, 8, 16, 128, dtype=dtype, device=META) for _ in range(2)) for _ in range(32)]
    copier = BlockCopier(kv_cache)  # type: ignore[arg-type]
    copier.copy(_ints(2, 7))
    copier.scatter(copier.gather(_ints(7)), _ints(7))


LAUNCHES: Launches = {
    "256 decodes": lambda: _step(256, 256, 128),
    "8192 tokens": lambda: _step(8192, 64, 2048),
    "blocks of 32 KiB": lambda: _copies(torch.bfloat16),
    "blocks of 16 KiB": lambda: _copies(torch.float8_e4m3fn),
}
