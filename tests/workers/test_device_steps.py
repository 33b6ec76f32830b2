"""A runner whose device builds its own inputs gives the tokens of one whose host does, recorded or not."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manta.configs.model import read_model_spec
from manta.protos.sampling_pb2 import Sampling
from manta.protos.worker_pb2 import StepResult
from manta.workers.decode_graphs import CudaRecorder, graph_sizes
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.models.decoder import CausalLM
from manta.workers.runner import Runner
from manta.workers.transfer import download
from tests.support.checkpoints import make_checkpoint
from tests.support.gpu_like import BLOCK_SIZE, Recorder, gpu_like_runner, use_plain_torch
from tests.support.plans import Driver

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    use_plain_torch(monkeypatch)
    folder = make_checkpoint(tmp_path, "qwen3")
    return load_model(folder, read_model_spec(folder), Mesh.single(CPU), torch.float32)


def serve(runner: Runner, vocab_size: int) -> dict[int, list[int]]:
    """Prompts in one go and in chunks, rows that end, join, sit out and come back in a slot that was another's."""
    driver = Driver(BLOCK_SIZE)
    outputs: dict[int, list[int]] = {}

    def run(prefill: list[tuple[int, int]], **differences: Any) -> None:
        plan = driver.plan(prefill, **differences)
        step = runner.run(plan)
        driver.take(StepResult(step=plan.step, epoch=plan.epoch, tokens=step.tokens()))

    drawn = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=5, repetition_penalty=1.2)
    driver.add(0, [i * 7 % vocab_size for i in range(20)], 30)
    driver.add(3, [5, 6, 7], 12, sampling=drawn)
    run([(0, 20), (3, 3)])
    run([])
    driver.add(1, [i * 5 % vocab_size for i in range(50)], 9)
    run([(1, 30)])
    run([(1, 20)])
    run([], holds=[0])
    for _ in range(3):
        run([])
    driver.add(5, [9] * 8, 20, sampling=drawn)
    run([(5, 8)])
    while 3 in driver.unfinished or 1 in driver.unfinished:
        run([])
    outputs[13], outputs[11] = driver.output(3), driver.output(1)
    run([], frees=[3, 1])
    driver.add(3, [4, 4, 4, 4], 10)
    run([(3, 4)])
    while driver.unfinished:
        run([])
    return outputs | {slot: driver.output(slot) for slot in driver.sequences}


def test_tokens_are_those_of_steps_built_by_the_host(model: CausalLM) -> None:
    vocab_size = model.spec.vocab_size
    expected = serve(gpu_like_runner(model, on_device=False), vocab_size)
    assert {len(tokens) for tokens in expected.values()} == {30, 12, 9, 20, 10}
    assert serve(gpu_like_runner(model, on_device=True), vocab_size) == expected
    recorder = Recorder()
    assert serve(gpu_like_runner(model, on_device=True, record=recorder), vocab_size) == expected
    assert recorder.num_recorded == len(graph_sizes(6)) == 4
    assert recorder.num_replayed > 25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_steps_on_a_gpu_give_the_tokens_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched one by one, and recorded as CUDA graphs."""
    folder, device = make_checkpoint(tmp_path, "qwen3"), torch.device("cuda", 0)
    spec = read_model_spec(folder)
    with monkeypatch.context() as patch:
        use_plain_torch(patch)
        on_cpu = load_model(folder, spec, Mesh.single(CPU), torch.float32)
        expected = serve(gpu_like_runner(on_cpu, on_device=False), spec.vocab_size)
    on_gpu = load_model(folder, spec, Mesh.single(device), torch.float32)
    assert serve(gpu_like_runner(on_gpu, on_device=True), spec.vocab_size) == expected
    recorded = gpu_like_runner(on_gpu, on_device=True, record=CudaRecorder())
    assert serve(recorded, spec.vocab_size) == expected
    recorded.clear()
    assert serve(recorded, spec.vocab_size) == expected


def test_a_new_epoch_starts_from_nothing(model: CausalLM) -> None:
    runner = gpu_like_runner(model, on_device=True, record=Recorder())
    first = serve(runner, model.spec.vocab_size)
    runner.clear()
    assert serve(runner, model.spec.vocab_size) == first


def test_what_a_step_tells_is_on_its_way_before_its_end_is_marked(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the end reads it."""
    runner, events = gpu_like_runner(model, on_device=True), []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return call

    for module in ("runner", "records"):
        name = f"manta.workers.{module}.download"
        monkeypatch.setattr(name, noted("download", download))
    monkeypatch.setattr(runner._clock, "end", noted("end", runner._clock.end))
    driver = Driver(BLOCK_SIZE)
    driver.add(0, [1, 2, 3], 4, sampling=Sampling(num_logprobs=2, top_p=1.0, repetition_penalty=1.0))
    step = runner.run(driver.plan([(0, 3)]))
    assert events == ["download"] * 5 + ["end"], "tokens and four columns of log-probabilities"
    assert len(step.tokens()) == 4
    assert len(step.logprobs()) == 24


def test_a_runner_that_is_let_go_of_is_gone(model: CausalLM) -> None:
    """Its cache may be most of a GPU, and what lives at start is hidden from the collector."""

    class Recorded:
        def replay(self) -> None: ...

    runner = gpu_like_runner(model, on_device=True, record=lambda run: (run(), Recorded())[1])
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        steps = weakref.ref(runner._steps)
        del runner
        assert steps() is None
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.parametrize("max_num_seqs", [1, 3, 8, 100, 256, 5000])
def test_sizes_of_recordings(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(max_num_seqs, 1024)
    for num_rows in range(1, sizes[-1] + 1):
        size = next(size for size in sizes if size >= num_rows)
        assert size - num_rows < max(8, num_rows / 3)
