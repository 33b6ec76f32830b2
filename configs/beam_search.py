"""Parameters of a beam search."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_BEAM_WIDTH = 128


class BeamSearchParams(BaseModel):
    """vLLM's names, and `early_stopping` as in transformers, whose rules and scores are followed. Frozen; raises
    pydantic.ValidationError naming the field."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    beam_width: int = Field(ge=1, le=MAX_BEAM_WIDTH, description="beams that go on at each step, and hypotheses given")
    max_tokens: int = Field(ge=1, le=2**31 - 1, description="generated tokens at most")
    min_tokens: int = Field(0, ge=0, le=2**31 - 1, description="no end before so many generated tokens")
    ignore_eos: bool = Field(False, description="go on after the model's end-of-sequence token")
    temperature: float = Field(0.0, ge=0.0, le=0.0, description="beams are not drawn")
    length_penalty: float = Field(
        1.0, ge=-100.0, le=100.0, description="a hypothesis ranks by its log-probability / its length to this power"
    )
    early_stopping: bool | Literal["never"] = Field(
        False,
        description="true: once beam_width hypotheses ended; false: once no better one is likely; never: possible",
    )
    include_stop_str_in_output: bool = Field(False, description="keep the token that ended the text")
