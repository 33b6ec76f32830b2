"""What a checkpoint's config.json says about the model, for the architectures Manta serves."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from manta.configs.quantization import QuantizationError, QuantizationSpec, parse_quantization

DType = Literal["bfloat16", "float16", "float32"]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# Checkpoints without an LM head, of models that make embeddings.
HEADLESS = {name.replace("ForCausalLM", "Model"): family for name, family in ARCHITECTURES.items()}
NO_LM_HEAD = "the checkpoint has no LM head: it makes embeddings of prompts, and no text"
_DTYPES: dict[str, DType] = {
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "half": "float16", "fp16": "float16",
    "float32": "float32", "float": "float32", "fp32": "float32",
}  # fmt: skip


class ModelError(ValueError):
    """The checkpoint cannot be served; the message says why and what would work."""


class RopeSpec(BaseModel):
    """Rotary embedding. `kind` "llama3" uses all fields (Llama 3.1), "linear" uses factor (vicuna-16k)."""

    model_config = ConfigDict(frozen=True)

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


class ModelSpec(BaseModel):
    """The shape of a decoder, architecture differences spelled out as fields. Frozen."""

    model_config = ConfigDict(frozen=True)

    architecture: str
    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    max_position: int
    windows: tuple[int | None, ...]  # per layer: attention reaches back this many tokens, itself included; None: all
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    has_lm_head: bool = True  # else nothing can be generated
    dtype: DType
    eos_token_ids: tuple[int, ...]
    quantization: QuantizationSpec | None = None  # of the checkpoint's weights

    @property
    def num_weights(self) -> int:
        """Parameters of the whole model."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        num_matrices = 2 if self.has_lm_head and not self.tie_word_embeddings else 1
        embeddings = self.vocab_size * self.hidden_size * num_matrices
        return embeddings + self.num_layers * layer + self.hidden_size


def read_model_spec(folder: Path) -> ModelSpec:
    """Parses `folder/config.json` (and generation_config.json for end-of-sequence ids). Raises ModelError.

    An embedding model of sentence-transformers may name the architecture with a head and have none.
    """
    if not folder.is_dir():
        raise ModelError(f"model folder {str(folder)!r} does not exist")
    config = read_json(folder / "config.json")
    if config is None:
        raise ModelError(f"{str(folder)!r} has no config.json: it is not a Hugging Face model folder")
    generation = read_json(folder / "generation_config.json") or {}
    spec = parse_model_spec(config, generation)
    if spec.has_lm_head and not spec.tie_word_embeddings and (folder / "modules.json").is_file():
        names = tensor_names(folder)
        if names and "lm_head.weight" not in names:
            return spec.model_copy(update={"has_lm_head": False})
    return spec


def parse_model_spec(config: dict[str, Any], generation: dict[str, Any]) -> ModelSpec:
    """Builds the spec from parsed JSON. Raises ModelError for what Manta does not serve."""
    names = config.get("architectures") or ["(none)"]
    architecture = names[0]
    if architecture not in ARCHITECTURES | HEADLESS:
        raise ModelError(f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    family = (ARCHITECTURES | HEADLESS)[architecture]
    try:
        num_heads = int(config["num_attention_heads"])
        num_layers = int(config["num_hidden_layers"])
        hidden_size = int(config["hidden_size"])
        max_position = int(config.get("max_position_embeddings") or config.get("max_sequence_length") or 2048)
        attention_bias = bool(config.get("attention_bias", False))
        return ModelSpec(
            architecture=architecture,
            family=family,
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or hidden_size // num_heads),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(config, max_position),
            max_position=max_position,
            windows=_windows(config, family, num_layers),
            qkv_bias=family == "qwen2" or (family != "mistral" and attention_bias),
            o_bias=family in ("llama", "qwen3") and attention_bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            has_lm_head=architecture in ARCHITECTURES,
            dtype=_dtype(config),
            eos_token_ids=_token_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
            quantization=_quantization(config),
        )
    except KeyError as error:
        raise ModelError(f"config.json lacks {error.args[0]!r}") from None


def tensor_names(folder: Path) -> set[str]:
    """Of the safetensors files of a folder, by their index or their headers. Raises ModelError."""
    index = read_json(folder / "model.safetensors.index.json")
    if index is not None:
        return set(index.get("weight_map") or ())
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                names |= json.loads(file.read(min(length, path.stat().st_size))).keys()
            except (ValueError, AttributeError) as error:
                raise ModelError(f"{path} cannot be read as safetensors: {error}") from None
    return names - {"__metadata__"}


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no such file. Raises ModelError."""
    value = read_json_value(path)
    if value is None or isinstance(value, dict):
        return value
    raise ModelError(f"{path} must hold a JSON object")


def read_json_value(path: Path) -> Any:
    """The JSON in a file, None if there is no such file. Raises ModelError."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None


def _dtype(config: dict[str, Any]) -> DType:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if name not in _DTYPES:
        raise ModelError(f"weights of dtype {name!r} are not supported; use bfloat16, float16 or float32")
    return _DTYPES[name]


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _quantization(config: dict[str, Any]) -> QuantizationSpec | None:
    found = config.get("quantization_config") or config.get("compression_config")
    try:
        return parse_quantization(found) if found else None
    except QuantizationError as error:
        raise ModelError(str(error)) from None


def _rope(config: dict[str, Any], max_position: int) -> RopeSpec:
    """transformers 5 writes `rope_parameters`; earlier ones `rope_theta` and `rope_scaling`."""
    params = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = float(params.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = params.get("rope_type") or params.get("type") or "default"
    if float(params.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("partial rotary embeddings are not supported")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=float(params["factor"]))
    if kind == "llama3":
        return RopeSpec(
            theta=theta,
            kind="llama3",
            factor=float(params["factor"]),
            low_freq_factor=float(params["low_freq_factor"]),
            high_freq_factor=float(params["high_freq_factor"]),
            original_max_position=int(params.get("original_max_position_embeddings") or max_position),
        )
    raise ModelError(f"rope scaling {kind!r} is not supported; supported: default, linear, llama3")


def _windows(config: dict[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    layer_types = config.get("layer_types")
    if family == "llama" or not window:
        return (None,) * num_layers
    if layer_types:
        return tuple(int(window) if kind == "sliding_attention" else None for kind in layer_types)
    if family == "mistral":
        return (int(window),) * num_layers
    if not config.get("use_sliding_window", False):
        return (None,) * num_layers
    first = int(config.get("max_window_layers", num_layers))
    return tuple(int(window) if layer >= first else None for layer in range(num_layers))
