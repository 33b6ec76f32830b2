"""Flags that choose kernels: where they are refused, and that they reach the kernels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from manta.configs.model import ModelError, ModelSpec, read_model_spec
from manta.configs.schema import ServeConfig
from manta.kernels import attention, ops
from manta.workers.options import set_up
from tests.support.checkpoints import make_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return read_model_spec(make_checkpoint(tmp_path, "llama"))


@pytest.fixture(autouse=True)
def _own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_gpu_attention", None)
    monkeypatch.setattr(ops, "_batch_invariant", False)


def config(**fields: Any) -> ServeConfig:
    return ServeConfig(model="m", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_invariant": True, "attention_backend": "flashinfer"}, "attention_backend=flashinfer"),
        ({"batch_invariant": True, "attention_backend": "sdpa"}, "attention_backend=sdpa"),
        ({"kv_cache_dtype": "fp8", "attention_backend": "flashinfer"}, "kv_cache_dtype=fp8 does not go with"),
        ({"device": "cpu", "attention_backend": "triton"}, "attention_backend chooses kernels of GPUs"),
        ({"device": "cpu", "batch_invariant": True}, "batch_invariant chooses kernels of GPUs"),
        ({"device": "cpu", "quantization": "fp8"}, "quantization chooses kernels of GPUs"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype"),
    ],
)
def test_refused_before_anything_starts(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**fields)


def test_refused_by_a_worker_that_finds_no_gpu(spec: ModelSpec) -> None:
    for fields in ({"attention_backend": "triton"}, {"batch_invariant": True}, {"quantization": "fp8"}):
        (name,) = fields
        with pytest.raises(ModelError, match=f"--{name.replace('_', '-')}"):
            set_up(config(**fields), spec, torch.float32, CPU)


def test_refused_where_the_package_is_missing(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda _: None)
    for fields, message in (
        ({"attention_backend": "flashinfer"}, "--attention-backend flashinfer: .*'flashinfer', which is not installed"),
        ({"batch_invariant": True}, "--batch-invariant: .*'triton', which is not installed"),
    ):
        with pytest.raises(ModelError, match=message):
            set_up(config(**fields), spec, torch.float32, CUDA)


@pytest.mark.parametrize(("backend", "form"), [("auto", None), ("sdpa", "sdpa"), ("triton", "triton")])
def test_reaches_the_kernels(backend: str, form: str | None, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str | None, bool]] = []
    monkeypatch.setattr(attention, "on_gpu", lambda form, invariant: asked.append((form, invariant)))
    monkeypatch.setattr(ops, "has_fp8_products", lambda _: False)
    invariant = backend != "sdpa"
    set_up(config(attention_backend=backend, batch_invariant=invariant), spec, torch.float32, CUDA)
    assert asked == [(form, invariant)]
    assert ops.is_batch_invariant() == invariant
    assert ops.can_be_recorded()


def test_pages_of_a_cpu_may_be_fp8(spec: ModelSpec) -> None:
    assert set_up(config(kv_cache_dtype="fp8"), spec, torch.float32, CPU).kv_dtype == torch.float8_e4m3fn
    assert set_up(config(), spec, torch.float32, CPU).kv_dtype == torch.float32
