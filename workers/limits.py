"""The sizes a worker's state is bounded by."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Fixed when the worker starts: from the configuration, the model and the number of KV blocks."""

    num_blocks: int
    block_size: int  # tokens per KV block
    max_num_seqs: int  # rows that sample in one step at most
    max_num_batched_tokens: int  # tokens of one step at most
    max_model_len: int  # tokens of one sequence at most
    vocab_size: int

    @property
    def max_num_slots(self) -> int:
        """Twice the sequences that run at once: a freed slot stays unused until the steps in flight are over."""
        return 2 * self.max_num_seqs

    @property
    def max_blocks_per_seq(self) -> int:
        return -(-self.max_model_len // self.block_size)
