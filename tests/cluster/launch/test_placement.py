"""What a deployment asks of Ray, of clusters that are only numbers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.cluster.launch.launcher import LaunchError
from manta.cluster.launch.placement import cpu_share, plan_placement
from manta.configs.schema import ServeConfig

HOST = {"CPU": 64.0, "GPU": 8.0}


def config(**fields: Any) -> ServeConfig:
    return ServeConfig.model_validate({"model": "m"} | fields)


@pytest.mark.parametrize(
    ("fields", "nodes", "strategy", "bundles"),
    [
        ({"tensor_parallel_size": 8}, [HOST], "PACK", [{"CPU": 8.0, "GPU": 8.0}]),
        (
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
            [HOST],
            "PACK",
            [{"CPU": 2.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 2.0}],
        ),
        (
            {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "placement_strategy": "spread"},
            [HOST, HOST],
            "STRICT_SPREAD",
            [{"CPU": 8.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 8.0}],
        ),
        ({"tensor_parallel_size": 2, "placement_strategy": "any"}, [HOST], "PACK", [{"CPU": 1.0, "GPU": 1.0}] * 2),
        (
            {"worker_resources": "CPU=4,accelerator_type:H100=0.001", "tensor_parallel_size": 2},
            [HOST],
            "PACK",
            [{"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 0.002}],
        ),
        ({"worker_resources": {"CPU": 1}}, [], "PACK", [{"CPU": 1.0}]),  # nodes are to come
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, [{"CPU": 2.0}], "PACK", [{"CPU": 1.0}]),  # shared
        ({"device": "cpu", "tensor_parallel_size": 2}, [HOST], "PACK", [{"CPU": 2.0}]),
    ],
)
def test_bundles(fields: dict[str, Any], nodes: list[dict[str, float]], strategy: str, bundles: list[Any]) -> None:
    placement = plan_placement(config(**fields), nodes)
    assert (placement.strategy, placement.bundles) == (strategy, bundles)


def test_ranks_of_a_stage_share_its_bundle() -> None:
    fields: dict[str, Any] = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    together = plan_placement(config(**fields), [HOST])
    assert [together.bundle_of(rank) for rank in range(4)] == [0, 0, 1, 1]
    apart = plan_placement(config(**fields, placement_strategy="any"), [HOST])
    assert [apart.bundle_of(rank) for rank in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "gpus", "message"),
    [
        ({"tensor_parallel_size": 4, "data_parallel_size": 2}, [7], "8 GPUs are needed and Ray has 7; add nodes"),
        ({"min_replicas": 3, "max_replicas": 8}, [1, 1], "3 GPUs are needed and Ray has 2; add nodes"),
        ({"tensor_parallel_size": 4}, [2, 2], "the largest has 2 GPUs; .* --placement-strategy any"),
        (
            {"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "placement_strategy": "spread"},
            [8, 2],
            "needs 2 nodes with 4 GPUs, one a stage, and Ray has 1",
        ),
        (
            {"tensor_parallel_size": 4, "data_parallel_size": 2},
            [6, 2],
            "2 stages of 4 GPUs of one node are needed and Ray has room for 1",
        ),
    ],
)
def test_gpus_of_the_start_must_be_there(fields: dict[str, Any], gpus: list[int], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        plan_placement(config(**fields), [{"CPU": 64.0, "GPU": float(number)} for number in gpus])


def test_gpus_for_more_may_come() -> None:
    placement = plan_placement(config(min_replicas=1, max_replicas=8), [{"CPU": 64.0, "GPU": 1.0}])
    assert placement.worker == {"CPU": 1.0, "GPU": 1.0}
    scarce = {"CPU": 64.0, "GPU": 0.5}
    assert plan_placement(config(), [scarce]).worker == {"CPU": 1.0}, "a share of a GPU is none"


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(1, 9), st.integers(1, 4))
def test_all_workers_find_a_share_of_a_cpu(cpus: list[int], num_bundles: int, num_workers: int) -> None:
    share = cpu_share([float(number) for number in cpus if number], num_bundles, num_workers)
    assert bool(share) == any(cpus)
    if share:
        assert sum(int(number / (share * num_workers) + 1e-9) for number in cpus) >= num_bundles
        assert share == 1.0 or sum(number / num_workers for number in cpus) < num_bundles + len(cpus)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CPU", "must be written as name=amount"),
        ("GPU=1", "every worker has one"),
        ("CPU=-1", "an amount is a number above 0"),
        ("CPU=1.5", "whole numbers only"),
        ("{", "resources are no JSON"),
        (3, "must be written as CPU=2"),
    ],
)
def test_resources_that_cannot_be_asked_for(text: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(worker_resources=text)


def test_resources_go_from_process_to_process() -> None:
    one = config(worker_resources='{"CPU": 2, "disk": 0.5}')
    assert one.worker_resources == "CPU=2,disk=0.5"
    assert ServeConfig.model_validate_json(one.model_dump_json()) == one
