"""Vectors of prompts are those of transformers' hidden states: whole or in chunks, beside decodes, on either path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from manta.configs.model import read_model_spec
from manta.protos.sampling_pb2 import Pooling
from manta.protos.worker_pb2 import SeqAdd
from manta.workers.columns import PlanError
from manta.workers.decode_graphs import CudaRecorder
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.runner import Runner
from tests.support.checkpoints import make_checkpoint, make_model
from tests.support.gpu_like import BLOCK_SIZE, Recorder, gpu_like_runner, use_plain_torch
from tests.support.plans import seq_add, step_plan
from tests.support.tolerances import LOGITS

LENGTHS = {1: 1, 2: 20, 3: 7, 4: 64, 5: 13, 6: 120}  # by slot; the last fills the context
POOLING = {
    1: Pooling(kind=Pooling.MEAN, num_dims=48),
    2: Pooling(kind=Pooling.LAST, num_dims=48, normalizes=True),
    3: Pooling(kind=Pooling.MEAN, num_dims=5, normalizes=True),
    4: Pooling(kind=Pooling.CLS, num_dims=48, normalizes=True),
    5: Pooling(kind=Pooling.LAST, num_dims=7),
    6: Pooling(kind=Pooling.MEAN, num_dims=48, normalizes=True),
}


def prompt(slot: int) -> list[int]:
    return [(31 * slot + i * (slot + 4)) % 131 for i in range(LENGTHS[slot])]


def expected(slot: int, hidden: NDArray[np.float64]) -> NDArray[np.float64]:
    """hidden: [tokens, size], as transformers has them."""
    pooling = POOLING[slot]
    vector = {
        Pooling.MEAN: hidden.mean(axis=0),
        Pooling.LAST: hidden[-1],
        Pooling.CLS: hidden[0],
    }[pooling.kind][: pooling.num_dims]
    return vector / np.linalg.norm(vector) if pooling.normalizes else vector


def add(slot: int) -> SeqAdd:
    length = LENGTHS[slot]
    blocks = [16 * slot + i for i in range(-(-length // BLOCK_SIZE))]
    return seq_add(slot, prompt(slot), blocks=blocks, max_length=length, pooling=POOLING[slot])


def serve(runner: Runner) -> tuple[dict[int, NDArray[np.float32]], list[int]]:
    """Vectors by slot, and the tokens of a sequence that decodes all the while, in slot 0."""
    vectors: dict[int, NDArray[np.float32]] = {}
    tokens: list[int] = []

    def run(step: int, prefill: list[tuple[int, int]], ends: list[int], **differences: Any) -> None:
        done = runner.run(step_plan(step, prefill=prefill, **differences))
        tokens.extend(np.frombuffer(done.tokens(), "<i4").tolist())
        told = np.frombuffer(done.vectors(), "<f4")
        sizes = [POOLING[slot].num_dims for slot in ends]
        assert told.size == sum(sizes)
        vectors.update(zip(ends, np.split(told, np.cumsum(sizes)[:-1]), strict=False))

    generated = seq_add(0, [3, 1, 4, 1, 5], blocks=[0, 1, 2], max_length=20)
    run(1, [(0, 5), (1, 1), (2, 20), (6, 30)], [1, 2], adds=[generated, add(1), add(2), add(6)])
    run(2, [(6, 20), (3, 7), (4, 10)], [3], adds=[add(3), add(4)], frees=[1, 2])
    run(3, [], [])
    run(4, [(4, 1), (5, 13), (6, 33)], [5], adds=[add(5)])
    run(5, [(4, 53)], [4], frees=[3])
    run(6, [(6, 37)], [6])
    run(7, [], [], frees=[6])
    return vectors, tokens


@pytest.fixture(scope="module")
def reference() -> tuple[dict[int, NDArray[np.float64]], list[int]]:
    """Of transformers: hidden states of all tokens after the final norm, and greedy tokens."""
    model: Any = make_model("qwen3")
    with torch.no_grad():
        hidden = {slot: model.model(torch.tensor([prompt(slot)])).last_hidden_state[0] for slot in LENGTHS}
        tokens = model.generate(torch.tensor([[3, 1, 4, 1, 5]]), max_new_tokens=7, do_sample=False, eos_token_id=None)
    return {slot: states.double().numpy() for slot, states in hidden.items()}, tokens[0, 5:].tolist()


def assert_as(
    served: tuple[dict[int, NDArray[np.float32]], list[int]],
    reference: tuple[dict[int, NDArray[np.float64]], list[int]],
) -> None:
    assert served[1] == reference[1]
    assert served[0].keys() == LENGTHS.keys()
    for slot, vector in served[0].items():
        wanted = expected(slot, reference[0][slot])
        assert np.abs(vector - wanted).max() <= LOGITS[torch.float32] * np.abs(wanted).max(), slot


FORMS: dict[str, Callable[[Any], Runner]] = {
    "host": lambda model: gpu_like_runner(model, on_device=False),
    "device": lambda model: gpu_like_runner(model, on_device=True),
    "recorded": lambda model: gpu_like_runner(model, on_device=True, record=Recorder()),
}


@pytest.mark.parametrize("form", ["cpu decoder", *FORMS])
def test_vectors_are_those_of_transformers(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Any
) -> None:
    if form in FORMS:
        use_plain_torch(monkeypatch)
    folder = make_checkpoint(tmp_path, "qwen3")
    model = load_model(folder, read_model_spec(folder), Mesh.single(torch.device("cpu")), torch.float32)
    runner = FORMS.get(form, FORMS["host"])(model)
    assert_as(serve(runner), reference)
    runner.clear()
    assert_as(serve(runner), reference)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_vectors_of_a_gpu_are_those_of_transformers(tmp_path: Path, reference: Any) -> None:
    folder, device = make_checkpoint(tmp_path, "qwen3"), torch.device("cuda", 0)
    model = load_model(folder, read_model_spec(folder), Mesh.single(device), torch.float32)
    assert_as(serve(gpu_like_runner(model, on_device=True, record=CudaRecorder())), reference)


def test_a_slot_that_is_left_in_the_midst_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Any
) -> None:
    use_plain_torch(monkeypatch)
    folder = make_checkpoint(tmp_path, "qwen3")
    model = load_model(folder, read_model_spec(folder), Mesh.single(torch.device("cpu")), torch.float32)
    runner = gpu_like_runner(model, on_device=True)
    runner.run(step_plan(1, adds=[add(6)], prefill=[(6, 50)]))
    runner.run(step_plan(2, frees=[6], adds=[add(6)], prefill=[(6, 64)]))
    vector = np.frombuffer(runner.run(step_plan(3, prefill=[(6, 56)])).vectors(), "<f4")
    wanted = expected(6, reference[0][6])
    assert np.abs(vector - wanted).max() <= LOGITS[torch.float32] * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_computed": 8, "kind": Pooling.MEAN}, "slot 2: 8 tokens are computed whose hidden states would count"),
        ({"num_dims": 0}, "slot 2: pooling of kind 0 to 0 values"),
        ({"kind": 7}, "slot 2: pooling of kind 7 to 48 values"),
        ({"max_length": 21}, "do not fit each other"),
        ({"prefill": 21}, "slot 2: 21 tokens are to be computed of 20 that are left"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(
    change: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_plain_torch(monkeypatch)
    folder = make_checkpoint(tmp_path, "qwen3")
    model = load_model(folder, read_model_spec(folder), Mesh.single(torch.device("cpu")), torch.float32)
    fields = {"kind": Pooling.LAST, "num_dims": 48, "num_computed": 0, "max_length": 20, "prefill": 20} | change
    wrong = seq_add(
        2,
        prompt(2),
        blocks=[1, 2, 3],
        max_length=fields["max_length"],
        num_computed=fields["num_computed"],
        pooling=Pooling(kind=fields["kind"], num_dims=fields["num_dims"]),  # type: ignore[arg-type]
    )
    with pytest.raises(PlanError, match=message):
        gpu_like_runner(model, on_device=False).run(step_plan(1, adds=[wrong], prefill=[(2, fields["prefill"])]))
