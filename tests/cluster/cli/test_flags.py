"""Flags come from the schema, and every mistake is one sentence."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.cluster.cli.flags import UsageError, parse_serve_config
from manta.cluster.cli.main import main
from manta.configs.schema import ServeConfig
from manta.configs.tenant_weights import read_weights


def test_every_field_has_a_flag_a_group_and_a_default_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in ServeConfig.model_fields.items():
        assert name == "model" or f"--{name.replace('_', '-')}" in text
        assert field.description, name
        assert " ".join(field.description.split()) in text, name
    for group in ("Model:", "Parallelism:", "KV cache:", "Scheduler:", "Front end:"):
        assert group in text


def test_flags_reach_the_config() -> None:
    words = "folder -tp 2 -pp=2 --block-size 32 --kv-cache-memory-bytes 1.5GiB --no-enable-prefix-caching --port 0"
    config = parse_serve_config(words.split())
    assert config.model == "folder"
    assert (config.tensor_parallel_size, config.pipeline_parallel_size, config.block_size) == (2, 2, 32)
    assert config.kv_cache_memory_bytes == 1536 * 2**20
    assert config.enable_prefix_caching is False
    assert config.grpc_port == ServeConfig.model_fields["grpc_port"].default


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: from-file\nmax-num-seqs: 8\nblock_size: 32\n")
    config = parse_serve_config(["--config", str(file), "--max-num-seqs", "9"])
    assert (config.model, config.max_num_seqs, config.block_size) == ("from-file", 9, 32)


@given(max_num_seqs=st.integers(1, 2048), seed=st.integers(0, 2**32 - 1), utilization=st.floats(0.01, 1.0))
def test_config_survives_the_wire(max_num_seqs: int, seed: int, utilization: float) -> None:
    config = ServeConfig(model="m", max_num_seqs=max_num_seqs, seed=seed, gpu_memory_utilization=utilization)
    assert ServeConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("text", ["a=2,b=0.5", '{"a": 2, "b": 0.5}', " a = 2 , b=.5"])
def test_weights_of_tenants(text: str) -> None:
    config = parse_serve_config(["m", "--scheduling-policy", "fair", "--tenant-weights", text])
    assert read_weights(config.tenant_weights) == {"a": 2.0, "b": 0.5}
    assert ServeConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ["name the model"]),
        ("m --max-num-seq 3", ["--max-num-seq;", "did you mean --max-num-seqs"]),
        ("m --wings 2", ["unknown flag --wings"]),
        ("m --max-num-seqs many", ["--max-num-seqs", "integer", "'many'"]),
        ("m --max-num-seqs 0", ["--max-num-seqs", "greater than or equal to 1", "'0'"]),
        ("m --dtype int4", ["--dtype", "bfloat16", "'int4'"]),
        ("m --block-size 24", ["block_size=24", "power of two"]),
        ("m --standby-workers 1", ["standby_workers", "distributed_executor_backend=local"]),
        ("m --max-num-seqs 4096", ["max_num_batched_tokens=2048", "max_num_seqs=4096"]),
        ("m --port 80 --grpc-port 80", ["must differ"]),
        ("m --tenant-weights a=2", ["tenant_weights", "scheduling_policy=fair"]),
        ("m --scheduling-policy fair --tenant-weights a=0", ["--tenant-weights", "'a'", "above 0"]),
        ("m --scheduling-policy fair --tenant-weights a:2", ["'a:2'", "tenant=weight"]),
        ('m --scheduling-policy fair --tenant-weights {"a":', ["--tenant-weights", "JSON"]),
        ("m --kv-cache-memory-bytes lots", ["--kv-cache-memory-bytes", "'lots'"]),
        ("m another", ["another"]),
        ("m --host", ["--host"]),
        ("--config /does/not/exist.yaml", ["/does/not/exist.yaml", "No such file"]),
    ],
)
def test_mistakes_are_one_sentence(words: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as error:
        parse_serve_config(words.split())
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    with pytest.raises(SystemExit) as ended:
        main(["serve", *words.split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("max_num_seq: 3", "did you mean max_num_seqs"),
        ("- a\n- b", "name: value"),
        ("a: [", "not valid YAML"),
        ("model: m\nport: high", "--port"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=part) as error:
        parse_serve_config(["--config", str(file)])
    assert "\n" not in str(error.value)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sevre"])
    assert ended.value.code == 2
    assert "serve" in capsys.readouterr().err


def test_shipped_configs_load() -> None:
    files = list(Path(__file__).parents[3].joinpath("configs").glob("*.yaml"))
    assert files
    for file in files:
        assert parse_serve_config(["--config", str(file)]).model
