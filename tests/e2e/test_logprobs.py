"""Log-probabilities through the whole engine against transformers' log_softmax in fp32: whatever the batch, the chunks,
the cache, the preemptions and the mesh."""

import random
import re
from pathlib import Path

import pytest
import torch

from manta import LLM, SamplingParams
from manta.cluster.engine.outputs import RequestOutput
from tests.support.checkpoints import make_checkpoint, make_model

NUM_OUTPUT_TOKENS = 20
BLOCK_SIZE = 8
TOLERANCE = 2e-4


def _check(output: RequestOutput, asked: SamplingParams, logprobs: torch.Tensor) -> None:
    """logprobs: float32 [T, vocab], transformers' log_softmax."""
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    num_prompt = len(output.prompt_token_ids)
    told = {}
    if asked.prompt_logprobs is None:
        assert output.prompt_logprobs is None
    else:
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == num_prompt
        told |= {place: (one, asked.prompt_logprobs) for place, one in enumerate(output.prompt_logprobs) if place}
    completion = output.outputs[0]
    if asked.logprobs is None:
        assert (completion.logprobs, completion.cumulative_logprob) == (None, None)
    else:
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        told |= {num_prompt + place: (one, asked.logprobs) for place, one in enumerate(completion.logprobs)}
        expected = sum(logprobs[place - 1, ids[place]].item() for place in range(num_prompt, len(ids)))
        assert completion.cumulative_logprob == pytest.approx(expected, abs=TOLERANCE * len(ids))
    for place, (one, num_best) in told.items():
        row = logprobs[place - 1]
        assert next(iter(one)) == ids[place]
        assert len(one) in (num_best, num_best + 1)
        best = sorted((each.logprob for each in one.values()), reverse=True)[:num_best]
        assert best == pytest.approx(row.topk(num_best).values.tolist(), abs=TOLERANCE)
        for token, each in one.items():
            assert each.logprob == pytest.approx(row[token].item(), abs=TOLERANCE)
            num_above = int((row > row[token] + TOLERANCE).sum())
            assert num_above <= each.rank - 1 <= int((row >= row[token] - TOLERANCE).sum()) - 1


def _counter(llm: LLM, name: str) -> float:
    found = re.search(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", llm.metrics_text().decode(), re.MULTILINE)
    assert found, name
    return float(found.group(1))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_logprobs_equal_transformers(tp: int, pp: int, tmp_path: Path) -> None:
    draw = random.Random(5)
    shared = [draw.randrange(3, 131) for _ in range(24)]
    prompts = [
        (shared if index % 2 else []) + [draw.randrange(3, 131) for _ in range(draw.randrange(1, 50))]
        for index in range(16)
    ]
    asked = [
        SamplingParams(
            temperature=0.0 if index % 4 else 1.0, seed=index, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True,
            repetition_penalty=1.3 if index % 3 == 0 else 1.0, top_k=5,
            logprobs=(None, 0, 4, 20)[index % 4], prompt_logprobs=(2, None, 0, None, 7)[index % 5],
        )
        for index in range(16)
    ]  # fmt: skip
    model = make_model("qwen3-tied")
    with LLM(
        model=str(make_checkpoint(tmp_path, "qwen3-tied")), dtype="float32", skip_tokenizer_init=True,
        tensor_parallel_size=tp, pipeline_parallel_size=pp, block_size=BLOCK_SIZE, max_num_seqs=8,
        max_num_batched_tokens=24, num_gpu_blocks_override=16,
    ) as llm:  # fmt: skip
        for _ in range(2):  # the second time prefixes are cached
            outputs = llm.generate(prompts, asked, use_tqdm=False)
            for output, one in zip(outputs, asked, strict=True):
                ids = output.prompt_token_ids + output.outputs[0].token_ids
                with torch.inference_mode():
                    _check(output, one, model(torch.tensor([ids])).logits[0].log_softmax(dim=-1))
        assert _counter(llm, "vllm:num_preemptions_total") > 0
        assert _counter(llm, "vllm:prefix_cache_hits_total") > 0


def test_constraints_equal_transformers_with_changed_logits(tmp_path: Path) -> None:
    """Greedy: each next token is the best of transformers' logits, changed by hand."""
    model = make_model("llama")
    prompts = [[5, 9, 77, 30], [4, 4, 8], [100, 3], [17] * 20]
    asked = [
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logit_bias={7: 4.0, 12: -100.0, 90: 2.5}),
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, allowed_token_ids=list(range(0, 131, 3))),
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, allowed_token_ids=[6, 7, 8], logit_bias={7: 3.0}),
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
    ]
    with LLM(
        model=str(make_checkpoint(tmp_path, "llama")), dtype="float32", skip_tokenizer_init=True, max_num_seqs=4,
        kv_cache_memory_bytes="4MiB",
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, asked, use_tqdm=False)
    for prompt, one, output in zip(prompts, asked, outputs, strict=True):
        ids = list(prompt)
        for token in output.outputs[0].token_ids:
            with torch.no_grad():
                row = model(torch.tensor([ids])).logits[0, -1]
            if one.allowed_token_ids is not None:
                mask = torch.full_like(row, -torch.inf)
                mask[list(one.allowed_token_ids)] = 0.0
                row = row + mask
            for biased, bias in (one.logit_bias or {}).items():
                row[biased] += bias
            assert row[token] >= row.max() - 1e-3
            ids.append(token)
