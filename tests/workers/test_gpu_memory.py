"""The account of a GPU's memory, of a device that is only numbers."""

from pathlib import Path

import pytest
import torch

from manta.configs.capacity import CapacityError, KVSize, num_gpu_blocks
from manta.configs.model import read_model_spec
from manta.configs.schema import ServeConfig
from manta.workers.gpu_memory import GpuMemory, Reading
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.rank import gpu_blocks
from tests.support.checkpoints import make_checkpoint

GIB, MIB = 2**30, 2**20
CONFIG = ServeConfig(model="m", max_num_batched_tokens=8192, max_num_seqs=64, max_model_len=4096)
KV = KVSize(num_tensors=32, tensor_bytes=32 * 1024, block_size=16)  # 1 MiB a block, 256 MiB a sequence


class FakeGpu:
    """A device of 80 GiB whose allocator keeps what tensors no longer use, as torch's does."""

    def __init__(self, outside_bytes: int = GIB) -> None:
        self.outside_bytes = outside_bytes
        self.tensor_bytes = self.reserved_bytes = self.peak_bytes = 0

    def take(self, num_bytes: int) -> None:
        self.tensor_bytes += num_bytes
        self.reserved_bytes = max(self.reserved_bytes, self.tensor_bytes)
        if self.reserved_bytes + self.outside_bytes > 80 * GIB:
            self.tensor_bytes -= num_bytes
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)

    def give(self, num_bytes: int) -> None:
        self.tensor_bytes -= num_bytes

    def read(self) -> Reading:
        free_bytes = 80 * GIB - self.outside_bytes - self.reserved_bytes
        return Reading(80 * GIB, free_bytes, self.reserved_bytes, self.peak_bytes)

    def release(self) -> None:
        self.reserved_bytes = self.tensor_bytes

    def restart(self) -> None:
        self.release()
        self.peak_bytes = self.reserved_bytes


