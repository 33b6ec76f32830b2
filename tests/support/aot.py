"""Compiles Triton kernels for GPUs that are not here, and reads from the machine code what they would use there.

A family of kernels lists its launches in `tests/kernels/triton/launches_<family>.py`, as `LAUNCHES`: name -> function
that calls the kernels' launcher with tensors of real shapes on the "meta" device; `FROM_CAPABILITY` says which are for
newer devices only. Nothing runs:
`JITFunction.run` is replaced, and what it was called with is specialised (types, divisibility, constants) just as a
launch would be. So what is compiled is what would run.
Launchers that ask `manta.kernels.gpu` for their device are told the one compiled for.

`python -m tests.support.aot <family> <i> <n>` prints the results of every n-th launch from the i-th on as JSON lines.
It must not run under TRITON_INTERPRET, which is why `resources_of` starts processes of its own.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from manta.kernels import gpu

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "kernels" / "triton"
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # per block: CUDA C++ guide, compute capability
NUM_SMS = {80: 108, 90: 132, 100: 148}  # A100, H200, B200
Launches = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Resources:
    """What one kernel, compiled for one launch, takes of the device; `stack_bytes` is above 0 when it spills."""

    family: str
    launch: str
    kernel: str
    capability: int  # 90: sm_90
    num_warps: int
    num_stages: int
    registers: int  # per thread
    stack_bytes: int
    shared_bytes: int  # per block
    matrix_instructions: str = ""  # the kinds it has, by their names in PTX

    @property
    def blocks_per_sm(self) -> int:
        """How many blocks fit into one SM's 64 Ki registers (given out by 8 per thread), 64 warps and shared memory."""
        threads = 32 * self.num_warps
        by_registers = 65536 // (-(-self.registers // 8) * 8 * threads)
        by_shared = (SHARED_LIMIT_BYTES[self.capability] + 1024) // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, 64 // self.num_warps, 32)

    def problems(self) -> list[str]:
        """What would make this launch slow (spills) or impossible (shared memory), in words."""
        where = f"{self.launch}: {self.kernel} for sm_{self.capability}"
        limit = SHARED_LIMIT_BYTES[self.capability]
        found = []
        if self.stack_bytes:
            found.append(f"{where} keeps {self.stack_bytes} bytes per thread on the stack, {self.registers} registers")
        if self.shared_bytes > limit:
            found.append(f"{where} takes {self.shared_bytes} bytes of shared memory; a block may take {limit}")
        return found


def families() -> list[str]:
    return sorted(path.stem.removeprefix("launches_") for path in FOLDER.glob("launches_*.py"))


@lru_cache
def resources_of(family: str, thinned: bool = False) -> list[Resources]:
    """Compiles every launch of the family, in processes without the interpreter and with an empty cache. Thinned: each
    for sm_90 and one of the others in turn."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    num_processes = min(2, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(num_processes) as pool:
        environment["TRITON_CACHE_DIR"] = cache
        parts = [[sys.executable, "-m", "tests.support.aot", family, str(i), str(num_processes), str(int(thinned))]
                 for i in range(num_processes)]  # fmt: skip
        found = [line for lines in pool.map(lambda part: _lines(part, environment), parts) for line in lines]
    return [Resources(**fields) for _, fields in sorted(found, key=lambda line: line[0])]


def _lines(command: list[str], environment: dict[str, str]) -> list[tuple[int, dict[str, Any]]]:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def _recorded_launches() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """While it is open, kernels are not run: each launch is put down as (kernel, arguments, named arguments)."""
    from triton.runtime.jit import JITFunction

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        calls.append((self, args, kwargs))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield calls
    finally:
        JITFunction.run = run


def _compile(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Any:
    """The compiled kernel, specialised as `JITFunction.run` would for these arguments on such a device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, None)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, f"cuobjdump printed no register count:\n{text}"
    return int(found[1]), int(found[2])


def _matrix_instructions(ptx: str) -> str:
    return " ".join(sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*", ptx))))


def compiled(family: str, first: int = 0, step: int = 1, thinned: int = 0) -> Iterator[tuple[int, Resources]]:
    """The resources of each kernel of the family's launches first, first + step, ..., with the number of the launch;
    every different kernel once per launch. Thinned: see `resources_of`."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels cannot be compiled: unset TRITON_INTERPRET"
    module = importlib.import_module(f"tests.kernels.triton.launches_{family}")
    launches: Launches = module.LAUNCHES
    least: dict[str, int] = getattr(module, "FROM_CAPABILITY", {})
    for number, (name, launch) in islice(enumerate(launches.items()), first, None, step):
        left_out = (80, 100)[number // step % 2] if thinned and least.get(name, 0) <= 80 else None
        for capability in (each for each in NUM_SMS if each >= least.get(name, 0) and each != left_out):
            gpu.pretend(gpu.Gpu(capability, NUM_SMS[capability]))
            with _recorded_launches() as calls:
                launch()
            assert calls, f"{family}: {name} launched no Triton kernel"
            for kernel, args, kwargs in calls:
                result = _compile(kernel, args, kwargs, capability)
                registers, stack_bytes = _registers_and_stack(result.asm["cubin"])
                data, matrix = result.metadata, _matrix_instructions(result.asm["ptx"])
                yield number, Resources(family, name, kernel.__name__, capability, data.num_warps, data.num_stages,
                                        registers, stack_bytes, data.shared, matrix)  # fmt: skip


if __name__ == "__main__":
    for nth, resources in compiled(sys.argv[1], *map(int, sys.argv[2:])):
        print(json.dumps((nth, asdict(resources))), flush=True)
