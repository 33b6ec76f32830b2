"""transformers on the same work: padded batches of `generate`, and its continuous batching."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from engine import Workload, model_config
from report import Report, Unit
from timing import synchronize
from transformers import AutoModelForCausalLM

_CONTINUOUS_LIMIT_S = 120.0


def units(shapes: list[str], workload: Workload, device: torch.device, small: bool, report: Report) -> Iterator[Unit]:
    """Two per shape."""
    for shape in shapes:
        yield f"{shape}, padded batch", partial(run_static, shape, workload, device, small)
        yield f"{shape}, continuous", partial(run_continuous, shape, workload, device, small, report)


def run_static(
    shape: str, workload: Workload, device: torch.device, small: bool, batch: int = 64
) -> Iterator[dict[str, Any]]:
    """Output tokens per second of the first `batch` requests in one padded batch."""
    model, prompts = _model(shape, device, small), workload.prompts(model_config(shape, small).vocab_size, 0)
    output_lens = workload.output_lens[:batch]
    rate = _static(model, prompts[:batch], output_lens, device)
    record = {"shape": shape, "workload": workload.name, "form": "padded", "requests": len(output_lens)}
    yield _said(record | {"output_tok_s": rate})


def run_continuous(
    shape: str, workload: Workload, device: torch.device, small: bool, report: Report
) -> Iterator[dict[str, Any]]:
    """Output tokens per second of all requests, or, where time is over before, of those that finished by then."""
    model, prompts = _model(shape, device, small), workload.prompts(model_config(shape, small).vocab_size, 0)
    limit_s = min(_CONTINUOUS_LIMIT_S, max(20.0, report.left_s))
    num_tokens, num_finished, seconds = _continuous(model, prompts, workload.output_lens, limit_s)
    record = {"shape": shape, "workload": workload.name, "form": "continuous", "requests": len(prompts)}
    yield _said(record | {"finished": num_finished, "output_tok_s": num_tokens / seconds, "total_s": seconds})


def _said(record: dict[str, Any]) -> dict[str, Any]:
    print(record, flush=True)
    return record


def _model(shape: str, device: torch.device, small: bool) -> Any:
    build: Any = AutoModelForCausalLM.from_config
    with torch.device(device):
        model = build(model_config(shape, small), dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    return model


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


def _continuous(model: Any, prompts: list[list[int]], output_lens: list[int], limit_s: float) -> tuple[int, int, float]:
    """Tokens of the requests that finished, how many these were, seconds."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(
        generation_config=generation, continuous_batching_config=ContinuousBatchingConfig()
    )
    warm_up = getattr(manager, "warmup", None)  # of later versions: records CUDA graphs
    if warm_up is not None:
        warm_up()
    manager.start()
    try:
        begin_s = time.perf_counter()
        for index, (prompt, length) in enumerate(zip(prompts, output_lens, strict=True)):
            manager.add_request(prompt, request_id=str(index), max_new_tokens=length, eos_token_id=-1)
        num_tokens = num_finished = 0
        while num_finished < len(prompts) and time.perf_counter() - begin_s < limit_s:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                num_finished += 1
                num_tokens += output_lens[int(result.request_id)]
            elif not manager.is_running():
                raise RuntimeError("transformers' continuous batching has stopped")
        return num_tokens, num_finished, time.perf_counter() - begin_s
    finally:
        manager.stop(block=True, timeout=10)
