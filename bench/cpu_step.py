"""What a step of the CPU engine costs, beside what the machine allows.

    python bench/shapes.py smollm2-135m /tmp/smollm2-135m
    python bench/cpu_step.py /tmp/smollm2-135m [--threads 2] [--dtype bfloat16]

Runs the model as a worker does, without server or scheduler. For each step: milliseconds, how many of them are left
when every kernel is replaced by one that does nothing (Python, tables, barriers), and the floor: the larger of bytes
to read over the measured read bandwidth and multiply-adds over the better of two measured rates of matrix products,
oneDNN's in float32 and in bfloat16.
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from manta.configs.model import ModelSpec, read_model_spec
from manta.kernels.cpu_decoder import program
from manta.kernels.metadata import AttentionMetadata
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.models.decoder import CausalLM, allocate_kv_cache

BLOCK_SIZE = 16
CPU = torch.device("cpu")
STEPS: list[tuple[str, int, int, int]] = [  # name, rows, new tokens of each, context of each
    ("decode, 1 sequence of 192", 1, 1, 192),
    ("decode, 1 sequence of 4,000", 1, 1, 4000),
    ("decode, 8 of 200", 8, 1, 200),
    ("decode, 32 of 200", 32, 1, 200),
    ("decode, 64 of 250", 64, 1, 250),
    ("prefill, 128", 1, 128, 128),
    ("prefill, 512", 1, 512, 512),
    ("prefill, 2,048", 1, 2048, 2048),
]


def median_ms(function: Callable[[], object], seconds: float = 1.0) -> float:
    """Of as many calls as fit, after one that is not counted."""
    function()
    taken_s: list[float] = []
    while len(taken_s) < 3 or sum(taken_s) < seconds:
        started_s = time.perf_counter()
        function()
        taken_s.append(time.perf_counter() - started_s)
    return 1000 * float(np.median(taken_s))


def step_metadata(num_rows: int, num_new: int, context: int) -> AttentionMetadata:
    """Rows of their own blocks; `num_new` tokens at the end of `context`."""
    num_blocks = -(-context // BLOCK_SIZE)
    tables = np.arange(num_rows * num_blocks, dtype=np.int32).reshape(num_rows, num_blocks)
    positions = np.tile(np.arange(context - num_new, context), num_rows)
    rows = np.repeat(np.arange(num_rows), num_new)
    slots = tables[rows, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    return AttentionMetadata(
        query_start=torch.arange(num_rows + 1, dtype=torch.int32) * num_new,
        seq_lens=torch.full((num_rows,), context, dtype=torch.int32),
        block_tables=torch.from_numpy(tables),
        slot_mapping=torch.from_numpy(slots),
        positions=torch.from_numpy(positions.astype(np.int64)),
        num_decodes=num_rows if num_new == 1 else 0,
        max_query_len=num_new,
        max_seq_len=context,
        block_size=BLOCK_SIZE,
    )


def read_bandwidth() -> float:
    """Bytes per second of a sum over 1 GiB."""
    x = torch.ones(1 << 28)
    return x.numel() * 4 / median_ms(x.sum) * 1000


def onednn_rate(dtype: torch.dtype) -> float:
    """FLOP per second of a product of 512 rows with a packed weight [3072, 576]."""
    x, weight = torch.randn(512, 576).to(dtype), torch.randn(3072, 576).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    linear = torch.ops.mkldnn._linear_pointwise.default
    return 2 * 512 * 3072 * 576 / median_ms(lambda: linear(x, packed, None, "none", [], "")) * 1000


class Kernels:
    """Replaces kernels of the model's step by one that returns at once."""

    def __init__(self, model: CausalLM) -> None:
        assert model.cpu_stage is not None, "this CPU runs the model through oneDNN, not through the CPU decoder"
        self._table = model.cpu_stage._step
        # any function of the C library that needs no arguments and does nothing; callers clean up what they passed
        self._address = ctypes.cast(ctypes.CDLL(None).getppid, ctypes.c_void_p).value or 0

    def without(self, fields: list[int], function: Callable[[], float]) -> float:
        kept = self._table.copy()
        self._table[fields] = self._address
        try:
            return function()
        finally:
            self._table[fields] = kept[fields]


def model_work(spec: ModelSpec, num_rows: int, num_new: int, context: int, item_bytes: int) -> tuple[float, float]:
    """(FLOP, bytes) of the layers and of one row of logits per sequence."""
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = spec.hidden_size * (2 * heads + 2 * kv_heads + 3 * spec.intermediate_size)
    head = spec.hidden_size * spec.vocab_size
    pairs = num_rows * (num_new * (context - num_new) + num_new * (num_new + 1) / 2)
    flop = 2 * (num_rows * num_new * layer * spec.num_layers + num_rows * head) + 4 * heads * pairs * spec.num_layers
    kv = 2 * num_rows * context * kv_heads * spec.num_layers
    return flop, item_bytes * (layer * spec.num_layers + head + kv)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    spec = read_model_spec(arguments.model)
    bandwidth = read_bandwidth()
    rates = {f"oneDNN {d}": onednn_rate(d) for d in (torch.float32, torch.bfloat16)}
    model = load_model(arguments.model, spec, Mesh.single(CPU), dtype)
    kv_cache = allocate_kv_cache(model, 1500, BLOCK_SIZE, dtype, CPU)
    kernels = Kernels(model)
    every = [program.MULTIPLY, program.ATTEND, program.JOIN, program.ROPE_KV_WRITE, program.ADD, program.NORM]
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.dtype}, {arguments.model.name}")
    print(f"read {bandwidth / 1e9:.1f} GB/s, " + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in rates.items()))
    print("| step | ms | without kernels, ms | attention, ms | GFLOP/s | GB/s | floor, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, num_rows, num_new, context in STEPS:
        metadata = step_metadata(num_rows, num_new, context)
        ids = torch.randint(0, spec.vocab_size, (num_rows * num_new,))
        last = torch.arange(1, num_rows + 1) * num_new - 1

        def step(ids: torch.Tensor = ids, metadata: AttentionMetadata = metadata, last: torch.Tensor = last) -> None:
            model.logits(model(ids, metadata, kv_cache, last))

        whole = median_ms(step)
        rest = kernels.without(every, lambda: median_ms(step, 0.3))
        no_attention = kernels.without([program.ATTEND, program.JOIN], lambda: median_ms(step))
        flop, num_bytes = model_work(spec, num_rows, num_new, context, dtype.itemsize)
        floor = 1000 * max(flop / max(rates.values()), num_bytes / bandwidth)
        print(
            f"| {name} | {whole:.2f} | {rest:.2f} | {whole - no_attention:.2f} | {flop / whole / 1e6:.0f} "
            f"| {num_bytes / whole / 1e6:.1f} | {floor:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
