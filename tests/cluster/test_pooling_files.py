"""What the files of an embedding checkpoint say: its pooling, and whether it has a head."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from manta.cluster.preflight import PreflightError, read_model
from manta.configs.model import read_model_spec
from manta.configs.pooling import PoolingParams, PoolingSpec
from manta.configs.schema import ServeConfig
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from tests.support.checkpoints import make_checkpoint, make_model

KINDS = "pooling_mode_mean_tokens", "pooling_mode_cls_token", "pooling_mode_lasttoken", "pooling_mode_max_tokens"


def write_modules(folder: Path, names: list[str], pooling: dict[str, Any] | None = None) -> None:
    modules = [{"type": f"sentence_transformers.models.{name}", "path": f"{i}_{name}"} for i, name in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    if pooling is not None:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def mode(name: str) -> dict[str, Any]:
    return {"word_embedding_dimension": 48, "include_prompt": True} | {kind: kind == name for kind in KINDS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "qwen3")


def read(folder: Path, **fields: Any) -> tuple[str, bool]:
    config = ServeConfig.model_validate({"model": str(folder)} | fields)
    spec = PoolingSpec.read(folder, config, read_model_spec(folder))
    assert spec.hidden_size == 48
    return spec.kind, spec.normalize


def test_flags_come_before_files_and_files_before_the_last_state(folder: Path) -> None:
    assert read(folder) == ("last", True)
    assert read(folder, pooling_type="mean", pooling_normalize="off") == ("mean", False)
    write_modules(folder, ["Transformer", "Pooling"], mode("pooling_mode_mean_tokens"))
    assert read(folder) == ("mean", False)
    assert read(folder, pooling_normalize="on") == ("mean", True)
    assert read(folder, pooling_type="cls") == ("cls", False)


@pytest.mark.parametrize(
    ("pooling", "kind"),
    [
        (mode("pooling_mode_mean_tokens"), "mean"),
        (mode("pooling_mode_cls_token"), "cls"),
        (mode("pooling_mode_lasttoken"), "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_modes_of_sentence_transformers(folder: Path, pooling: dict[str, Any], kind: str) -> None:
    write_modules(folder, ["Transformer", "Pooling", "Normalize"], pooling)
    assert read(folder) == (kind, True)


@pytest.mark.parametrize(
    ("names", "pooling", "message"),
    [
        (["Transformer", "Pooling", "Dense"], mode("pooling_mode_cls_token"), "a module of type 'Dense'"),
        (["Transformer", "Pooling"], mode("pooling_mode_max_tokens"), "asks for pooling_mode_max_tokens"),
        (["Transformer", "Pooling"], mode(""), "asks for no pooling"),
        (["Transformer", "Pooling"], None, "is no JSON object"),
    ],
)
def test_what_cannot_be_served_is_told_before_anything_starts(
    folder: Path, names: list[str], pooling: dict[str, Any] | None, message: str
) -> None:
    write_modules(folder, names, pooling)
    config = ServeConfig(model=str(folder))
    with pytest.raises(PreflightError, match=message):
        read_model(config)
    read_model(config.model_copy(update={"pooling_type": "last"}))


def test_dimensions_are_bounded_by_the_model() -> None:
    spec = PoolingSpec(hidden_size=48)
    assert spec.resolve(PoolingParams(dimensions=48)).dimensions == 48
    with pytest.raises(ValueError, match="dimensions must be between 1 and 48, not 49"):
        spec.resolve(PoolingParams(dimensions=49))


def test_a_named_head_that_is_not_there_is_none_for_embedding_models(tmp_path: Path) -> None:
    """As Qwen3-Embedding-8B: the architecture has a head, the tensors have none and no prefix."""
    model: Any = make_model("qwen3")
    model.save_pretrained(tmp_path)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.model.state_dict().items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    assert read_model_spec(tmp_path).has_lm_head, "an incomplete checkpoint, as far as anyone knows"
    write_modules(tmp_path, ["Transformer", "Pooling"], mode("pooling_mode_lasttoken"))
    spec = read_model_spec(tmp_path)
    assert not spec.has_lm_head
    loaded = load_model(tmp_path, spec, Mesh.single(torch.device("cpu")), torch.float32)
    assert not hasattr(loaded, "lm_head")
