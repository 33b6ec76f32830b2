"""Makes vectors of the prompts of a step whose slots have pooling: sums of hidden states, over as many steps as a
prompt takes, in float32."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manta.workers.columns import Ints
from manta.workers.pooled_prompt import PooledPrompt
from manta.workers.slot_table import Rows
from manta.workers.transfer import download, upload

MAX_POOLED_TOKENS = 1024  # at a time, whatever the step: what scoring takes at most is more memory


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a step computes of P prompts."""

    prompts: list[PooledPrompt]  # P, by row
    is_last: list[bool]  # P: whether the prompt ends with the step
    tokens: Ints  # int64 [S]: which of the step's T tokens count, ascending
    counts: Ints  # int64 [P]: how many of these are of each prompt; 0 is possible

    def counts_within(self, begin: int, end: int) -> Ints:
        """int64 [P]: how many of tokens[begin:end] are of each prompt."""
        ends = np.cumsum(self.counts)
        within: Ints = np.minimum(ends, end) - np.maximum(ends - self.counts, begin)
        return np.maximum(within, 0)


@dataclass(frozen=True, slots=True)
class Vectors:
    """Of the prompts that end with a step, on the device or on their way to the host."""

    prompts: list[PooledPrompt]
    sums: Tensor  # float32 [prompts, hidden]

    def download(self) -> "Vectors":
        """In host memory; from a GPU the copy is only launched."""
        return Vectors(self.prompts, download(self.sums))

    def encode(self) -> bytes:
        """The column of a StepResult. In host memory only."""
        rows = zip(self.prompts, self.sums.numpy(), strict=True)
        return b"".join(prompt.finish(total).tobytes() for prompt, total in rows)


class Pooler:
    """`prompts` are the slot table's, by slot. `is_output_rank`: whether anybody hears of their vectors."""

    def __init__(self, prompts: dict[int, PooledPrompt], is_output_rank: bool = True) -> None:
        self._prompts = prompts
        self._is_output_rank = is_output_rank

    def pieces(self, rows: Rows) -> Pieces | None:
        """None where no row's slot has pooling. The same on every rank of the stage."""
        if not self._prompts:
            return None
        first = np.cumsum(rows.num_tokens) - rows.num_tokens
        prompts: list[PooledPrompt] = []
        is_last: list[bool] = []
        parts: list[Ints] = []
        for row in range(rows.num_decodes, rows.slots.size):
            prompt = self._prompts.get(int(rows.slots[row]))
            if prompt is None:
                continue
            start, num_tokens = int(rows.starts[row]), int(rows.num_tokens[row])
            part = prompt.part(start, num_tokens)
            prompts.append(prompt)
            is_last.append(prompt.ends_with(start, num_tokens))
            parts.append(np.arange(part.start, part.stop) + first[row])
        if not prompts:
            return None
        return Pieces(prompts, is_last, np.concatenate(parts), np.array([part.size for part in parts]))

    def pool(self, pieces: Pieces, hidden: Tensor, kept: Ints | None = None) -> Vectors | None:
        """Adds the step's part to each prompt's sum; returns the whole sums of those that end.

        hidden: [T, size] after the final norm, of all tokens of the step, or of those that `kept` (ascending) names.
        """
        if not self._is_output_rank:
            return None
        index = pieces.tokens if kept is None else np.searchsorted(kept, pieces.tokens)
        sums = torch.zeros(len(pieces.prompts), hidden.shape[1], device=hidden.device)
        for begin in range(0, index.size, MAX_POOLED_TOKENS):
            end = min(begin + MAX_POOLED_TOKENS, index.size)
            at, counts = upload([index[begin:end], pieces.counts_within(begin, end)], hidden.device)
            # unsafe: its checks would wait for the device
            sums += torch.segment_reduce(hidden[at].float(), "sum", lengths=counts, unsafe=True)
        for place, (prompt, is_last) in enumerate(zip(pieces.prompts, pieces.is_last, strict=True)):
            if prompt.sum is not None:
                sums[place] += prompt.sum
            prompt.sum = None if is_last else sums[place].clone()
        return _ending(pieces, sums)


def _ending(pieces: Pieces, sums: Tensor) -> Vectors | None:
    ended: Sequence[int] = [place for place, is_last in enumerate(pieces.is_last) if is_last]
    if not ended:
        return None
    if len(ended) < len(pieces.prompts):
        sums = sums[upload([np.array(ended, np.int64)], sums.device)[0]]
    return Vectors([pieces.prompts[place] for place in ended], sums).download()
