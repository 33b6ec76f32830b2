"""What the device is and what it can do at best, measured."""

import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from timing import median_s

from manta.kernels import ops
from manta.kernels.fp8 import Fp8Rows


@dataclass(frozen=True)
class Limits:
    """Measured, in this process."""

    copy_bytes_per_s: float  # read and written bytes together
    matmul_flops: float  # per second, bfloat16
    fp8_matmul_flops: float | None  # with scales by row; None where there are no such products


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "sms": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    for name in ("torch", "triton", "transformers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def measure(device: torch.device, small: bool) -> Limits:
    num_bytes = 2**26 if small else 2**32
    size = 1024 if small else 8192
    source = torch.zeros(num_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), device)
    a = torch.randn(size, size, device=device).to(torch.bfloat16)
    b = torch.randn(size, size, device=device).to(torch.bfloat16)
    matmul_s = median_s(lambda: a @ b, device)
    flops = 2 * size**3
    return Limits(2 * num_bytes / copy_s, flops / matmul_s, _fp8_flops(a, b, device))


def _fp8_flops(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float | None:
    if not ops.has_fp8_products(device):
        return None
    x, scales = ops.quantize(a)
    weight, channels = ops.quantize(b)
    linear = ops.make_fp8_linear(weight, channels[:, 0].contiguous(), None, torch.bfloat16)
    try:
        return 2 * a.shape[0] ** 3 / median_s(lambda: linear(Fp8Rows(x, scales)), device)
    except RuntimeError as error:
        print(f"no fp8 products: {error}", flush=True)
        return None
