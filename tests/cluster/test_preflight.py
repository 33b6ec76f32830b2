"""What must fail before anything is started, and what the message must name."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from manta.cluster import preflight
from manta.cluster.preflight import PreflightError, check
from manta.configs.schema import ServeConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 131,
    "torch_dtype": "bfloat16",
}


def _folder(path: Path, **changes: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(LLAMA | changes))
    (path / "model.safetensors").touch()
    return str(path)


def _check(model: str, **settings: Any) -> preflight.ModelFacts:
    return check(ServeConfig(model=model, port=0, grpc_port=0, **settings), on_gpu=False)


def test_a_good_deployment_passes(tmp_path: Path) -> None:
    facts = _check(_folder(tmp_path), tensor_parallel_size=2, pipeline_parallel_size=3, max_model_len=512)
    assert facts.spec.num_kv_heads == 2
    assert facts.folder == tmp_path


def test_more_ranks_than_kv_heads_pass(tmp_path: Path) -> None:
    _check(_folder(tmp_path, num_key_value_heads=1), tensor_parallel_size=3)


@pytest.mark.parametrize(
    ("changes", "settings", "parts"),
    [
        ({}, {"tensor_parallel_size": 4}, ["--tensor-parallel-size 4", "6 attention heads", "1, 2, 3, 6"]),
        ({}, {"tensor_parallel_size": 3}, ["--tensor-parallel-size 3", "2 KV heads"]),
        ({}, {"pipeline_parallel_size": 4}, ["--pipeline-parallel-size 4", "3 layers"]),
        ({}, {"max_model_len": 513}, ["--max-model-len 513", "512"]),
        ({"architectures": ["GPT2LMHeadModel"]}, {}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"quantization_config": {"bits": 4}}, {}, ["quantized"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {}, ["yarn", "llama3"]),
        ({"torch_dtype": "int8"}, {}, ["int8"]),
        ({}, {"kv_cache_memory_bytes": 1000, "max_model_len": 64}, ["--kv-cache-memory-bytes 1000", "64"]),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(PreflightError) as error:
        _check(_folder(tmp_path, **changes), **settings)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="does not exist"):
        _check(str(tmp_path / "nope"))
    with pytest.raises(PreflightError, match=r"no config\.json"):
        _check(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PreflightError, match="not valid JSON"):
        _check(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(PreflightError, match="lacks"):
        _check(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(PreflightError, match=r"no \.safetensors weights"):
        _check(str(tmp_path))
    _check(str(tmp_path), load_format="dummy")


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_memory_bytes", lambda: 2**30)
    with pytest.raises(PreflightError, match="too little memory") as error:
        _check(_folder(tmp_path, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80))
    assert "1.0 GiB free" in str(error.value)


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = ServeConfig(model=_folder(tmp_path), host="127.0.0.1", port=port, grpc_port=0)
        with pytest.raises(PreflightError, match=f"--port {port} cannot be used"):
            check(config, on_gpu=False)


def test_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "model")
    (tmp_path / "chat.jinja").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ServeConfig(model="~/model", tokenizer="org/name", chat_template="chat.jinja")
    resolved = preflight.with_absolute_paths(config)
    assert (resolved.model, resolved.tokenizer) == (str(tmp_path / "model"), "org/name")
    assert resolved.chat_template == str(tmp_path / "chat.jinja")
    assert resolved.model_name == "~/model"


def test_a_chat_template_as_text_is_no_path() -> None:
    text = "{% for message in messages %}" + "{{ message.content }}" * 20 + "{% endfor %}"
    assert preflight.with_absolute_paths(ServeConfig(model="org/name", chat_template=text)).chat_template == text
