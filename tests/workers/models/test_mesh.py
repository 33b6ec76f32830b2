"""What ranks say to each other arrives whole and in order; a rank that cannot join says why."""

import pytest
import torch

from manta.workers.mesh import Mesh, MeshError, connect_mesh, open_store
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
NUM_STEPS = 40  # more than the sends a rank keeps pending
NUM_IN_FLIGHT = 3


def converse(rank: int, port: int) -> dict[str, object]:
    """Rank of a 2 x 2 mesh: every collective once, then steps with a few of them in flight."""
    tp_rank, pp_rank = rank % 2, rank // 2
    mesh = connect_mesh(
        host="localhost", port=port, tp_rank=tp_rank, tp_size=2, pp_rank=pp_rank, pp_size=2, device=CPU, timeout_s=60.0
    )
    heard: dict[str, object] = {
        "sum": mesh.all_reduce(torch.full((2, 3), rank + 1.0, dtype=torch.bfloat16)).tolist(),
        "gathered": mesh.all_gather_last_dim(torch.tensor([[rank, 10 * rank]])).tolist(),
        "ends": (mesh.is_first_stage, mesh.is_last_stage),
    }
    if mesh.is_first_stage:
        tokens = []
        for step in range(NUM_STEPS):
            mesh.send_hidden(torch.full((step + 1, 4), float(step)))
            if step >= NUM_IN_FLIGHT:
                tokens.append(mesh.recv_tokens(step + 1 - NUM_IN_FLIGHT).tolist())
        tokens += [mesh.recv_tokens(NUM_STEPS + 1 - left).tolist() for left in range(NUM_IN_FLIGHT, 0, -1)]
        heard["tokens"] = tokens
        mesh.send_hidden(torch.zeros(1, 4))  # so that the other stage stays until all tokens have been heard
    else:
        for step in range(NUM_STEPS):
            hidden = mesh.recv_hidden(step + 1, 4, torch.float32)
            mesh.send_tokens(hidden[:, 0].long())
        mesh.recv_hidden(1, 4, torch.float32)
    mesh.all_reduce(torch.zeros(1))
    mesh.destroy()
    return heard


def test_two_by_two() -> None:
    heard = run_ranks(4, converse)
    for rank, said in enumerate(heard):
        stage = 2 * (rank // 2)
        assert said["sum"] == [[stage + 1.0 + stage + 2.0] * 3] * 2
        assert said["gathered"] == [[stage, 10 * stage, stage + 1, 10 * (stage + 1)]]
        assert said["ends"] == (rank < 2, rank >= 2)
    expected = [[step] * (step + 1) for step in range(NUM_STEPS)]
    assert heard[0]["tokens"] == heard[1]["tokens"] == expected


def test_alone_needs_no_group() -> None:
    mesh = Mesh.single(CPU)
    x = torch.randn(2, 3)
    assert mesh.all_reduce(x) is mesh.all_gather_last_dim(x) is x
    assert mesh.is_first_stage
    assert mesh.is_last_stage


def test_a_missing_rank_is_an_error_with_the_rank() -> None:
    store, _ = open_store()
    with pytest.raises(MeshError, match=r"rank 0 \(tp 0 of 2, stage 0 of 1\) could not join .* within 1 s"):
        connect_mesh(store=store, tp_rank=0, tp_size=2, pp_rank=0, pp_size=1, device=CPU, timeout_s=1.0)


def test_a_missing_store_is_an_error_with_the_address() -> None:
    with pytest.raises(MeshError, match=r"rank 1 .* through 127\.0\.0\.1:9 within 1 s"):
        connect_mesh(host="127.0.0.1", port=9, tp_rank=1, tp_size=2, pp_rank=0, pp_size=1, device=CPU, timeout_s=1.0)
