"""How each slot's tokens are chosen, one column per parameter, by slot."""

from typing import Any

import numpy as np

from manta.configs.sampling import GREEDY_BELOW
from manta.protos.sampling_pb2 import Sampling
from manta.workers.columns import Ints, PlanError, grown
from manta.workers.constraints import Constraint
from manta.workers.grammar_masks import SlotGrammar
from manta.workers.grammars import GrammarError, Grammars

NO_TOKEN = -1
_COLUMNS = (
    "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "penalised", "seed", "num_prompt_tokens", "min_tokens", "stop_token_ids",
)  # fmt: skip


class SamplingTable:
    """Columns read by the sampler; their meaning is that of `protos/sampling.proto`, off-values included.

    Temperatures that mean greedy are 0 here. `penalised` marks the slots with any penalty. `stop_token_ids` is int64
    [slots, ids], padded with NO_TOKEN. What few slots ask for is in dicts, by slot: a step looks there only if they
    have anything.
    """

    def __init__(self, vocab_size: int, grammars: Grammars | None = None) -> None:
        """Without `grammars` nobody samples here, and those of requests are left out."""
        self._vocab_size = vocab_size
        self._grammars = grammars
        self.temperature = np.zeros(16, np.float32)
        self.top_k = np.zeros(16, np.int64)
        self.top_p = np.zeros(16, np.float32)
        self.min_p = np.zeros(16, np.float32)
        self.presence_penalty = np.zeros(16, np.float32)
        self.frequency_penalty = np.zeros(16, np.float32)
        self.repetition_penalty = np.zeros(16, np.float32)
        self.penalised = np.zeros(16, np.bool_)
        self.seed = np.zeros(16, np.uint64)
        self.num_prompt_tokens = np.zeros(16, np.int64)
        self.min_tokens = np.zeros(16, np.int64)
        self.stop_token_ids = np.full((16, 4), NO_TOKEN, np.int64)
        self.constraints: dict[int, Constraint] = {}
        self.grammars: dict[int, SlotGrammar] = {}
        self.num_logprobs: dict[int, int] = {}
        self.num_prompt_logprobs: dict[int, int] = {}

    def set(self, slot: int, sampling: Sampling, num_prompt_tokens: int) -> None:
        """Stores one sequence's parameters. Raises PlanError."""
        if slot >= self.temperature.size:
            for name in _COLUMNS:
                setattr(self, name, grown(getattr(self, name), slot + 1))
        self.temperature[slot] = 0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature
        self.top_k[slot] = sampling.top_k if sampling.top_k < self._vocab_size else 0
        self.top_p[slot] = sampling.top_p
        self.min_p[slot] = sampling.min_p
        self.presence_penalty[slot] = sampling.presence_penalty
        self.frequency_penalty[slot] = sampling.frequency_penalty
        self.repetition_penalty[slot] = sampling.repetition_penalty
        self.penalised[slot] = (
            sampling.presence_penalty != 0 or sampling.frequency_penalty != 0 or sampling.repetition_penalty != 1
        )
        self.seed[slot] = sampling.seed
        self.num_prompt_tokens[slot] = num_prompt_tokens
        self.min_tokens[slot] = sampling.min_tokens
        self._set_stop_token_ids(slot, [token for token in sampling.stop_token_ids if token < self._vocab_size])
        self._forget(slot)
        constraint = Constraint.of(slot, sampling, num_prompt_tokens, self._vocab_size)
        if constraint is not None:
            self.constraints[slot] = constraint
        if self._grammars is not None and sampling.HasField("grammar"):
            self.grammars[slot] = self._start_grammar(self._grammars, slot, sampling)
        if sampling.HasField("num_logprobs"):
            self.num_logprobs[slot] = sampling.num_logprobs
        if sampling.HasField("num_prompt_logprobs"):
            self.num_prompt_logprobs[slot] = sampling.num_prompt_logprobs

    def free(self, slots: Ints) -> None:
        """These slots ask for nothing any more."""
        if any(self._by_slot()):
            for slot in slots.tolist():
                self._forget(slot)

    def clear(self) -> None:
        """As `free`, of all slots."""
        for by_slot in self._by_slot():
            by_slot.clear()

    def changes_logits(self, slots: Ints) -> bool:
        """Whether choosing tokens for any of the slots may change their logits in place."""
        return bool(self.constraints or self.grammars or self.penalised[slots].any() or self.min_tokens[slots].any())

    def _forget(self, slot: int) -> None:
        for by_slot in self._by_slot():
            by_slot.pop(slot, None)

    def _by_slot(self) -> tuple[dict[int, Any], ...]:
        return self.constraints, self.grammars, self.num_logprobs, self.num_prompt_logprobs

    def _start_grammar(self, grammars: Grammars, slot: int, sampling: Sampling) -> SlotGrammar:
        """It has been compiled when the request came, and is compiled here only if it has been forgotten since."""
        try:
            compiled = grammars.compile(sampling.grammar)
        except GrammarError as error:
            raise PlanError(f"slot {slot}: {error}") from None
        stop_token_ids = [token for token in sampling.stop_token_ids if token < self._vocab_size]
        return SlotGrammar(compiled, int(self.num_prompt_tokens[slot]), stop_token_ids, self._vocab_size)

    def _set_stop_token_ids(self, slot: int, token_ids: list[int]) -> None:
        num_slots, width = self.stop_token_ids.shape
        if len(token_ids) > width:
            wider = np.full((num_slots, len(token_ids)), NO_TOKEN, np.int64)
            wider[:, :width] = self.stop_token_ids
            self.stop_token_ids = wider
        self.stop_token_ids[slot] = NO_TOKEN
        self.stop_token_ids[slot, : len(token_ids)] = token_ids
