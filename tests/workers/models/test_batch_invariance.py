"""A whole model whose logits have the same bits whatever else is in the step: on a GPU, or in Triton's interpreter."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manta.configs.model import read_model_spec
from manta.kernels import attention, ops
from manta.kernels.paged_attention_plan import make_plan
from manta.workers.formats import choose_format
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.models.decoder import CausalLM, allocate_kv_cache
from tests.kernels.triton.attention_cases import to_device
from tests.support.checkpoints import make_checkpoint, make_model
from tests.support.paging import PagedSequences
from tests.support.tolerances import LOGITS, relative_error
from tests.support.triton_device import DEVICE, INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
from manta.kernels import matmul_triton

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

BLOCK_SIZE, NUM_BLOCKS, LENGTH = 16, 24, 36
SPLIT = 32 if INTERPRETED else 64  # keys that attention takes together
# Ways to compute sequence 0, step by step as (sequence, new tokens): alone; in chunks and tokens beside others.
WAYS = [
    [[(0, LENGTH)]],
    [[(1, 5), (0, 31)], [(0, 1), (1, 1), (2, 3)], [(1, 1), (0, 1)], [(0, 3)]],
]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU, asked not to depend on the batch."""
    for name in ("_gpu_attention", "_batch_invariant"):
        monkeypatch.setattr(ops, name, getattr(ops, name))
    ops.use_attention(batch_invariant=True)
    if INTERPRETED:
        monkeypatch.setattr(ops, "uses_cpu_decoder", lambda *_: False)
        monkeypatch.setattr(ops, "has_fp8_products", lambda _: True)
        monkeypatch.setattr(ops, "_kernels_for", lambda *_, **__: ops._gpu())
        monkeypatch.setattr(ops, "paged_attention", attention.on_gpu("triton", batch_invariant=True))
        monkeypatch.setattr(ops, "make_linear", make_linear)
        monkeypatch.setattr(ops, "make_fp8_linear", make_fp8_linear)


def make_linear(weight: Tensor, bias: Tensor | None) -> Any:
    return partial(matmul_triton.linear, weight=weight, bias=bias)


def make_fp8_linear(weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Any:
    form = matmul_triton.scaled_linear
    return partial(form, weight=weight, weight_scales=weight_scales, bias=bias, dtype=dtype)


def tokens_of(vocab_size: int) -> Tensor:
    """int64 [4, 64]: of each sequence."""
    return torch.randint(0, vocab_size, (4, 64), generator=torch.Generator().manual_seed(5))


def logits_of_sequence_0(model: CausalLM, way: list[list[tuple[int, int]]]) -> Tensor:
    """float32 [LENGTH, vocab]."""
    kv_cache = allocate_kv_cache(model, NUM_BLOCKS, BLOCK_SIZE, model.format.kv_dtype, DEVICE)
    tokens = tokens_of(model.spec.vocab_size)
    sequences, computed, found = PagedSequences(BLOCK_SIZE, NUM_BLOCKS), [0] * 4, []
    for rows in way:
        ids = torch.cat([tokens[s, computed[s] : computed[s] + n] for s, n in rows]).to(DEVICE)
        logits = model.logits(model(ids, to_device(sequences.step(rows), DEVICE), kv_cache))
        first = sum(n for _, n in rows[: [s for s, _ in rows].index(0)])
        found.append(logits[first : first + dict(rows)[0]].cpu())
        for sequence, num_new in rows:
            computed[sequence] += num_new
    return torch.cat(found)


@pytest.mark.parametrize("is_fp8", [False, True], ids=["plain", "fp8"])
def test_logits_have_the_same_bits_in_every_batch(
    is_fp8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_fp8 and not ops.has_fp8_products(DEVICE):
        pytest.skip("this GPU has no fp8 products")
    monkeypatch.setattr("manta.kernels.paged_attention_plan.INVARIANT_SPLIT", SPLIT)
    make_plan.cache_clear()
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    shape: Any = {"num_hidden_layers": 2, "intermediate_size": 288, **heads}
    spec = read_model_spec(make_checkpoint(tmp_path, "qwen3", dtype=dtype, **shape))
    flags: Any = {"quantization": "fp8", "kv_cache_dtype": "fp8"} if is_fp8 else {}
    model = load_model(tmp_path, spec, Mesh.single(DEVICE), dtype, format=choose_format(spec, dtype, DEVICE, **flags))
    alone, among_others = (logits_of_sequence_0(model, way) for way in WAYS)
    make_plan.cache_clear()
    assert torch.equal(among_others, alone)
    with torch.no_grad():
        expected = make_model("qwen3", **shape)(tokens_of(spec.vocab_size)[:1, :LENGTH]).logits[0].float()
    if not is_fp8:
        assert relative_error(alone, expected) < LOGITS[dtype]
    assert 0 < (alone - expected).norm() / expected.norm() < 0.5
