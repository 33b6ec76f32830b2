"""Everything that needs a GPU, in one command.

    PYTHONPATH=.typing python bench/gpu --out gpu.json
    PYTHONPATH=.typing python bench/gpu --device cpu --small       # tries the script itself

Needs torch, triton, transformers, grpcio, protobuf, pydantic and numpy; the kernels' tests also pytest. Prints hardware
and versions, runs the kernels' tests, measures attention and whole models with random weights beside transformers, and
compares tokens with transformers'. A part that fails is reported and the others go on; the exit code is then 1.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import attention
import correctness
import engine
import hardware
import peers
import small_kernels
import torch

PARTS = ("tests", "correctness", "attention", "kernels", "engine", "peers")
_ROOT = Path(__file__).parents[2]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU can do")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6b", "llama-3.1-8b"])
    parser.add_argument("--out", type=Path, help="JSON file with all records")
    return parser.parse_args()


def kernel_tests() -> list[dict[str, Any]]:
    """The tests of the kernels on the device."""
    if find_spec("pytest") is None:
        return [{"skipped": "pytest is not installed"}]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:], flush=True)
    if done.returncode not in (0, 5):
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    return [{"pytest": done.stdout.strip().splitlines()[-1]}]


def main() -> int:
    args = parse_args()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu --small tries the script itself")
    content: dict[str, Any] = {"command": sys.argv, "hardware": hardware.describe(device)}
    print(json.dumps(content["hardware"]), flush=True)
    limits = hardware.measure(device, args.small)
    content["limits"] = vars(limits)
    print(
        f"copy {limits.copy_bytes_per_s / 1e9:,.0f} GB/s, bf16 matmul {limits.matmul_flops / 1e12:,.1f} TFLOP/s",
        flush=True,
    )
    failed = False
    for part in args.parts:
        print(f"\n== {part}", flush=True)
        begin_s = time.perf_counter()
        try:
            content[part] = _parts(args, device, limits)[part]()
        except Exception as error:  # noqa: BLE001 (the other parts are worth having)
            traceback.print_exc()
            content[part] = {"error": f"{type(error).__name__}: {error}"}
            failed = True
        print(f"({part}: {time.perf_counter() - begin_s:.1f} s)", flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(content, indent=1))
    return int(failed)


def _parts(
    args: argparse.Namespace, device: torch.device, limits: hardware.Limits
) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    def engines() -> list[dict[str, Any]]:
        records = []
        for shape in args.shapes:
            records += engine.run(shape, device, limits, args.small)
            records += engine.run(shape, device, limits, args.small, eager=True)
            if device.type == "cuda":
                records += engine.run(shape, device, limits, args.small, batch_invariant=True)
        return records

    def transformers() -> list[dict[str, Any]]:
        workload = engine.workloads(args.small)[-1]
        return [peers.run(shape, workload, device, args.small) for shape in args.shapes]

    return {
        "tests": kernel_tests,
        "correctness": lambda: correctness.run(device),
        "attention": lambda: attention.run(device, limits, args.small),
        "kernels": lambda: small_kernels.run(device, limits, args.small),
        "engine": engines,
        "peers": transformers,
    }


if __name__ == "__main__":
    sys.exit(main())
