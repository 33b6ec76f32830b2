"""How tokens are chosen and when a request ends: the one set of sampling parameters behind every door."""

import enum
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from manta.configs.structured_outputs import StructuredOutputsParams, as_structured_outputs

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 300
MAX_LOGIT_BIAS = 100.0
MAX_ALLOWED_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARACTERS = 256
MAX_SEED = 2**64 - 1
GREEDY_BELOW = 1e-5  # a lower temperature overflows fp32 logits; it means greedy


_ONLY_WITH_BEAMS = ("length_penalty", "early_stopping")
# What changes which tokens are possible, or looks at texts while they are made. What draws tokens has no meaning there.
_NOT_WITH_BEAMS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "logprobs",
    "prompt_logprobs",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
)


def _as_tuple(value: object) -> object:
    """`stop="\\n"` and `stop=None` are as common as a list."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _listed(value: object) -> object:
    """Strict validation takes no list for a tuple; of several equal ids one is enough."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(dict.fromkeys(value) if all(type(each) is int for each in value) else value)


def _as_biases(value: object) -> object:
    """JSON has token ids as strings."""
    if isinstance(value, Mapping):
        return {
            int(key) if isinstance(key, str) and key.removeprefix("-").isdecimal() else key: bias
            for key, bias in value.items()
        }
    return value


class RequestOutputKind(enum.Enum):
    """What each RequestOutput of a stream holds: all so far, what is new, or all, once, at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


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
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="tell each token's log-probability, and so many of the best tokens'"
    )
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="the same for the prompt's tokens")
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_as_biases)] = Field(
        None, max_length=MAX_LOGIT_BIASES, description="token id -> what is added to its logit"
    )
    allowed_token_ids: Annotated[tuple[int, ...] | None, BeforeValidator(_listed)] = Field(
        None, min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS, description="no other tokens are generated"
    )
    bad_words: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        (), max_length=MAX_BAD_WORDS, description="texts that are not generated"
    )
    structured_outputs: Annotated[StructuredOutputsParams | None, BeforeValidator(as_structured_outputs)] = Field(
        None, description="what the output must look like"
    )
    best_of: int | None = Field(
        None, ge=1, le=128, description="generate so many and give the n most probable; with beams: their number"
    )
    use_beam_search: bool = Field(False, description="search with best_of (else n) beams; nothing is drawn")
    length_penalty: float = Field(
        1.0, ge=-100.0, le=100.0, description="beams rank by their log-probability / their length to this power"
    )
    early_stopping: bool | Literal["never"] = Field(
        False, description="true: once that many beams ended; false: once no better one is likely; never: possible"
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=2**31 - 1, description="prompt tokens kept at most, the last ones; -1: as many as fit"
    )
    output_kind: RequestOutputKind = Field(
        RequestOutputKind.CUMULATIVE, description="what AsyncLLM yields; no field of requests"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must not exceed max_tokens={self.max_tokens}")
        if any(not text for text in self.stop):
            raise ValueError("stop must not hold an empty string")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError("stop_token_ids must not be negative")
        for name in ("allowed_token_ids", "logit_bias"):
            if any(token < 0 for token in getattr(self, name) or ()):
                raise ValueError(f"{name} must not hold negative token ids")
        for token, bias in sorted((self.logit_bias or {}).items()):
            if abs(bias) > MAX_LOGIT_BIAS:
                raise ValueError(f"logit_bias={bias} of token {token} must be between -100 and 100")
        for word in self.bad_words:
            if not word.strip() or len(word) > MAX_BAD_WORD_CHARACTERS:
                raise ValueError(
                    f"bad_words must be texts of up to {MAX_BAD_WORD_CHARACTERS} characters that are not blank"
                )
        if self.structured_outputs is not None and self.allowed_token_ids is not None:
            raise ValueError("structured_outputs and allowed_token_ids exclude each other")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens must be -1 (what fits) or at least 1")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of={self.best_of} must be at least n={self.n}")
        for name in _NOT_WITH_BEAMS if self.use_beam_search else _ONLY_WITH_BEAMS:
            if getattr(self, name) != type(self).model_fields[name].default:
                relation = "is not possible with" if self.use_beam_search else "needs"
                raise ValueError(f"{name} {relation} use_beam_search")
        return self

    @property
    def num_sequences(self) -> int:
        """How many are generated for each prompt, or asked of its beam search."""
        return self.n if self.use_beam_search else self.best_of or self.n

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW
