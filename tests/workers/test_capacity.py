"""Numbers of KV blocks from numbers of bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from manta.configs.capacity import CapacityError, KVSize, num_cpu_blocks, num_gpu_blocks
from manta.configs.schema import ServeConfig
from manta.workers.host_memory import available_memory_bytes

GIB = 2**30
MIB = 2**20


def config(**fields: Any) -> ServeConfig:
    return ServeConfig(model="m", **fields)


LAYERS = KVSize(num_tensors=64, tensor_bytes=32 * 1024, block_size=16)  # 2 MiB a block


def test_a_gpu_holds_what_is_left_in_whole_allocations() -> None:
    assert num_gpu_blocks(config(), LAYERS, 50 * GIB, 8192) == 50 * 512
    assert num_gpu_blocks(config(), LAYERS, 50 * GIB + 127 * MIB, 8192) == 50 * 512  # each tensor is rounded to 2 MiB
    assert num_gpu_blocks(config(), LAYERS, 50 * GIB + 128 * MIB, 8192) == 50 * 512 + 64
    assert num_gpu_blocks(config(kv_cache_memory_bytes="4GiB"), LAYERS, 0, 8192) == 2048
    assert num_gpu_blocks(config(num_gpu_blocks_override=7), LAYERS, 0, 8192) == 7


def test_a_sequence_of_the_length_that_was_asked_for_must_fit_a_gpu() -> None:
    assert LAYERS.bytes_of(8192) == LAYERS.bytes_of(8177) == GIB
    assert num_gpu_blocks(config(max_model_len=8192), LAYERS, GIB, 8192) == 512
    assert num_gpu_blocks(config(max_model_len=8192), LAYERS, GIB - 1, 8192) is None
    assert num_gpu_blocks(config(), LAYERS, GIB - 1, 8192) == 448
    assert num_gpu_blocks(config(), LAYERS, 128 * MIB - 1, 8192) is None
    assert num_gpu_blocks(config(), LAYERS, -GIB, 8192) is None


def test_the_size_of_blocks_is_that_of_a_cache() -> None:
    layer = (torch.zeros(1, 2, 16, 8), torch.zeros(1, 2, 16, 8))
    assert KVSize.of([layer, layer], 16) == KVSize(num_tensors=4, tensor_bytes=1024, block_size=16)


def test_a_cpu_rank_takes_its_share_of_a_quarter_of_the_free_memory() -> None:
    assert num_cpu_blocks(config(), 8 * GIB, 1, MIB, 8192) == 2048
    assert num_cpu_blocks(config(), 8 * GIB, 4, MIB, 8192) == 512
    assert num_cpu_blocks(config(), 800 * GIB, 2, MIB, 8192) == 4096  # never more than 4 GiB
    assert num_cpu_blocks(config(max_num_seqs=2), 8 * GIB, 1, MIB, 100) == 2 * 7 + 16  # nor more than can be used
    assert num_cpu_blocks(config(max_num_seqs=2, kv_cache_memory_bytes=GIB), 8 * GIB, 1, MIB, 100) == 1024
    assert num_cpu_blocks(config(num_gpu_blocks_override=2), 0, 1, MIB, 8192) == 2


def test_too_little_memory_is_an_error_that_says_how_much_would_do() -> None:
    with pytest.raises(CapacityError, match=f"hold 15 blocks.* 16 are the least.*{16 * MIB}"):
        num_cpu_blocks(config(kv_cache_memory_bytes=15 * MIB), 8 * GIB, 1, MIB, 8192)
    assert num_cpu_blocks(config(kv_cache_memory_bytes=15 * MIB), 8 * GIB, 1, MIB, 100) == 15
    with pytest.raises(CapacityError, match="free memory on the host"):
        num_cpu_blocks(config(), 32 * MIB, 1, MIB, 8192)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000 * 1024),
        ({"memory.max": "max", "memory.current": "5"}, 1000 * 1024),
        ({"memory.max": "500000", "memory.current": "200000"}, 300_000),
        ({"memory.max": "500000", "memory.current": "600000"}, 0),
        ({"memory/memory.limit_in_bytes": "9000", "memory/memory.usage_in_bytes": "1000"}, 8000),
    ],
)
def test_the_container_bounds_the_memory_of_the_host(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert available_memory_bytes(tmp_path) == expected


def test_this_host_has_memory() -> None:
    assert available_memory_bytes() > MIB
