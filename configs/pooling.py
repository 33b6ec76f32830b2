"""How prompts become vectors: what a checkpoint says of it, in the files of sentence-transformers, and what a request
may change."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from manta.configs.model import ModelError, ModelSpec, read_json_value
from manta.configs.schema import ServeConfig

PoolingKind = Literal["last", "mean", "cls"]

# Of 1_Pooling/config.json; a later form has one of the short names in "pooling_mode".
_MODES: dict[str, PoolingKind] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
_MODE_NAMES: dict[str, PoolingKind] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}


class PoolingParams(BaseModel):
    """What one request wants of its vector; vLLM's name. None is the model's default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dimensions: int | None = Field(default=None, ge=1)  # only so many of the first values
    normalize: bool | None = None  # to length 1, after that


class PoolingSpec(BaseModel):
    """What a served model makes of a prompt where a request says nothing else."""

    model_config = ConfigDict(frozen=True)

    kind: PoolingKind = "last"
    normalize: bool = True
    hidden_size: int

    def resolve(self, params: PoolingParams) -> "Pooling":
        """Raises ValueError for more dimensions than there are."""
        dimensions = self.hidden_size if params.dimensions is None else params.dimensions
        if dimensions > self.hidden_size:
            raise ValueError(f"dimensions must be between 1 and {self.hidden_size}, not {dimensions}")
        normalize = self.normalize if params.normalize is None else params.normalize
        return Pooling(kind=self.kind, normalize=normalize, dimensions=dimensions)

    @classmethod
    def read(cls, folder: Path, config: ServeConfig, spec: ModelSpec) -> Self:
        """Flags before the checkpoint's files, these before the last token's normalised state. Raises ModelError."""
        kind, normalize = _read_modules(folder, config.pooling_type)
        if config.pooling_normalize != "auto":
            normalize = config.pooling_normalize == "on"
        return cls(kind=kind, normalize=normalize, hidden_size=spec.hidden_size)


class Pooling(BaseModel):
    """How one prompt becomes a vector, every default resolved."""

    model_config = ConfigDict(frozen=True)

    kind: PoolingKind
    normalize: bool
    dimensions: int


def _read_modules(folder: Path, wanted: PoolingKind | None) -> tuple[PoolingKind, bool]:
    """What modules.json names: the transformer, a pooling, perhaps a normalisation, and nothing else. `wanted` stands
    for the pooling and for what cannot be served."""
    modules = read_json_value(folder / "modules.json")
    kind: PoolingKind = wanted or "last"
    if modules is None:
        return kind, True
    normalize = False
    for module in modules if isinstance(modules, list) else [modules]:
        name = str(module.get("type", "")).rsplit(".", 1)[-1] if isinstance(module, dict) else ""
        if name == "Normalize":
            normalize = True
        elif wanted is not None:
            continue
        elif name == "Pooling":
            kind = _read_mode(folder / str(module.get("path", "1_Pooling")) / "config.json")
        elif name != "Transformer":
            raise ModelError(
                f"modules.json has a module of type {name!r}, without which embeddings would be wrong; "
                f"pooling_type says to do without such modules"
            )
    return kind, normalize


def _read_mode(path: Path) -> PoolingKind:
    config: Any = read_json_value(path)
    if not isinstance(config, dict):
        raise ModelError(f"modules.json names a pooling, but {path} is no JSON object")
    asked = [name for name, is_on in config.items() if name.startswith("pooling_mode_") and is_on is True]
    if "pooling_mode" in config:
        asked = [str(config["pooling_mode"])]
    kinds = [kind for name in asked if (kind := (_MODES | _MODE_NAMES).get(name))]
    if len(asked) != 1 or len(kinds) != 1:
        raise ModelError(
            f"{path} asks for {', '.join(asked) or 'no pooling'}; one of {', '.join(_MODES)} can be served. "
            f"pooling_type says what to do instead"
        )
    return kinds[0]
