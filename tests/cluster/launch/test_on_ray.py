"""What RayLauncher asks Ray for, of a cluster that is only numbers."""

from typing import Any

import pytest
import ray

from manta.cluster.launch.launcher import LaunchError
from manta.cluster.launch.on_ray import _worker_needs
from manta.configs.schema import ServeConfig


@pytest.mark.parametrize(
    ("fields", "num_gpus"),
    [
        ({"tensor_parallel_size": 4, "data_parallel_size": 2}, 8),
        ({"min_replicas": 1, "max_replicas": 8}, 1),
        ({"tensor_parallel_size": 2, "min_replicas": 3, "max_replicas": 8}, 6),
    ],
)
def test_gpus_of_the_start_must_be_there_and_others_may_come(
    fields: dict[str, Any], num_gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(model="m", **fields)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": float(num_gpus), "CPU": 64.0})
    assert _worker_needs(config) == ({"CPU": 1.0, "GPU": 1.0}, {})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": num_gpus - 0.5, "CPU": 64.0})
    with pytest.raises(LaunchError, match=f"{num_gpus} GPUs are needed and Ray has {num_gpus - 1}"):
        _worker_needs(config.model_copy(update={"device": "cuda"}))
