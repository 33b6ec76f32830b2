"""Checkpoints with scales: fp8 weights as they are or widened, their scales by row, and the scales of KV pages.

Per tensor, per output channel: `weight_scale` [] or [1] or [out, 1]; per block: `weight_scale_inv` or `weight_scale`
[out / block, in / block]; `input_scale` [] or [1]. All are factors: weight = values * scale.
"""

import re

import torch
from torch import Tensor

from manta.configs.quantization import QuantizationSpec
from manta.configs.weights import WeightError
from manta.workers.checkpoint import Checkpoint

_KV_SCALE = re.compile(
    r"(model\.layers\.\d+)\.self_attn\."
    r"(?:(?:attn\.)?(?P<plain>[kv])_scale|(?P<by>[kv])_proj\.(?:[kv]_scale|output_scale)|(?P<both>kv_scale))"
)
_UNUSED = re.compile(r".*\.self_attn\.(attn\.)?(q_scale|prob_scale|prob_output_scale|q_proj\.(q_scale|output_scale))")


class ScaledCheckpoint:
    """A checkpoint whose `file_of` has weights alone, as if it were not quantised; scales are asked for apart.

    Without a `quantization` only scales of KV pages are set apart.
    """

    def __init__(self, checkpoint: Checkpoint, quantization: QuantizationSpec | None) -> None:
        self._checkpoint = checkpoint
        self._quantization = quantization
        self.folder = checkpoint.folder
        self.file_of = {name: file for name, file in checkpoint.file_of.items() if not self._is_scale(name)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """As `Checkpoint.read`: fp8 weights as float8_e4m3fn."""
        return self._checkpoint.read(name, part)

    def read_wide(self, name: str, part: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """The same with fp8 weights multiplied by their scales, of `dtype`."""
        tensor = self.read(name, part)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        if self._quantization is None:
            raise WeightError(f"tensor {name!r} of {self.folder} is fp8, but config.json has no quantization_config")
        return (tensor.float() * self._scales(name, part)).to(dtype)

    def row_scales(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """float32 [rows] of a weight's part, for scales per tensor or output channel."""
        return self._scales(name, part)[:, 0].contiguous()

    def input_scale(self, name: str) -> Tensor:
        """float32 [] of the weight's stored input scale. Raises WeightError if there is none."""
        return self._read_whole(_beside(name, "input_scale"), name).flatten()[0]

    def kv_scales(self) -> dict[str, Tensor]:
        """float32 [1] by "model.layers.<i>.k_scale" and "...v_scale", for the layers that have them."""
        found = {}
        for name in self._checkpoint.file_of:
            match = _KV_SCALE.fullmatch(name)
            if match is not None:
                value = self._read_whole(name, name).flatten()[:1]
                for which in "kv" if match["both"] else (match["plain"] or match["by"]):
                    found[f"{match[1]}.{which}_scale"] = value
        return found

    def _scales(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """float32 [rows, 1] or [rows, columns] of a weight's part."""
        rows, columns = (torch.arange(axis.start, axis.stop) for axis in part)
        quantization = self._quantization
        assert quantization is not None
        if quantization.block is not None:
            inverse = _beside(name, "weight_scale_inv")
            where = inverse if inverse in self._checkpoint.file_of else _beside(name, "weight_scale")
            scales = self._read_whole(where, name)
            return scales[rows // quantization.block[0]][:, columns // quantization.block[1]]
        scales = self._read_whole(_beside(name, "weight_scale"), name).reshape(-1, 1)
        num_rows = self._checkpoint.shape(name)[0]
        if scales.shape[0] not in (1, num_rows):
            raise WeightError(f"the scale of tensor {name!r} of {self.folder} has {scales.shape[0]} values, not 1 or "
                              f"{num_rows}")  # fmt: skip
        return scales.expand(num_rows, 1)[rows]

    def _read_whole(self, scale: str, name: str) -> Tensor:
        if scale not in self._checkpoint.file_of:
            raise WeightError(f"tensor {name!r} of {self.folder} is fp8, but {scale!r} is not there")
        shape = self._checkpoint.shape(scale)
        return self._checkpoint.read(scale, tuple(slice(0, size) for size in shape)).float()

    def _is_scale(self, name: str) -> bool:
        if _KV_SCALE.fullmatch(name) or _UNUSED.fullmatch(name):
            return True
        return self._quantization is not None and name.endswith((".weight_scale", ".weight_scale_inv", ".input_scale"))


def _beside(name: str, suffix: str) -> str:
    return f"{name.removesuffix('.weight')}.{suffix}"
