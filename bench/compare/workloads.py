"""The offline workloads: token-id prompts and output lengths, the same on every machine and for every engine.

Lengths depend on the seed alone. Tokens depend on the seed and the round, so that what a prefix cache kept from one
round is of no use in the next; inside one round of `prefix` the prompts share their first 512 tokens.
"""

import random
from dataclasses import dataclass, replace

FIRST_TOKEN = 1000  # below lie special tokens
NAMES = ("mixed", "single", "prefill", "prefix")


@dataclass(frozen=True)
class Workload:
    """Requests that are handed to an engine at once; request i gives exactly `output_lens[i]` tokens."""

    name: str
    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    def head(self, num_requests: int | None) -> "Workload":
        """The first requests only, for an engine that takes too long for all of them."""
        return replace(self, prompts=self.prompts[:num_requests], output_lens=self.output_lens[:num_requests])

    def shortened(self, max_output: int) -> "Workload":
        """The same prompts with outputs of at most so many tokens."""
        return replace(self, output_lens=[min(length, max_output) for length in self.output_lens])


def make_workload(name: str, *, vocab_size: int, seed: int = 0, turn: int = 0) -> Workload:
    """The workload `name`; each `turn` has the same lengths and other tokens.

    mixed: 64 requests, prompt U[32, 256], output U[64, 128]. single: 1 request, 128 in, 128 out. prefill: 1 request,
    2,048 in, 1 out. prefix: 32 requests of 512 shared and 32 own tokens, 32 out. Raises ValueError for another name.
    """
    lengths = random.Random(f"{name} lengths {seed}")
    shared: list[int] = []
    if name == "mixed":
        sizes = [(lengths.randint(32, 256), lengths.randint(64, 128)) for _ in range(64)]
    elif name == "single":
        sizes = [(128, 128)]
    elif name == "prefill":
        sizes = [(2048, 1)]
    elif name == "prefix":
        sizes = [(32, 32)] * 32
        shared = _tokens(random.Random(f"{name} shared {seed} {turn}"), 512, vocab_size)
    else:
        raise ValueError(f"no workload {name!r}; there are {', '.join(NAMES)}")
    tokens = random.Random(f"{name} tokens {seed} {turn}")
    prompts = [shared + _tokens(tokens, prompt_len, vocab_size) for prompt_len, _ in sizes]
    return Workload(name, prompts, [output_len for _, output_len in sizes])


def _tokens(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    return [rng.randrange(FIRST_TOKEN, vocab_size) for _ in range(count)]
