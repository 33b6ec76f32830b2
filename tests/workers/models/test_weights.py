"""Every rank reads its part of a checkpoint and no more; what does not fit the config is named."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manta.configs.model import ModelError, ModelSpec, read_model_spec
from manta.configs.weights import WeightError, stage_layers, weight_names, weight_slice
from manta.workers.checkpoint import INDEX_NAME, Checkpoint
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.model_source import resolve_model_folder
from tests.support.checkpoints import make_checkpoint

CPU = torch.device("cpu")


def ranks(tp_size: int, pp_size: int) -> Iterator[Mesh]:
    """The meshes of a replica's ranks, unconnected."""
    for pp_rank in range(pp_size):
        for tp_rank in range(tp_size):
            yield Mesh(tp_rank, tp_size, pp_rank, pp_size, CPU)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "llama-bias", num_attention_heads=8, num_key_value_heads=2, hidden_size=48)


@pytest.fixture
def spec(folder: Path) -> ModelSpec:
    return read_model_spec(folder)


def load(folder: Path) -> None:
    load_model(folder, read_model_spec(folder), Mesh.single(CPU), torch.float32)


def rewrite(folder: Path, changed: dict[str, Tensor | None]) -> None:
    """Adds, replaces or (None) removes tensors of the one weights file."""
    tensors = load_file(folder / "model.safetensors") | {k: v for k, v in changed.items() if v is not None}
    for name in [name for name, value in changed.items() if value is None]:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("num_layers", "pp_size", "expected"),
    [(3, 1, [3]), (3, 2, [2, 1]), (10, 4, [3, 3, 2, 2]), (4, 4, [1, 1, 1, 1])],
)
def test_stages_are_contiguous_and_even(num_layers: int, pp_size: int, expected: list[int]) -> None:
    stages = [stage_layers(num_layers, rank, pp_size) for rank in range(pp_size)]
    assert [len(stage) for stage in stages] == expected
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 2), (4, 1), (8, 3)])
def test_ranks_cover_every_element_as_often_as_they_should(spec: ModelSpec, tp_size: int, pp_size: int) -> None:
    for name in weight_names(spec):
        count = None
        for mesh in ranks(tp_size, pp_size):
            part = weight_slice(spec, mesh, name)
            if part is not None:
                count = torch.zeros(part.shape, dtype=torch.int64) if count is None else count
                count[part.source] += 1
        assert count is not None, f"no rank holds {name}"
        if "k_proj" in name or "v_proj" in name:
            expected = max(1, tp_size // spec.num_kv_heads)  # a KV head is held by that many ranks
        elif "norm" in name or name.endswith(("o_proj.bias", "down_proj.bias")):
            expected = tp_size
        else:
            expected = 1
        assert bool((count == expected).all()), name


def test_a_rank_reads_only_its_part(folder: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    num_read: list[int] = []
    read = Checkpoint.read

    def counting_read(self: Checkpoint, name: str, part: tuple[slice, ...]) -> Tensor:
        tensor = read(self, name, part)
        num_read.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counting_read)
    total = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    by_rank = []
    for mesh in ranks(4, 2):
        num_read.clear()
        load_model(folder, spec, mesh, torch.float32)
        by_rank.append(sum(num_read))
    assert max(by_rank) < total / 4  # an eighth each, but for norms, replicated KV heads and uneven stages
    assert sum(by_rank) < total * 1.3


def test_old_rotary_frequencies_and_a_tied_head_are_ignored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama-tied")
    rewrite(
        tmp_path,
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(131, 48)},
    )
    load(tmp_path)


def test_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, {"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*model\.safetensors.*1 missing"):
        load(folder)


def test_extra_tensor_is_named(folder: Path) -> None:
    rewrite(folder, {"model.layers.3.mlp.up_proj.weight": torch.ones(2)})
    with pytest.raises(WeightError, match=r"model\.layers\.3\.mlp\.up_proj\.weight.*model\.safetensors"):
        load(folder)


def test_wrong_shape_is_named(folder: Path) -> None:
    rewrite(folder, {"model.norm.weight": torch.ones(47)})
    with pytest.raises(WeightError, match=r"model\.norm\.weight.*model\.safetensors has shape \[47\].*\[48\]"):
        load(folder)


def test_wrong_number_of_axes_is_named(folder: Path) -> None:
    rewrite(folder, {"lm_head.weight": torch.ones(131 * 48)})
    with pytest.raises(WeightError, match=r"lm_head\.weight.*\[6288\].*\[131, 48\]"):
        load(folder)


def test_index_naming_a_file_that_is_not_there(folder: Path) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-2.safetensors"}}))
    with pytest.raises(WeightError, match=r"'model-2\.safetensors'.*incomplete"):
        load(folder)


def test_broken_index(folder: Path) -> None:
    (folder / INDEX_NAME).write_text("{")
    with pytest.raises(WeightError, match="is not an index"):
        load(folder)


def test_broken_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(WeightError, match=r"model\.safetensors cannot be read"):
        load(folder)


def test_folder_without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightError, match=r"no \*\.safetensors"):
        load(folder)


def test_heads_that_do_not_divide(folder: Path, spec: ModelSpec) -> None:
    with pytest.raises(ModelError, match="tensor_parallel_size=3 must divide the model's 8 attention heads"):
        load_model(folder, spec, Mesh(0, 3, 0, 1, CPU), torch.float32)


def test_kv_heads_that_do_not_divide(spec: ModelSpec) -> None:
    wide = spec.model_copy(update={"num_heads": 12, "num_kv_heads": 3})
    with pytest.raises(ModelError, match="3 KV heads"):
        weight_slice(wide, Mesh(0, 2, 0, 1, CPU), "model.layers.0.self_attn.k_proj.weight")


def test_dummy_weights_follow_the_seed(folder: Path, spec: ModelSpec) -> None:
    def embedding(seed: int) -> Tensor:
        model = load_model(folder, spec, Mesh.single(CPU), torch.bfloat16, load_format="dummy", seed=seed)
        return model.embed.weight

    assert torch.equal(embedding(1), embedding(1))
    assert not torch.equal(embedding(1), embedding(2))
    assert bool(embedding(1).isfinite().all())


def test_local_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve_model_folder(str(folder)) == folder


@pytest.mark.parametrize("model", ["/no/such/folder", "./none", "a/b/c"])
def test_missing_folder_is_named(model: str) -> None:
    with pytest.raises(ModelError, match=f"'{model}' does not exist"):
        resolve_model_folder(model)


def test_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="'someone/something' is neither a local folder nor could it be fetched"):
        resolve_model_folder("someone/something")
