"""What it costs to go on with a sequence in another replica: copying its KV blocks there, or computing them again."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MoveFigures:
    """As measured by whoever copies and computes. Ranks copy side by side, each its own part of a block."""

    block_bytes: int  # of a KV block, on the rank that holds most of it
    copy_bytes_per_s: float  # of one rank, while steps go on beside it
    copy_overhead_s: float  # of a copy, whatever its size
    prefill_tokens_per_s: float  # of a replica that computes prompts


def copy_s(figures: MoveFigures, num_blocks: int) -> float:
    """Seconds for which a sequence stands still while so many blocks are copied."""
    return figures.copy_overhead_s + num_blocks * figures.block_bytes / figures.copy_bytes_per_s


def recompute_s(figures: MoveFigures, num_tokens: int) -> float:
    """Seconds for which it stands still while the KV of so many tokens is computed again. Others in the replica wait
    for these tokens, too, while a copy hardly costs them anything: so this is a lower bound of what it costs all."""
    return num_tokens / figures.prefill_tokens_per_s


def is_copying_cheaper(figures: MoveFigures, num_blocks: int, num_tokens: int) -> bool:
    """The rule by which a sequence is copied. num_blocks: those that the target does not have in its prefix cache;
    num_tokens: those of whose KV the target would have to compute again, that is, all but what it has cached."""
    return copy_s(figures, num_blocks) < recompute_s(figures, num_tokens)
