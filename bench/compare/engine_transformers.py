"""Hugging Face transformers: one by one, padded batches, or its continuous batching.

Options: dtype (that of the checkpoint if unset); batch, a number of requests or "continuous"; for the latter
max_batch_tokens and kv_gib.
"""

import os
from typing import Any

import engine_loop
import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAGE_SIZE = 256  # tokens; the library's default


class Static:
    """`generate` on as many requests at once as `batch` says, padded on the left, as long as the longest runs."""

    def __init__(self, model: Any, batch: int) -> None:
        self.versions = _versions()
        self._model = model
        model.generation_config.eos_token_id = None  # outputs end by their length alone
        self._batch = batch

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        outputs: list[list[int]] = []
        for start in range(0, len(prompts), self._batch):
            part = slice(start, start + self._batch)
            rows = self._generate_batch(prompts[part], max(output_lens[part]))
            outputs += [row[:length] for row, length in zip(rows, output_lens[part], strict=True)]
        return outputs

    def _generate_batch(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=output_len,
                pad_token_id=0,
            )
        rows: list[list[int]] = output[:, width:].tolist()
        return rows

    def close(self) -> None:
        pass


class Continuous:
    """The manager behind `generate_batch`, kept between calls; unlike that function it takes a length per request."""

    def __init__(self, model: Any, max_batch_tokens: int, kv_gib: int) -> None:
        self.versions = _versions()
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
        batching = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=kv_gib * 2**30 // (token_bytes * PAGE_SIZE),
            max_batch_tokens=max_batch_tokens,
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        self._manager.start()
        self._num_requests = 0

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        names = [str(self._num_requests + index) for index in range(len(prompts))]
        self._num_requests += len(prompts)
        for name, prompt, length in zip(names, prompts, output_lens, strict=True):
            self._manager.add_request(prompt, request_id=name, max_new_tokens=length, eos_token_id=-1)
        outputs: dict[str, list[int]] = {}
        while len(outputs) < len(names):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                outputs[result.request_id] = result.generated_tokens
            elif not self._manager.is_running():
                raise RuntimeError("transformers' continuous batching has stopped")
        return [outputs[name] for name in names]

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10)


def _versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def load(model: str, options: dict[str, Any]) -> engine_loop.Engine:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    build: Any = AutoModelForCausalLM.from_pretrained
    loaded = build(model, dtype=options.get("dtype", "auto"), attn_implementation="sdpa").eval()
    batch = options.get("batch", 1)
    if batch == "continuous":
        return Continuous(loaded, options.get("max_batch_tokens", 1024), options.get("kv_gib", 4))
    return Static(loaded, batch)


if __name__ == "__main__":
    engine_loop.serve(load)