class FakeRunner:
    """Tables and graphs of 3 GiB, 256 MiB of them outside torch; recording takes 2 GiB more while it lasts."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        gpu.take(2816 * MIB)
        gpu.outside_bytes += 256 * MIB
        gpu.take(2 * GIB)
        gpu.give(2 * GIB)

    def run(self, activation_bytes: int) -> None:
        self.gpu.take(activation_bytes)
        self.gpu.give(activation_bytes)

    def __del__(self) -> None:
        self.gpu.give(2816 * MIB)


def loaded(gpu: FakeGpu, weight_bytes: int) -> GpuMemory:
    memory = GpuMemory(CONFIG, gpu)
    with memory.during("loading the weights"):
        gpu.take(weight_bytes)
        gpu.take(GIB)  # while they are read
        gpu.give(GIB)
    gpu.outside_bytes += 512 * MIB  # NCCL
    memory.weights_are_loaded(KV, 4096)
    return memory


@pytest.mark.parametrize(("activation_bytes", "counted"), [(5 * GIB, 5 * GIB), (GIB, 2 * GIB)])
def test_blocks_get_what_everything_else_leaves(activation_bytes: int, counted: int) -> None:
    gpu = FakeGpu()
    memory = loaded(gpu, 16 * GIB)
    memory.try_out(lambda: FakeRunner(gpu), lambda runner: runner.run(activation_bytes))
    assert (memory.others_bytes, memory.weight_bytes, memory.table_bytes) == (GIB, 16 * GIB, 2816 * MIB)
    assert (memory.activation_bytes, memory.library_bytes) == (counted, 768 * MIB)  # recording, if that took more
    assert memory.left_bytes == 72 * GIB - GIB - 16 * GIB - 2816 * MIB - counted - 768 * MIB
    assert gpu.reserved_bytes == 16 * GIB, "the trial is over"
    # What was tried out fits beside the blocks.
    num_blocks = num_gpu_blocks(CONFIG, KV, memory.left_bytes, 4096)
    assert num_blocks is not None
    gpu.outside_bytes -= 256 * MIB
    gpu.take(num_blocks * KV.block_bytes)
    runner = FakeRunner(gpu)
    runner.run(activation_bytes)
    assert gpu.peak_bytes + gpu.outside_bytes <= 72 * GIB
    del runner


def test_a_device_that_others_fill_is_an_error_with_all_numbers_and_flags() -> None:
    gpu = FakeGpu(outside_bytes=50 * GIB)
    memory = loaded(gpu, 16 * GIB)
    memory.try_out(lambda: FakeRunner(gpu), lambda runner: runner.run(3 * GIB))
    assert num_gpu_blocks(CONFIG, KV, memory.left_bytes, 4096) is None
    message = str(memory.error("no room for KV blocks"))
    for part in (
        "no room for KV blocks: the GPU has 81,920.0 MiB", "--gpu-memory-utilization 0.9 allows 73,728.0 MiB",
        "other processes and the CUDA context use 51,200.0 MiB", "weights 16,384.0 MiB",
        "activations of 8192 tokens 3,072.0 MiB", "tables and graphs for 64 sequences 2,816.0 MiB",
        "libraries 768.0 MiB", "KV blocks can have 0.0 MiB", "one sequence of 4096 tokens needs 256.0 MiB",
    ):  # fmt: skip
        assert part in message
    for flag in ("max-num-batched-tokens", "max-num-seqs", "max-model-len", "enforce-eager", "tensor-parallel-size"):
        assert f"--{flag}" in message
    assert "\n" not in message


def test_a_device_without_room_for_a_context() -> None:
    class Full(FakeGpu):
        def read(self) -> Reading:
            raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(CapacityError, match="other processes use all of the GPU's memory"):
        GpuMemory(CONFIG, Full())


def test_running_out_while_loading() -> None:
    gpu = FakeGpu()
    with pytest.raises(CapacityError, match=r"while loading the weights: the GPU has 81,920\.0 MiB.*--tensor-par") as e:
        loaded(gpu, 100 * GIB)
    assert isinstance(e.value.__cause__, torch.OutOfMemoryError)


def test_running_out_while_recording() -> None:
    gpu = FakeGpu()
    memory = loaded(gpu, 77 * GIB)

    def build() -> FakeRunner:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    with pytest.raises(CapacityError, match=r"recording decode steps: .*weights 78,848\.0 MiB, one sequence of 4096"):
        memory.try_out(build, lambda _: None)


def test_running_out_in_the_largest_step() -> None:
    gpu = FakeGpu()
    memory = loaded(gpu, 70 * GIB)
    with pytest.raises(CapacityError, match=r"a step of 8192 tokens: .* for 64 sequences 2,816\.0 MiB"):
        memory.try_out(lambda: FakeRunner(gpu), lambda runner: runner.run(30 * GIB))


def test_other_errors_stay_what_they_are() -> None:
    memory = GpuMemory(CONFIG, FakeGpu())
    with pytest.raises(ValueError, match="something else"), memory.during("loading"):
        raise ValueError("something else")


def test_a_rank_counts_blocks_after_its_largest_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_checkpoint(tmp_path, "qwen3")
    spec = read_model_spec(folder)
    model = load_model(folder, spec, Mesh.single(torch.device("cpu")), torch.float32)
    config = ServeConfig(model=str(folder), max_num_seqs=3, max_num_batched_tokens=40, gpu_memory_utilization=0.5)
    gpu = FakeGpu(outside_bytes=40 * GIB - 512 * MIB)
    memory = GpuMemory(config, gpu)
    assert gpu_blocks(config, model, KVSize(32, MIB, 16), memory) == 16
    assert "KV blocks for 256 tokens fit, fewer than max_model_len 512" in caplog.text
    gpu.outside_bytes += 1
    with pytest.raises(CapacityError, match=r"KV blocks can have 512\.0 MiB"):
        gpu_blocks(config, model, KVSize(32, MIB, 16), GpuMemory(config, gpu))
