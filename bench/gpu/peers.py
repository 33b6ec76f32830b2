"""transformers on the same work: padded batches of `generate`, and its continuous batching."""

import time
from typing import Any

import torch
from engine import Workload
from shapes import make_config
from timing import synchronize
from transformers import AutoModelForCausalLM


def run(shape: str, workload: Workload, device: torch.device, small: bool, batch: int = 64) -> dict[str, Any]:
    """Output tokens per second: of the first `batch` requests in one padded batch, and of all, batched continuously."""
    overrides = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512}
    config = make_config(shape, **(overrides if small else {}))
    build: Any = AutoModelForCausalLM.from_config
    with torch.device(device):
        model = build(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    prompts = workload.prompts(config.vocab_size, 0)
    record: dict[str, Any] = {"shape": shape, "workload": workload.name}
    record["static_tok_s"] = _static(model, prompts[:batch], workload.output_lens[:batch], device)
    try:
        record["continuous_tok_s"] = _continuous(model, prompts, workload.output_lens)
    except Exception as error:  # noqa: BLE001 (other versions have other interfaces; the record says what happened)
        record["continuous_error"] = f"{type(error).__name__}: {error}"
    print(record, flush=True)
    return record


def _static(model: Any, prompts: list[list[int]], output_lens: list[int], device: torch.device) -> float:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)

    def generate(num_tokens: int) -> None:
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)
        synchronize(device)

    generate(2)
    begin_s = time.perf_counter()
    generate(max(output_lens))
    return sum(output_lens) / (time.perf_counter() - begin_s)


def _continuous(model: Any, prompts: list[list[int]], output_lens: list[int]) -> float:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(
        generation_config=generation, continuous_batching_config=ContinuousBatchingConfig()
    )
    manager.start()
    try:
        begin_s = time.perf_counter()
        for index, (prompt, length) in enumerate(zip(prompts, output_lens, strict=True)):
            manager.add_request(prompt, request_id=str(index), max_new_tokens=length, eos_token_id=-1)
        num_finished = 0
        while num_finished < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                num_finished += 1
            elif not manager.is_running():
                raise RuntimeError("transformers' continuous batching has stopped")
        return sum(output_lens) / (time.perf_counter() - begin_s)
    finally:
        manager.stop(block=True, timeout=10)
