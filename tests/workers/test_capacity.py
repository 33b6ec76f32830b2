"""Numbers of KV blocks from numbers of bytes."""

from pathlib import Path
from typing import Any

import pytest

from manta.configs.schema import ServeConfig
from manta.workers.capacity import CapacityError, GpuMemory, num_cpu_blocks, num_gpu_blocks
from manta.workers.host_memory import available_memory_bytes

GIB = 2**30
MIB = 2**20


def config(**fields: Any) -> ServeConfig:
    return ServeConfig(model="m", **fields)


def test_a_gpu_holds_what_utilization_leaves_beside_weights_and_activations() -> None:
    memory = GpuMemory(total_bytes=80 * GIB, peak_bytes=20 * GIB, other_bytes=2 * GIB)
    assert num_gpu_blocks(config(gpu_memory_utilization=0.9), memory, 2 * MIB, 8192) == (72 - 22) * 512
    assert num_gpu_blocks(config(gpu_memory_utilization=0.5), memory, 2 * MIB, 8192) == (40 - 22) * 512
    assert num_gpu_blocks(config(kv_cache_memory_bytes="4GiB"), memory, 2 * MIB, 8192) == 2048
    assert num_gpu_blocks(config(num_gpu_blocks_override=7), memory, 2 * MIB, 8192) == 7


def test_a_full_gpu_is_an_error_with_numbers_and_flags() -> None:
    memory = GpuMemory(total_bytes=24 * GIB, peak_bytes=22 * GIB, other_bytes=GIB)
    with pytest.raises(CapacityError, match=r"22,118\.4 MiB of 24,576\.0 MiB.*22,528\.0 MiB.*16 blocks") as error:
        num_gpu_blocks(config(), memory, 2 * MIB, 8192)
    for flag in ("--gpu-memory-utilization", "--max-num-batched-tokens", "--tensor-parallel-size"):
        assert flag in str(error.value)


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
