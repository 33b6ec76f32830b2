"""fp8 weights and pages: logits of every checkpoint format against transformers' model with the same roundings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from transformers import PreTrainedModel

from manta.configs.model import ModelError, read_model_spec
from manta.configs.weights import WeightError
from manta.kernels import ops
from manta.workers.formats import Format, Weights, choose_format
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh, connect_mesh
from tests.support.checkpoints import make_checkpoint, make_model
from tests.support.fp8_checkpoints import FORMATS, make_fp8_checkpoint, meant_model, with_fp8_pages
from tests.support.ranks import run_ranks
from tests.support.steps import STEPS, run_steps, sequence_tokens
from tests.support.tolerances import LOGITS, SPLIT_LOGITS, relative_error

CPU = torch.device("cpu")
FP8, FP32 = torch.float8_e4m3fn, torch.float32
# Sums in another order now and then move an activation to the next code of fp8, so that errors are compared by their
# mean square. Without any rounding of activations logits are farther away than this (asserted below).
ROUNDED_LOGITS = 2e-2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fp8_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device that has them: it computes them by the reference."""
    use_fp8_products(monkeypatch.setattr)


def use_fp8_products(setattr: Any) -> None:
    setattr(ops, "has_fp8_products", lambda _: True)
    setattr(ops, "uses_cpu_decoder", lambda *_: False)


def logits_of(model: PreTrainedModel) -> list[Tensor]:
    """Of each of STEPS, transformers' logits of whole sequences."""
    with torch.no_grad():
        whole = model(sequence_tokens(model.config.vocab_size)).logits.float()
    computed, steps = [0] * len(whole), []
    for rows in STEPS:
        parts = []
        for sequence, num_new in rows:
            parts.append(whole[sequence, computed[sequence] : computed[sequence] + num_new])
            computed[sequence] += num_new
        steps.append(torch.cat(parts))
    return steps


def error(steps: list[Tensor] | None, expected: list[Tensor]) -> float:
    assert steps is not None
    return max(relative_error(a, b) for a, b in zip(steps, expected, strict=True))


def mean_error(steps: list[Tensor] | None, expected: list[Tensor]) -> float:
    """Root of the mean square of the difference over that of what is expected."""
    assert steps is not None
    found, meant = torch.cat(steps), torch.cat(expected)
    return float((found - meant).norm() / meant.norm())


@pytest.mark.parametrize("format", FORMATS)
def test_a_device_without_fp8_products_widens_weights(
    format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_fp8_checkpoint(tmp_path, "qwen3", format)
    chosen = choose_format(read_model_spec(tmp_path), FP32, CPU)
    assert chosen.weights == Weights.PLAIN
    assert "widened to float32" in caplog.text
    steps = run_steps(tmp_path, Mesh.single(CPU), FP32, format=chosen)
    assert error(steps, logits_of(meant_model("qwen3", format, with_inputs=False))) < LOGITS[FP32]


@pytest.mark.usefixtures("fp8_products")
@pytest.mark.parametrize("family", ["llama-bias", "qwen3"])
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "fp8-block"])
def test_fp8_weights_with_fp8_activations(format: str, family: str, tmp_path: Path) -> None:
    make_fp8_checkpoint(tmp_path, family, format)
    chosen = choose_format(read_model_spec(tmp_path), FP32, CPU)
    assert chosen.weights == Weights.STORED_FP8
    steps = run_steps(tmp_path, Mesh.single(CPU), FP32, format=chosen)
    assert mean_error(steps, logits_of(meant_model(family, format, with_inputs=True))) < ROUNDED_LOGITS
    assert mean_error(steps, logits_of(meant_model(family, format, with_inputs=False))) > 2 * ROUNDED_LOGITS


