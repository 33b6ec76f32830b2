"""Launches of batch-invariant products: the linears of Llama 3.1 8B for few rows and many, other types, odd sizes."""

import torch

from manta.kernels import matmul_triton
from manta.kernels.fp8 import Fp8Rows
from tests.support.aot import Launches

META = torch.device("meta")


def _linear(num_rows: int, num_in: int, num_out: int, dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> None:
    x, weight = (torch.empty(n, num_in, dtype=dtype, device=META) for n in (num_rows, num_out))
    matmul_triton.linear(x, weight, torch.empty(num_out, dtype=dtype, device=META) if bias else None)


def _fp8(num_rows: int, num_in: int, num_out: int, bias: bool = False) -> None:
    x, weight = (torch.empty(n, num_in, dtype=torch.float8_e4m3fn, device=META) for n in (num_rows, num_out))
    rows = Fp8Rows(x, torch.empty(num_rows, 1, device=META))
    added = torch.empty(num_out, dtype=torch.bfloat16, device=META) if bias else None
    matmul_triton.scaled_linear(rows, weight, torch.empty(num_out, device=META), added, torch.bfloat16)


LAUNCHES: Launches = {
    "14336 -> 4096, 8 rows": lambda: _linear(8, 14336, 4096),
    "14336 -> 4096, 8192 rows": lambda: _linear(8192, 14336, 4096),
    "4096 -> 128256, 256 rows": lambda: _linear(256, 4096, 128256),
    "896 -> 1152, bias, 4 rows": lambda: _linear(4, 896, 1152, bias=True),
    "1000 -> 300, float32, 4 rows": lambda: _linear(4, 1000, 300, torch.float32),
    "fp8 14336 -> 4096, 8 rows": lambda: _fp8(8, 14336, 4096),
    "fp8 14336 -> 4096, 8192 rows": lambda: _fp8(8192, 14336, 4096, bias=True),
    "576 -> 1536, float16, 4096 rows": lambda: _linear(4096, 576, 1536, torch.float16),
    "1000 -> 300, float32, 4096 rows": lambda: _linear(4096, 1000, 300, torch.float32),
}
FROM_CAPABILITY = {name: 89 for name in LAUNCHES if name.startswith("fp8")}
