"""What the served model allows and prefers, read once by a frontend and given to the validator."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from manta.configs.model import ModelError, parse_model_spec
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


def read_limits(config: ServeConfig, max_model_len: int) -> ModelLimits:
    """Reads config.json and generation_config.json of the model. Raises ModelError."""
    model_config = _read_json(config.model, "config.json")
    if model_config is None:
        raise ModelError(f"{config.model!r} has no config.json: it is not a Hugging Face model")
    generation_config = _read_json(config.model, "generation_config.json") or {}
    spec = parse_model_spec(model_config, generation_config)
    defaults = {
        ours: generation_config[name] for name, ours in _DEFAULTS.items() if generation_config.get(name) is not None
    }
    try:
        SamplingParams.model_validate(defaults)
    except ValidationError as error:
        raise ModelError(f"generation_config.json of {config.model!r} has a default that cannot be used: {error}")
    return ModelLimits(config.model_name, spec.vocab_size, max_model_len, spec.architecture, defaults)


def _read_json(model: str, name: str) -> dict[str, Any] | None:
    path = Path(model) / name if Path(model).is_dir() else _hub_file(model, name)
    if path is None or not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}")
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def _hub_file(model: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{name} of {model!r} is not in the local cache and cannot be downloaded: {error}")
    except EntryNotFoundError:
        return None
    except OSError as error:  # HfHubHTTPError and RepositoryNotFoundError are OSErrors
        raise ModelError(f"{name} of {model!r} cannot be read from the Hugging Face hub: {error}")
