"""A runner between two epochs, with a model and a next stage that are not there."""

from typing import Any, cast

import torch
from torch import Tensor

from manta.workers.limits import Limits
from manta.workers.mesh import Incoming, Mesh
from manta.workers.model import HiddenShape
from manta.workers.runner import Runner
from manta.workers.stage import Stage
from tests.support.plans import seq_add, step_plan

HIDDEN = HiddenShape(size=2, dtype=torch.float32)
LIMITS = Limits(
    num_blocks=64, block_size=8, max_num_seqs=4, max_num_batched_tokens=512, max_model_len=512, vocab_size=99
)


class Model:
    def __call__(self, x: Tensor, metadata: object, kv_cache: object, sampled: Tensor | None = None) -> Tensor:
        assert sampled is None, "the first of two stages has to pass on all tokens"
        return torch.zeros(x.shape[0], HIDDEN.size)

    def logits(self, hidden: Tensor) -> Tensor:
        raise AssertionError("the first of two stages has no logits")


class FirstOfTwo:
    """The mesh of a first stage whose last stage samples token 5 everywhere."""

    device = torch.device("cpu")
    is_first_stage, is_last_stage, tp_rank = True, False, 0

    def __init__(self) -> None:
        self.num_received = 0

    def send_hidden(self, x: Tensor) -> None:
        assert x.shape[1] == HIDDEN.size

    def expect_tokens(self, n: int) -> Incoming:
        return Incoming(torch.full((n,), 5), self)

    def wait(self) -> None:
        self.num_received += 1


def test_a_new_epoch_takes_in_tokens_of_a_table_that_grew_in_a_step() -> None:
    mesh = FirstOfTwo()
    runner = Runner(Stage(cast(Any, Model()), cast(Mesh, cast(Any, mesh)), [], LIMITS, HIDDEN))
    long = seq_add(0, list(range(90)) * 4, blocks=list(range(46)), max_length=400)
    runner.run(step_plan(1, adds=[long], prefill=[(0, 360)]))
    runner.clear()
    assert mesh.num_received == 1
    runner.run(step_plan(1, epoch=2, adds=[long], prefill=[(0, 360)]))
