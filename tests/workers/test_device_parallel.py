"""Replicas of several ranks whose devices build their own inputs give the tokens of one rank whose host does."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from transformers import AutoModelForCausalLM

from manta.configs.model import read_model_spec
from manta.protos.sampling_pb2 import Sampling
from manta.protos.worker_pb2 import StepPlan, StepResult
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh, connect_mesh
from manta.workers.runner import Runner
from tests.support.checkpoints import make_checkpoint
from tests.support.gpu_like import BLOCK_SIZE, Recorder, gpu_like_runner, use_plain_torch
from tests.support.plans import GREEDY, Driver
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
NUM_RANKS = 4
SIZES = [(2, 1), (1, 2), (1, 3), (2, 2)]  # tp, pp
CASES = {
    f"tp{tp}-pp{pp}-{'recorded' if recorded else 'eager'}": (tp, pp, recorded)
    for tp, pp in SIZES
    for recorded in (True, False)
}
DRAWN = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=5, repetition_penalty=1.2)
LONG, SHORT = [i * 5 % 131 for i in range(50)], [i * 7 % 131 for i in range(20)]
NUM_NEW = 24


@dataclass
class Script:
    """Plans, and the tokens each of them gives on one rank."""

    plans: list[bytes] = field(default_factory=list)
    tokens: list[bytes] = field(default_factory=list)
    outputs: dict[str, list[int]] = field(default_factory=dict)


def write_script(runner: Runner) -> Script:
    """Two lanes: prompts in one go and in chunks beside decodes, a sequence that is preempted and goes on in another
    slot and lane, one in a slot that was another's."""
    script, driver = Script(), Driver(BLOCK_SIZE)

    def run(lane: int, prefill: list[tuple[int, int]], **differences: Any) -> None:
        plan = driver.plan(prefill, lane=lane, **differences)
        step = runner.run(plan)
        script.plans.append(plan.SerializeToString())
        script.tokens.append(step.tokens())
        driver.take(StepResult(step=plan.step, epoch=plan.epoch, tokens=script.tokens[-1]))

    driver.add(0, SHORT, NUM_NEW)
    run(0, [(0, 20)])
    driver.add(1, [5, 6, 7], NUM_NEW, lane=1, sampling=DRAWN)
    run(1, [(1, 3)])
    driver.add(2, LONG, NUM_NEW, sampling=DRAWN)
    run(0, [(2, 30)])
    run(1, [])
    run(0, [(2, 20)])
    for _ in range(3):
        run(0, [])
        run(1, [])
    known = driver.output(0)
    run(0, [], frees=[0])
    run(1, [])
    driver.add(4, SHORT, NUM_NEW, lane=1, output=known)
    run(1, [(4, 11)])
    run(0, [], holds=[2])
    run(1, [(4, 20 + len(known) - 11)])
    driver.add(0, [9] * 8, 6)
    run(0, [(0, 8)])
    while driver.unfinished:
        run(0, [])
        run(1, [])
    slots = {"short": 4, "drawn": 1, "long": 2, "last": 0}
    script.outputs = {name: driver.output(slot) for name, slot in slots.items()}
    return script


def run_case(runner: Runner, plans: list[bytes]) -> list[bytes]:
    """The tokens of every step. They are read one step late, as with two plans in flight."""
    steps, tokens = [], []
    for plan in plans:
        steps.append(runner.run(StepPlan.FromString(plan)))
        if len(steps) > 1:
            tokens.append(steps[-2].tokens())
    return [*tokens, steps[-1].tokens()]


def run_cases(rank: int, port: int, folder: Path, plans: list[bytes]) -> dict[str, list[bytes]]:
    """This rank's tokens in every case it takes part in, of two epochs."""
    store = TCPStore("localhost", port, is_master=False)
    spec, results, meshes = read_model_spec(folder), {}, []
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_plain_torch(monkeypatch)
        for case, (tp_size, pp_size, recorded) in CASES.items():
            if rank >= tp_size * pp_size:
                continue
            pp_rank, tp_rank = divmod(rank, tp_size)
            mesh = connect_mesh(
                store=PrefixStore(case, store), tp_rank=tp_rank, tp_size=tp_size, pp_rank=pp_rank, pp_size=pp_size,
                device=CPU, timeout_s=60.0, shared_memory=False,
            )  # fmt: skip
            recorder = Recorder() if recorded else None
            model = load_model(folder, spec, mesh, torch.float32)
            runner = gpu_like_runner(model, on_device=True, record=recorder)
            results[case] = run_case(runner, plans)
            runner.clear()
            assert run_case(runner, plans) == results[case]
            assert recorder is None or recorder.num_replayed > 60
            runner.clear()
            meshes.append(mesh)
        store.set(f"done/{rank}", "")
        store.wait([f"done/{other}" for other in range(NUM_RANKS)])  # nobody leaves while another still listens
        for mesh in meshes:
            mesh.destroy()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def script(folder: Path) -> Script:
    model = load_model(folder, read_model_spec(folder), Mesh.single(CPU), torch.float32)
    return write_script(gpu_like_runner(model, on_device=False))


@pytest.fixture(scope="module")
def results(folder: Path, script: Script) -> list[dict[str, list[bytes]]]:
    return run_ranks(NUM_RANKS, run_cases, folder, script.plans)


def test_greedy_tokens_are_those_of_transformers(folder: Path, script: Script) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert GREEDY.temperature == 0
    for name, prompt, num_new in (("short", SHORT, NUM_NEW), ("last", [9] * 8, 6)):
        ids = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=num_new, min_new_tokens=num_new, eos_token_id=None
        )
        assert script.outputs[name] == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_one_rank(case: str, script: Script, results: list[dict[str, list[bytes]]]) -> None:
    tp_size, pp_size, _ = CASES[case]
    for rank in range(tp_size * pp_size):
        samples = rank >= tp_size * (pp_size - 1)
        assert results[rank][case] == (script.tokens if samples else [b""] * len(script.plans))
