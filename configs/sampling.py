"""How tokens are chosen and when a request ends: the one set of sampling parameters behind every door."""

from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_SEED = 2**64 - 1
GREEDY_BELOW = 1e-5  # a lower temperature overflows fp32 logits; it means greedy


def _as_tuple(value: object) -> object:
    """`stop="\\n"` and `stop=None` are as common as a list."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return value


class SamplingParams(BaseModel):
    """Sampling parameters with vLLM's names and meanings. Frozen; raises pydantic.ValidationError naming the field.

    max_tokens None means: up to the model's context length.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    n: int = Field(1, ge=1, le=128, description="completions per prompt")
    temperature: float = Field(1.0, ge=0.0, le=100.0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="smallest set of tokens with this much probability; 1 is off")
    top_k: int = Field(0, ge=-1, le=2**31 - 1, description="most probable tokens kept; 0 or -1 is off")
    min_p: float = Field(0.0, ge=0.0, le=1.0, description="least probability relative to the best token's; 0 is off")
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0, description="taken from the logit of a generated token")
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0, description="taken once per occurrence among the generated")
    repetition_penalty: float = Field(1.0, gt=0.0, le=100.0, description="divides logits of tokens seen; 1 is off")
    seed: int | None = Field(None, ge=-(2**63), le=MAX_SEED, description="same seed, same tokens; unset is random")
    max_tokens: int | None = Field(16, ge=1, le=2**31 - 1, description="generated tokens at most")
    min_tokens: int = Field(0, ge=0, le=2**31 - 1, description="no end before so many generated tokens")
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field((), max_length=MAX_STOP_STRINGS)
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_as_tuple)] = Field((), max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool = Field(False, description="go on after the model's end-of-sequence token")
    skip_special_tokens: bool = Field(True, description="leave special tokens out of the text")
    include_stop_str_in_output: bool = Field(False, description="keep the stop string that ended the text")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must not exceed max_tokens={self.max_tokens}")
        if any(not text for text in self.stop):
            raise ValueError("stop must not hold an empty string")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError("stop_token_ids must not be negative")
        return self

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW
