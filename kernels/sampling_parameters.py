"""How slots choose their tokens, as the samplers read it."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Parameters(Protocol):
    """How each slot's tokens are chosen, one array per parameter, by slot. A temperature of 0 means the best token;
    top_k 0, top_p 1, min_p 0, penalties 0, 0 and 1 are off; stop_token_ids [slots, ids] is padded with -1."""

    seed: NDArray[np.uint64]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    presence_penalty: NDArray[np.float32]
    frequency_penalty: NDArray[np.float32]
    repetition_penalty: NDArray[np.float32]
    num_prompt_tokens: NDArray[np.int64]
    min_tokens: NDArray[np.int64]
    stop_token_ids: NDArray[np.int64]
