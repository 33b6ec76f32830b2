"""Beam search and samples of one prompt, with real workers on a tiny checkpoint: beams against transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from manta.cluster.llm import LLM
from manta.configs.beam_search import BeamSearchParams
from manta.configs.sampling import SamplingParams
from tests.support.checkpoints import make_checkpoint
from tests.support.server import ServerProcess
from tests.support.small_tokenizers import VOCAB_SIZE, write_model_folder

ENDS = list(range(3, VOCAB_SIZE, 9))
PAD = 1
PROMPTS = [[5, 17, 99, 3, 64, 8, 11], [40, 41] * 12, [7]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # transformers shares the cores with the workers
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    return make_checkpoint(folder, "llama", vocab_size=VOCAB_SIZE, eos_token_id=ENDS)


@pytest.fixture(scope="module", params=[True, False], ids=["prefix caching", "no prefix caching"])
def llm(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(
        str(folder),
        dtype="float32",
        device="cpu",
        block_size=8,
        max_num_seqs=16,
        max_num_batched_tokens=32,
        kv_cache_memory_bytes="4MiB",
        enable_prefix_caching=request.param,
    ) as llm:
        yield llm


@pytest.mark.parametrize(
    ("width", "early_stopping", "length_penalty"),
    [(2, False, 1.0), (4, True, 0.0), (5, "never", 2.0), (3, False, -1.0)],
)
def test_beams_are_those_of_transformers(
    llm: LLM, folder: Path, width: int, early_stopping: bool | Literal["never"], length_penalty: float
) -> None:
    params = BeamSearchParams.model_validate(
        {
            "beam_width": width,
            "max_tokens": 14,
            "min_tokens": 2,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
            "include_stop_str_in_output": True,
        }
    )
    outputs = llm.beam_search(PROMPTS, params, use_tqdm=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=14,
            min_new_tokens=2,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            return_dict_in_generate=True,
            output_scores=True,
            eos_token_id=ENDS,
            pad_token_id=PAD,
        )
        found = output.sequences
        assert [each.score for each in found] == pytest.approx(expected.sequences_scores.tolist(), rel=1e-4)
        longest = expected.sequences.shape[1]
        padded = [each.tokens + [PAD] * (longest - len(each.tokens)) for each in found]
        assert padded == expected.sequences.tolist()
        texts = llm.get_tokenizer().batch_decode([each.tokens for each in found], skip_special_tokens=True)
        assert [each.text for each in found] == texts


def test_samples_are_those_of_requests_with_the_same_seeds(llm: LLM) -> None:
    fields = {"seed": 11, "max_tokens": 9, "logprobs": 1}
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    several = llm.generate(prompts, SamplingParams.model_validate(fields | {"n": 4}), use_tqdm=False)
    for place in range(4):
        alone = llm.generate(prompts, SamplingParams.model_validate(fields | {"seed": 11 + place}), use_tqdm=False)
        for output, one in zip(several, alone, strict=True):
            assert output.outputs[place].token_ids == one.outputs[0].token_ids
            expected = one.outputs[0].cumulative_logprob
            assert output.outputs[place].cumulative_logprob == pytest.approx(expected, rel=1e-4)


def test_http_gives_what_the_search_finds(folder: Path) -> None:
    words = [
        str(folder), "--served-model-name", "tiny", "--dtype", "float32", "--kv-cache-memory-bytes", "8MiB",
        "--distributed-executor-backend", "local", "--max-num-seqs", "8", "--port", "0", "--grpc-port", "0",
    ]  # fmt: skip
    fields: dict[str, Any] = {"max_tokens": 12, "length_penalty": 0.5}
    with ServerProcess(*words) as process:
        url = f"{process.wait_ready().url}/v1/completions"
        body = {"prompt": PROMPTS[0], "use_beam_search": True, "n": 2, "best_of": 4, "return_token_ids": True}
        answer = httpx.post(url, json=body | fields, timeout=60).json()
        several = {"prompt": PROMPTS[1], "n": 3, "best_of": 5, "seed": 3, "max_tokens": 6, "logprobs": 0}
        chosen = httpx.post(url, json=several, timeout=60).json()["choices"]
        all_five = httpx.post(url, json=several | {"n": 5}, timeout=60).json()["choices"]
    with LLM(str(folder), dtype="float32", device="cpu", max_num_seqs=8, kv_cache_memory_bytes="4MiB") as llm:
        params = BeamSearchParams.model_validate(fields | {"beam_width": 4, "include_stop_str_in_output": True})
        (expected,) = llm.beam_search(PROMPTS[:1], params, use_tqdm=False)
    found = [PROMPTS[0] + choice["token_ids"] for choice in answer["choices"]]
    assert found == [each.tokens for each in expected.sequences[:2]]
    ranked = sorted(all_five, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    assert [choice["text"] for choice in chosen] == [choice["text"] for choice in ranked[:3]]
