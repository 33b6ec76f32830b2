"""Manta, used as its users do: `LLM(model)` with its own defaults; options are fields of its configuration."""

from importlib.metadata import version
from typing import Any

import engine_loop

from manta import LLM, SamplingParams

DEFAULTS = {"max_model_len": 4096}


class Manta:
    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.versions = {name: version(name) for name in ("manta", "torch")}
        self._llm = LLM(model, **DEFAULTS | options)

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        sampling = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in output_lens]
        return [output.outputs[0].token_ids for output in self._llm.generate(prompts, sampling, use_tqdm=False)]

    def close(self) -> None:
        self._llm.shutdown()


if __name__ == "__main__":
    engine_loop.serve(Manta)
