"""What a sequence's own tokens change about its next one: penalties, and no end before min_tokens.

Meanings as in vLLM: the repetition penalty (Keskar et al., CTRL, 2019, section 4.1) counts prompt and output, presence
and frequency penalties count the output alone.
"""

import numpy as np
import torch
from torch import Tensor

from manta.workers.columns import Ints
from manta.workers.sampling_table import NO_TOKEN, SamplingTable
from manta.workers.token_table import TokenTable
from manta.workers.transfer import upload


def mask_stop_tokens(logits: Tensor, table: SamplingTable, slots: Ints, positions: Ints) -> None:
    """Sets stop token ids to -inf, in place, where a row has not yet generated min_tokens.

    logits float32 [N, vocab]; row i belongs to slots[i] and chooses the token at positions[i].
    """
    early = np.flatnonzero(positions - table.num_prompt_tokens[slots] < table.min_tokens[slots])
    if not early.size:
        return
    token_ids = table.stop_token_ids[slots[early]]
    row, column = np.nonzero(token_ids != NO_TOKEN)
    index = upload([early[row], token_ids[row, column]], logits.device)
    logits[index[0], index[1]] = -torch.inf


def apply_penalties(logits: Tensor, table: SamplingTable, tokens: TokenTable, slots: Ints, positions: Ints) -> None:
    """Applies the three penalties, in place, to the rows whose slots ask for any.

    logits float32 [N, vocab]; row i belongs to slots[i] and chooses the token at positions[i]. Costs the length of the
    longest sequence concerned, for each row concerned.
    """
    rows = np.flatnonzero(table.penalised[slots])
    if not rows.size:
        return
    slots, positions = slots[rows], positions[rows]
    length = int(positions.max())
    row_index, slot_index, ends, prompts = upload(
        [rows, slots, positions, table.num_prompt_tokens[slots]], logits.device
    )
    presence, frequency, repetition = upload(
        [table.presence_penalty[slots], table.frequency_penalty[slots], table.repetition_penalty[slots]],
        logits.device,
    )
    history = tokens.first(slot_index, length)  # [P, length]
    place = torch.arange(length, device=logits.device)
    exists = place < ends[:, None]
    is_output = exists & (place >= prompts[:, None])
    # Behind a sequence's end stands its first token once more: a token is penalised once, however often it comes.
    history = torch.where(exists, history, history[:, :1])

    num_output = logits.new_zeros(rows.size, logits.shape[1])
    num_output.scatter_add_(1, history, is_output.to(logits.dtype))
    count = num_output.gather(1, history)
    x = logits[row_index[:, None], history]
    x = torch.where(x > 0, x / repetition[:, None], x * repetition[:, None])
    x -= frequency[:, None] * count + presence[:, None] * (count > 0)
    logits[row_index[:, None], history] = x
