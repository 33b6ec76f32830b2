"""Every model family through the whole engine, offline: greedy tokens equal transformers' in fp32, whatever the batch,
the chunks, the cache, the preemptions and the mesh."""

import random
import re
from pathlib import Path

import pytest
import torch

from manta import LLM, SamplingParams
from tests.support.checkpoints import FAMILIES, make_checkpoint, make_model

NUM_OUTPUT_TOKENS = 24
BLOCK_SIZE = 8
SPLIT = [  # family, tp, pp; logits of more shapes and meshes: tests/workers/models/test_parallel.py
    ("llama-tied", 1, 2), ("llama3.1", 2, 1), ("vicuna", 2, 2), ("mistral", 1, 2), ("qwen2", 2, 1), ("qwen3", 2, 2),
]  # fmt: skip


def _prompts() -> list[list[int]]:
    """Mixed lengths; half of them share their first 30 tokens."""
    draw = random.Random(3)
    shared = [draw.randrange(3, 131) for _ in range(30)]
    return [
        (shared if index % 2 else []) + [draw.randrange(3, 131) for _ in range(draw.randrange(1, 50))]
        for index in range(20)
    ]


def _expected(family: str, prompts: list[list[int]]) -> list[list[int]]:
    model = make_model(family)
    outputs = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_OUTPUT_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


def _pool_of_a_tenth(prompts: list[list[int]]) -> int:
    demand = sum(-(-(len(prompt) + NUM_OUTPUT_TOKENS) // BLOCK_SIZE) for prompt in prompts)
    longest = max(-(-(len(prompt) + NUM_OUTPUT_TOKENS) // BLOCK_SIZE) for prompt in prompts)
    return max(demand // 10, longest)


def _counter(llm: LLM, name: str) -> float:
    found = re.search(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", llm.metrics_text().decode(), re.MULTILINE)
    assert found, name
    return float(found.group(1))


def _check(family: str, folder: Path, tp: int, pp: int) -> None:
    prompts = _prompts()
    expected = _expected(family, prompts)
    sampling = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    with LLM(
        model=str(make_checkpoint(folder, family, max_shard_size="20KB")), dtype="float32", skip_tokenizer_init=True,
        tensor_parallel_size=tp, pipeline_parallel_size=pp, block_size=BLOCK_SIZE, max_num_seqs=16,
        max_num_batched_tokens=32, num_gpu_blocks_override=_pool_of_a_tenth(prompts),
    ) as llm:  # fmt: skip
        together = [output.outputs[0].token_ids for output in llm.generate(prompts, sampling, use_tqdm=False)]
        assert together == expected
        assert _counter(llm, "vllm:num_preemptions_total") > 0
        for index in (0, 1, 1):  # alone; the second time its prefix is cached
            assert llm.generate(prompts[index], sampling, use_tqdm=False)[0].outputs[0].token_ids == expected[index]
        assert _counter(llm, "vllm:prefix_cache_hits_total") > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    _check(family, tmp_path, tp=1, pp=1)


@pytest.mark.parametrize(("family", "tp", "pp"), SPLIT)
def test_tokens_equal_transformers_on_a_mesh(family: str, tp: int, pp: int, tmp_path: Path) -> None:
    _check(family, tmp_path, tp, pp)
