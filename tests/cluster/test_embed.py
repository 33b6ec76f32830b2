"""Vectors of prompts from real workers on tiny checkpoints, against transformers."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoModelForCausalLM

from manta.cluster.embedding import VectorJob
from manta.cluster.engine.batch import Job
from manta.cluster.engine.outputs import EmbeddingRequestOutput
from manta.cluster.engine.types import UNSAMPLED, EngineError, GenerationRequest, InvalidRequestError
from manta.cluster.llm import LLM
from manta.configs.pooling import Pooling, PoolingParams
from manta.configs.sampling import SamplingParams
from tests.support.checkpoints import make_checkpoint, make_model
from tests.support.small_tokenizers import TEXTS, VOCAB_SIZE, write_model_folder

FIELDS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "block_size": 8,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 40,  # long prompts take several steps
    "num_gpu_blocks_override": 80,
    "max_model_len": 320,
}
PROMPTS = [*TEXTS, "a", " ".join(TEXTS * 2), "b c", TEXTS[0], TEXTS[0] + "!"]


def hidden_states(model: Any, ids: list[int]) -> NDArray[np.float32]:
    with torch.no_grad():
        states: NDArray[np.float32] = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    return states


def assert_close(vector: Any, expected: NDArray[np.float32]) -> None:
    assert np.abs(np.array(vector) - expected).max() <= 1e-4 * np.abs(expected).max()


def unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return vector / np.float32(np.linalg.norm(vector))


def write_embedding_model(folder: Path) -> Path:
    """As Qwen3-Embedding is laid out: no head, no prefix in the names, texts end with </s>; but the mean of the states
    makes the vector."""
    write_model_folder(folder)
    model: Any = make_model("qwen3", vocab_size=VOCAB_SIZE, eos_token_id=1)
    model.model.save_pretrained(folder, max_shard_size="100KB")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3Model"]}))
    ends = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"</s>": ends}
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = ("Transformer", "Pooling", "Normalize")
    modules = [{"type": f"sentence_transformers.models.{name}", "path": f"{i}_{name}"} for i, name in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False, "word_embedding_dimension": 48}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_the_last_state_is_that_of_transformers_over_two_ranks(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # transformers shares the cores with the workers
    folder = make_checkpoint(write_model_folder(tmp_path), "llama", vocab_size=VOCAB_SIZE, eos_token_id=1)
    reference: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with LLM(str(folder), tensor_parallel_size=2, **FIELDS) as llm:
        outputs = llm.embed(PROMPTS * 3)
        states = [hidden_states(reference, output.prompt_token_ids) for output in outputs]
        for output, expected in zip(outputs, states, strict=True):
            assert_close(output.outputs.embedding, unit(expected[-1]))
        assert any(output.num_cached_tokens for output in outputs)
        short, raw = llm.embed(["a", "a"], [PoolingParams(dimensions=7), PoolingParams(normalize=False)])
        assert_close(short.outputs.embedding, unit(states[3][-1][:7]))
        assert_close(raw.outputs.embedding, states[3][-1])
        _check_scores(llm, outputs)
        _check_refusals(llm)


def _check_scores(llm: LLM, outputs: list[EmbeddingRequestOutput]) -> None:
    vectors = [np.array(output.outputs.embedding) for output in outputs]
    scored = llm.score(PROMPTS[0], PROMPTS[1:4])
    assert [one.outputs.score for one in scored] == pytest.approx(
        [vectors[0] @ vectors[i] for i in (1, 2, 3)], abs=1e-5
    )
    scored = llm.score(PROMPTS[:2], PROMPTS[2:4])
    expected = [vectors[i] @ vectors[i + 2] for i in range(2)]
    assert [one.outputs.score for one in scored] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="text_1 has 2 texts and text_2 3"):
        llm.score(["a", "b"], ["c", "d", "e"])


def _check_refusals(llm: LLM) -> None:
    full = list(range(4, 324))
    assert len(llm.embed([full])[0].outputs.embedding) == 48
    with pytest.raises(ValueError, match="prompt 1 has 321 tokens, the context holds 320"):
        llm.embed([[5], [*full, 5]])
    cut, whole = llm.embed([[*full, 5], full], truncate_prompt_tokens=-1)
    assert cut.outputs == whole.outputs
    with pytest.raises(ValueError, match="dimensions must be between 1 and 48, not 49"):
        llm.embed("a", PoolingParams(dimensions=49))
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        llm.embed(["a", ""])
    with pytest.raises(EngineError, match="token 512"):
        llm.embed([[512]])


def test_means_among_generation_although_places_are_lost(tmp_path: Path) -> None:
    folder = make_checkpoint(write_model_folder(tmp_path), "qwen3", vocab_size=VOCAB_SIZE, eos_token_id=1)
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    greedy = SamplingParams.model_validate({"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, "seed": 0})
    mean = Pooling(kind="mean", normalize=False, dimensions=48)
    tokenizer: Any = None
    with LLM(str(folder), **FIELDS | {"num_gpu_blocks_override": 40}, pooling_type="mean") as llm:
        tokenizer = llm.get_tokenizer()
        jobs: list[Job] = []
        for i in range(10):
            ids = tokenizer.encode(PROMPTS[i % 5])
            jobs.append(Job(GenerationRequest(f"g{i}", ids[:30], greedy), 0, None))
            jobs.append(VectorJob(GenerationRequest(f"v{i}", ids * 2, UNSAMPLED, pooling=mean)))
        llm._run_jobs(iter([[job] for job in jobs]), lambda _: None)
        metrics = llm.metrics_text().decode()
    found = re.search(r"^vllm:num_preemptions_total\S* (\S+)$", metrics, re.MULTILINE)
    assert found is not None
    assert float(found[1]) > 0
    for first, again in zip(jobs[:10], jobs[10:], strict=True):
        ids = [int(token) for token in first.request.prompt_token_ids]
        if isinstance(first, VectorJob) and isinstance(again, VectorJob):
            expected = hidden_states(reference.model, ids).mean(axis=0)
            assert_close(first.vector, expected)
            assert_close(again.vector, expected)
            continue
        tokens = reference.generate(
            torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert first.output.token_ids == again.output.token_ids == tokens[0, len(ids) :].tolist()


def test_a_sentence_transformers_checkpoint_without_a_head_in_two_stages(tmp_path: Path) -> None:
    folder = write_embedding_model(tmp_path)
    reference: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with LLM(str(folder), pipeline_parallel_size=2, **FIELDS) as llm:
        for prompt, output in zip(PROMPTS, llm.embed(PROMPTS), strict=True):
            ids = output.prompt_token_ids
            assert ids == [*llm.get_tokenizer().encode(prompt, add_special_tokens=False), 1]
            assert_close(output.outputs.embedding, unit(hidden_states(reference, ids).mean(axis=0)))
        whole, cut = (llm.embed(TEXTS[0], truncate_prompt_tokens=keep)[0].prompt_token_ids for keep in (None, 5))
        assert cut == [*whole[:4], 1]
        with pytest.raises(InvalidRequestError, match="the checkpoint has no LM head"):
            llm.generate("a", SamplingParams.model_validate({"max_tokens": 2}))
