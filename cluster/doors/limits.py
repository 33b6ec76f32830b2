"""What the served model allows and prefers, read once by a frontend and given to the validator."""

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from manta.cluster.preflight import model_folder
from manta.configs.model import ModelError, read_json, read_model_spec
from manta.configs.pooling import PoolingSpec
from manta.configs.sampling import SamplingParams
from manta.configs.schema import ServeConfig

# generation_config.json name -> sampling field; the same ones that vLLM takes from there.
_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True)
class ModelLimits:
    model_name: str  # the name clients use
    vocab_size: int  # rows of the embedding: token ids below it can be in a prompt
    max_model_len: int  # prompt plus output, in tokens
    architecture: str = ""
    sampling_defaults: dict[str, Any] = field(default_factory=dict)  # used where a request says nothing
    has_lm_head: bool = True  # else the model makes embeddings alone
    pooling: PoolingSpec = field(default_factory=lambda: PoolingSpec(hidden_size=1))


def read_limits(config: ServeConfig, max_model_len: int) -> ModelLimits:
    """Reads config.json and generation_config.json of the model. Raises PreflightError or ModelError."""
    folder = model_folder(config)
    spec = read_model_spec(folder)
    generation_config = read_json(folder / "generation_config.json") or {}
    defaults = {
        ours: generation_config[name] for name, ours in _DEFAULTS.items() if generation_config.get(name) is not None
    }
    try:
        SamplingParams.model_validate(defaults)
    except ValidationError as error:
        raise ModelError(f"generation_config.json of {config.model!r} has a default that cannot be used: {error}")
    return ModelLimits(
        model_name=config.model_name,
        vocab_size=spec.vocab_size,
        max_model_len=max_model_len,
        architecture=spec.architecture,
        sampling_defaults=defaults,
        has_lm_head=spec.has_lm_head,
        pooling=PoolingSpec.read(folder, config, spec),
    )
