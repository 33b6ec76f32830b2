"""The search finds what transformers' `generate(num_beams=...)` finds, on a small random model."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from manta.scheduler.beam_search import BeamParams, BeamSearch, Hypothesis, Row
from manta.scheduler.types import Tokens
from tests.support.checkpoints import make_model

NUM_OUTPUT = 9
PAD = 1


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", num_hidden_layers=1, hidden_size=12, intermediate_size=16)


def search(model: PreTrainedModel, prompt: list[int], params: BeamParams, min_tokens: int) -> list[Hypothesis]:
    """Every row is computed from its beginning."""
    state = BeamSearch(params, len(prompt), len(prompt) + NUM_OUTPUT, min_tokens)
    beams: list[tuple[Tokens, float]] = [(np.array(prompt, np.int32), 0.0)]
    while not state.is_over:
        with torch.no_grad():
            logits = model(torch.tensor(np.array([tokens for tokens, _ in beams]), dtype=torch.int64)).logits[:, -1]
        logprobs, ids = torch.log_softmax(logits, dim=-1).topk(params.num_candidates)
        rows = [
            Row(tokens, cumulative, ids[i].numpy().astype(np.int32), logprobs[i].numpy())
            for i, (tokens, cumulative) in enumerate(beams)
        ]
        chosen = state.advance(rows)
        beams = [
            (np.append(rows[each.parent].tokens, np.int32(each.token)), each.cumulative_logprob) for each in chosen
        ]
    return state.hypotheses


@pytest.mark.parametrize("ends", [(), tuple(range(3, 131, 12)), tuple(range(3, 131, 4))], ids=len)
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 2.0, -1.0])
@pytest.mark.parametrize(("width", "min_tokens"), [(2, 0), (5, 3)])
def test_hypotheses_and_scores_are_those_of_transformers(
    model: PreTrainedModel,
    ends: tuple[int, ...],
    early_stopping: bool | Literal["never"],
    length_penalty: float,
    width: int,
    min_tokens: int,
) -> None:
    prompt = [5, 17, 99, 3, 64, 1 + width]
    generate: Any = model.generate
    options: dict[str, Any] = {"eos_token_id": list(ends) or None, "pad_token_id": PAD, "num_beams": width}
    expected = generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=NUM_OUTPUT,
        min_new_tokens=min_tokens or None,
        num_return_sequences=width,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    params = BeamParams(width, width + len(ends), length_penalty, early_stopping, frozenset(ends))
    found = search(model, prompt, params, min_tokens)
    assert [each.score for each in found] == pytest.approx(expected.sequences_scores.tolist(), rel=1e-4)
    longest = expected.sequences.shape[1] - len(prompt)
    texts = [each.tokens.tolist() + [PAD] * (longest - len(each.tokens)) for each in found]
    assert texts == expected.sequences[:, len(prompt) :].tolist()
