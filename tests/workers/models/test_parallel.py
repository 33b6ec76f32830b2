"""Logits over tensor-parallel ranks and pipeline stages equal those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from manta.workers.mesh import Mesh, connect_mesh
from tests.support.checkpoints import make_checkpoint
from tests.support.ranks import run_ranks
from tests.support.steps import run_steps
from tests.support.tolerances import SPLIT_LOGITS, relative_error

CPU = torch.device("cpu")
NUM_RANKS = 4
EVEN = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 20}

# id: family, config overrides, tp, pp, dtype, load format
CASES: dict[str, tuple[str, dict[str, Any], int, int, torch.dtype, str]] = {
    "llama-2x1": ("llama-bias", {}, 2, 1, torch.float32, "auto"),
    "llama-1x2": ("llama-bias", {}, 1, 2, torch.float32, "auto"),
    "llama-2x2": ("llama-bias", {}, 2, 2, torch.float32, "auto"),
    "kv-heads-replicated-4x1": ("qwen2", EVEN, 4, 1, torch.float32, "auto"),
    "one-kv-head-2x2": ("qwen3", {**EVEN, "num_key_value_heads": 1}, 2, 2, torch.float32, "auto"),
    "odd-intermediate-4x1": ("llama", {**EVEN, "intermediate_size": 87}, 4, 1, torch.float32, "auto"),
    "tied-1x2": ("llama-tied", {}, 1, 2, torch.float32, "auto"),
    "tied-2x2": ("qwen3-tied", {}, 2, 2, torch.float32, "auto"),
    "window-2x1": ("mistral", {}, 2, 1, torch.float32, "auto"),
    "window-by-layer-1x2": ("qwen2-window", {}, 1, 2, torch.float32, "auto"),
    "one-layer-each-1x3": ("llama", {}, 1, 3, torch.float32, "auto"),
    "vocab-smaller-than-ranks-4x1": ("llama", {**EVEN, "vocab_size": 5}, 4, 1, torch.float32, "auto"),
    "bf16-2x2": ("qwen3", {}, 2, 2, torch.bfloat16, "auto"),
    "dummy-2x2": ("llama", {}, 2, 2, torch.float32, "dummy"),
}


def run_cases(rank: int, port: int, folders: dict[str, Path]) -> dict[str, list[Tensor] | None]:
    """One rank's logits of every case it takes part in."""
    store = TCPStore("localhost", port, is_master=False)
    results, meshes = {}, []
    for case, (_, _, tp_size, pp_size, dtype, load_format) in CASES.items():
        if rank >= tp_size * pp_size:
            continue
        mesh = connect_mesh(
            store=PrefixStore(case, store),
            tp_rank=rank % tp_size,
            tp_size=tp_size,
            pp_rank=rank // tp_size,
            pp_size=pp_size,
            device=CPU,
            timeout_s=60.0,
        )
        results[case] = run_steps(folders[case], mesh, dtype, load_format)
        meshes.append(mesh)
    store.set(f"done/{rank}", "")
    store.wait([f"done/{other}" for other in range(NUM_RANKS)])  # nobody leaves while another still listens
    for mesh in meshes:
        mesh.destroy()
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        case: make_checkpoint(tmp_path_factory.mktemp(case), family, **overrides)
        for case, (family, overrides, *_) in CASES.items()
    }


@pytest.fixture(scope="module")
def results(folders: dict[str, Path]) -> list[dict[str, list[Tensor] | None]]:
    return run_ranks(NUM_RANKS, run_cases, folders)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_one_process(
    case: str, folders: dict[str, Path], results: list[dict[str, list[Tensor] | None]]
) -> None:
    _, _, tp_size, pp_size, dtype, load_format = CASES[case]
    torch.set_num_threads(1)
    expected = run_steps(folders[case], Mesh.single(CPU), dtype, load_format)
    assert expected is not None
    for rank in range(tp_size * pp_size):
        steps = results[rank][case]
        if rank < tp_size * (pp_size - 1):
            assert steps is None, "only the last stage has logits"
            continue
        assert steps is not None
        for actual, wanted in zip(steps, expected, strict=True):
            assert relative_error(actual, wanted) < SPLIT_LOGITS[dtype]