@pytest.mark.usefixtures("fp8_products")
def test_weights_quantised_as_they_are_loaded(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3")
    chosen = choose_format(read_model_spec(tmp_path), FP32, CPU, quantization="fp8")
    steps = run_steps(tmp_path, Mesh.single(CPU), FP32, format=chosen)
    assert mean_error(steps, logits_of(meant_model("qwen3", "online", with_inputs=True))) < ROUNDED_LOGITS
    assert mean_error(steps, logits_of(make_model("qwen3"))) > 2 * ROUNDED_LOGITS


@pytest.mark.usefixtures("fp8_products")
def test_blocks_are_widened_where_fp8_products_are(tmp_path: Path) -> None:
    make_fp8_checkpoint(tmp_path, "llama", "fp8-block")
    assert choose_format(read_model_spec(tmp_path), FP32, CPU).weights == Weights.PLAIN


def run_rank(rank: int, port: int, folders: dict[str, Path], tp_size: int) -> list[Any]:
    """One rank's logits of each checkpoint."""
    use_fp8_products(setattr)
    store = TCPStore("localhost", port, is_master=False)
    results, meshes = [], []
    for name, folder in folders.items():
        mesh = connect_mesh(
            store=PrefixStore(name, store), tp_rank=rank, tp_size=tp_size, pp_rank=0, pp_size=1, device=CPU,
            timeout_s=60.0,
        )  # fmt: skip
        chosen = choose_format(read_model_spec(folder), FP32, CPU, kv_cache_dtype="fp8")
        results.append(run_steps(folder, mesh, FP32, format=chosen))
        meshes.append(mesh)
    store.set(f"done/{rank}", "")
    store.wait([f"done/{other}" for other in range(tp_size)])  # nobody leaves while another still listens
    for mesh in meshes:
        mesh.destroy()
    return results


def test_tensor_parallel_ranks_have_their_part_of_the_scales(tmp_path: Path) -> None:
    """Per tensor and channel; inputs of a rank's part of a linear have scales of their own. Pages are fp8, too."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 20, "intermediate_size": 96}
    folders = {}
    for format in FORMATS:
        folders[format] = make_fp8_checkpoint(tmp_path / format, "llama-bias", format, **shape)
    found = run_ranks(2, run_rank, folders, 2)
    for index, format in enumerate(folders):
        with_inputs = format != "fp8-block"
        model = meant_model("llama-bias", format, with_inputs=with_inputs, num_ranks=2, **shape)
        expected = logits_of(with_fp8_pages(model, [(1.0, 1.0)] * 3))
        for rank in range(2):
            assert mean_error(found[rank][index], expected) < ROUNDED_LOGITS, format


KV_NAMES = [
    ("self_attn.k_scale", "self_attn.v_scale"),
    ("self_attn.attn.k_scale", "self_attn.attn.v_scale"),
    ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
]


@pytest.mark.parametrize("names", [None, *KV_NAMES], ids=str)
def test_fp8_pages(names: tuple[str, str] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scales of each layer, under the names that checkpoints have them, or 1 and a warning."""
    make_checkpoint(tmp_path, "qwen3")
    scales = [(1.0, 1.0)] * 3
    if names is not None:
        scales = [(0.02, 0.05), (0.03, 0.01), (0.011, 0.013)]
        tensors = load_file(tmp_path / "model.safetensors")
        for layer, pair in enumerate(scales):
            tensors |= {f"model.layers.{layer}.{name}": torch.tensor(s) for name, s in zip(names, pair, strict=True)}
        save_file(tensors, tmp_path / "model.safetensors")
    chosen = choose_format(read_model_spec(tmp_path), FP32, CPU, kv_cache_dtype="fp8")
    steps = run_steps(tmp_path, Mesh.single(CPU), FP32, format=chosen)
    assert ("lacks 6 of 6 scales" in caplog.text) == (names is None)
    assert mean_error(steps, logits_of(with_fp8_pages(make_model("qwen3"), scales))) < ROUNDED_LOGITS
    assert mean_error(steps, logits_of(make_model("qwen3"))) > 2 * ROUNDED_LOGITS


def test_scales_of_pages_are_left_alone_without_fp8_pages(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "model.safetensors")
    steps = run_steps(tmp_path, Mesh.single(CPU), FP32)
    assert error(steps, logits_of(make_model("llama"))) < LOGITS[FP32]


def test_what_cannot_be_loaded(tmp_path: Path, fp8_products: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fp8_checkpoint(tmp_path, "llama", "fp8-static")
    spec, tensors = read_model_spec(tmp_path), load_file(tmp_path / "model.safetensors")
    format = Format(FP32, FP32, Weights.STORED_FP8)

    def load_without(**changes: Tensor | None) -> None:
        changed = tensors | changes
        save_file({k: v for k, v in changed.items() if v is not None}, tmp_path / "model.safetensors")
        load_model(tmp_path, spec, Mesh.single(CPU), FP32, format=format)

    name = "model.layers.1.self_attn.k_proj"
    with pytest.raises(WeightError, match=rf"{name}.input_scale' is not there"):
        load_without(**{f"{name}.input_scale": None})
    with pytest.raises(WeightError, match="3 values, not 1 or 16"):
        load_without(**{f"{name}.weight_scale": torch.ones(3)})
    with pytest.raises(WeightError, match="makes it fp8"):
        load_without(**{f"{name}.weight": tensors[f"{name}.weight"].float()})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignored_layers"] = ["model.layers.0.mlp.up_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_model_spec(tmp_path)
    with pytest.raises(ModelError, match="only some are quantised"):
        load_without()
    monkeypatch.undo()
    with pytest.raises(ModelError, match="--quantization fp8 needs triton and a GPU"):
        choose_format(spec.model_copy(update={"quantization": None}), FP32, CPU, quantization="fp8")


def test_pages_of_fp8_take_half_the_bytes(tmp_path: Path) -> None:
    spec = read_model_spec(make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16))
    chosen = choose_format(spec, torch.bfloat16, CPU, kv_cache_dtype="fp8_e4m3")
    assert chosen.kv_dtype == FP8
    assert chosen.kv_dtype.itemsize * 2 == chosen.dtype.itemsize
    assert SPLIT_LOGITS[FP32] < ROUNDED_LOGITS
