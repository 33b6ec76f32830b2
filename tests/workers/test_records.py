"""Log-probabilities that steps report, against transformers: prompts in one go and in chunks, rows that ask beside rows
that do not, inputs built by the host and by the device, recorded or not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from manta.configs.model import read_model_spec
from manta.protos.sampling_pb2 import Sampling
from manta.protos.worker_pb2 import StepResult
from manta.workers import scorer
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.runner import Runner
from tests.support.checkpoints import make_checkpoint
from tests.support.gpu_like import BLOCK_SIZE, Recorder, gpu_like_runner, use_plain_torch
from tests.support.plans import Driver

CPU = torch.device("cpu")
OFF = {"top_p": 1.0, "repetition_penalty": 1.0}


@dataclass
class Told:
    """What a sequence was told: of each token its log-probability, rank, best ids and theirs."""

    prompt: list[list[Any]] = field(default_factory=list)
    sampled: list[list[Any]] = field(default_factory=list)


class Reader:
    """Takes apart the column of each step by what the sequences asked for."""

    def __init__(self, runner: Runner) -> None:
        self.driver = Driver(BLOCK_SIZE)
        self.told: dict[int, Told] = {}
        self._runner = runner
        self._asked: dict[int, Sampling] = {}
        self._computed: dict[int, int] = {}

    def add(self, slot: int, prompt: list[int], num_new: int, **fields: Any) -> None:
        sampling = Sampling(**(OFF | fields))
        self.driver.add(slot, prompt, num_new, sampling=sampling)
        self.told[slot], self._asked[slot], self._computed[slot] = Told(), sampling, 0

    def run(self, prefill: list[tuple[int, int]], **differences: Any) -> None:
        decodes = [
            slot
            for slot, each in sorted(self.driver.sequences.items())
            if each.decoding and each.length < each.max_length
        ]
        plan = self.driver.plan(prefill, **differences)
        step = self._runner.run(plan)
        self.driver.take(StepResult(step=plan.step, epoch=plan.epoch, tokens=step.tokens()))
        words = iter(np.frombuffer(step.logprobs(), "<i4").tolist())
        for slot in decodes:
            self._read(slot, words)
        for slot, count in prefill:
            begin, num_prompt = self._computed[slot], self.driver.sequences[slot].num_prompt_tokens
            self._computed[slot] = begin + count
            if self._asked[slot].HasField("num_prompt_logprobs"):
                for _ in range(begin + 1, min(begin + count, num_prompt - 1) + 1):
                    self.told[slot].prompt.append(_record(words, self._asked[slot].num_prompt_logprobs))
            if begin + count == num_prompt:
                self._read(slot, words)
        assert next(words, None) is None

    def _read(self, slot: int, words: Any) -> None:
        if self._asked[slot].HasField("num_logprobs"):
            self.told[slot].sampled.append(_record(words, self._asked[slot].num_logprobs))


def _record(words: Any, num_best: int) -> list[Any]:
    def take(count: int) -> list[int]:
        return [next(words) for _ in range(count)]

    def floats(values: list[int]) -> list[float]:
        return np.array(values, "<i4").view("<f4").tolist()

    return [floats(take(1))[0], take(1)[0], take(num_best), floats(take(num_best))]


def check(told: list[list[Any]], ids: list[int], begin: int, num_best: int, logits: torch.Tensor) -> None:
    """told[i] is of ids[begin + i]; logits [T, vocab] are transformers'."""
    expected = logits.log_softmax(dim=-1)
    for place, (chosen, rank, best_ids, best) in enumerate(told, start=begin):
        row = expected[place - 1]
        assert chosen == pytest.approx(row[ids[place]].item(), abs=2e-4)
        assert rank == 1 + int((row > row[ids[place]] + 1e-5).sum())
        assert best == pytest.approx(row.topk(num_best).values.tolist(), abs=2e-4)
        assert row[best_ids].tolist() == pytest.approx(best, abs=2e-4)
        assert len(set(best_ids)) == num_best


@pytest.mark.parametrize("form", ["host", "device", "recorded"])
@pytest.mark.parametrize("max_rows", [256, 3])
def test_records_are_those_of_transformers(
    form: str, max_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_plain_torch(monkeypatch)
    monkeypatch.setattr(scorer, "MAX_SCORED_ROWS", max_rows)
    folder = make_checkpoint(tmp_path, "qwen3")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = load_model(folder, read_model_spec(folder), Mesh.single(CPU), torch.float32)
    record = Recorder() if form == "recorded" else None
    reader = Reader(gpu_like_runner(model, on_device=form != "host", record=record))
    reader.add(0, [i * 7 % 131 for i in range(20)], 6, num_logprobs=3, num_prompt_logprobs=2, repetition_penalty=1.4)
    reader.add(1, [3, 5], 6)
    reader.add(2, [9], 5, num_logprobs=0, num_prompt_logprobs=0, temperature=1.0, seed=3)
    reader.run([(0, 20), (1, 2), (2, 1)])
    reader.add(4, [i * 5 % 131 for i in range(30)], 4, num_prompt_logprobs=5)
    for count in (7, 1, 12, 9):
        reader.run([(4, count)])
    reader.run([(4, 1)], frees=[1])
    while reader.driver.unfinished:
        reader.run([])
    for slot, (num_best, num_prompt_best) in {0: (3, 2), 2: (0, 0), 4: (0, 5)}.items():
        told, sequence = reader.told[slot], reader.driver.sequences[slot]
        num_prompt = sequence.num_prompt_tokens
        with torch.inference_mode():
            logits = reference(torch.tensor([sequence.tokens])).logits[0]
        assert len(told.prompt) == num_prompt - 1
        assert len(told.sampled) == (0 if slot == 4 else len(sequence.tokens) - num_prompt)
        check(told.prompt, sequence.tokens, 1, num_prompt_best, logits)
        check(told.sampled, sequence.tokens, num_prompt, num_best, logits)
    assert reader.told[1] == Told()
