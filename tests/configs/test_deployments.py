"""The deployments that ship: each loads as `manta serve --config` loads it, and fits the GPUs it is written for."""

import re
from pathlib import Path

import pytest
import yaml

from manta.cluster.cli.flags import parse_serve_config
from manta.cluster.preflight import check_parallel
from manta.configs.memory_plan import plan_memory
from manta.configs.public_models import public_id, public_spec
from tests.support.server import ROOT

DEVICE_BYTES = 80 * 2**30  # their comments say GPUs of 80 GB
FILES = sorted((ROOT / "configs").glob("*.yaml"))
PUBLIC = [file for file in FILES if file.name != "demo.yaml"]


def test_there_are_deployments_of_each_kind() -> None:
    configs = [parse_serve_config(["--config", str(file)]) for file in PUBLIC]
    splits = {(public_id(c.model), c.tensor_parallel_size, c.pipeline_parallel_size) for c in configs}
    assert {
        ("meta-llama/Llama-3.1-8B", 1, 1),
        ("meta-llama/Llama-3.1-70B", 4, 1),
        ("meta-llama/Llama-3.1-70B", 8, 1),
        ("meta-llama/Llama-3.1-405B", 8, 2),
    } <= splits
    assert any(config.data_parallel_size > 1 for config in configs)
    assert any(config.min_num_replicas < config.max_num_replicas for config in configs)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_say_what_the_schema_says(file: Path) -> None:
    config = parse_serve_config(["--config", str(file)])
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    for name, value in written.items():
        assert "_" not in name, f"{name}: as the flag is written"
        if name != "kv-cache-memory-bytes":
            assert getattr(config, name.replace("-", "_")) == value


@pytest.mark.parametrize("file", PUBLIC, ids=lambda file: file.stem)
def test_they_fit(file: Path) -> None:
    config = parse_serve_config(["--config", str(file)])
    known = public_id(config.model)
    assert known is not None, f"{config.model} is no model whose shape is known"
    check_parallel(config, public_spec(known))
    plan = plan_memory(config, public_spec(known), DEVICE_BYTES)
    assert plan.fits, plan.problem
    assert plan.max_model_len == config.max_model_len
    # Not by a hair: the estimates beside weights and blocks may be half as much again.
    for stage in plan.stages:
        estimated = stage.table_bytes + stage.activation_bytes + stage.outside_bytes
        assert stage.left_bytes - estimated // 2 > stage.kv.bytes_of(plan.max_model_len)


def test_the_document_lists_them() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w.-]+\.yaml)` \|", page, re.MULTILINE)) == {file.name for file in PUBLIC}


def test_fp8_is_where_16_bits_do_not_fit() -> None:
    """The 405B deployment of one host is why there is one of fp8; the one of two hosts needs none."""
    for file in PUBLIC:
        config = parse_serve_config(["--config", str(file)])
        wide = config.model_copy(update={"quantization": None})
        spec = public_spec(str(public_id(config.model)))
        assert plan_memory(wide, spec, DEVICE_BYTES).fits == (config.quantization is None), file.name
