"""Everything that needs a GPU, in one command.

    PYTHONPATH=.typing python bench/gpu --out gpu.json
    PYTHONPATH=.typing python bench/gpu --device cpu --small       # tries the script itself

Needs torch, triton, transformers, grpcio, protobuf, pydantic and numpy; the tests also pytest. Prints hardware and
versions, compares tokens and logits with transformers', measures whole models with random weights, attention and the
other kernels, runs the tests for GPUs, and measures transformers on the same work. Every part is a process of its own:
what fails is reported, and the rest goes on; the exit code is then 1. What has not begun when the time limit is over is
left out: give the parts to several runs.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import attention
import children
import correctness
import device_tests
import engine
import hardware
import peers
import profile_steps
import small_kernels
import torch
from report import Report, Unit

from manta.kernels import ops

PARTS = ("correctness", "engine", "attention", "kernels", "profile", "tests", "peers")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU can do")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6b", "llama-3.1-8b"])
    parser.add_argument("--modes", nargs="+", choices=engine.MODES, default=engine.MODES, help="of the engine part")
    parser.add_argument("--time-limit-s", type=float, default=510.0, help="nothing begins later (default 510)")
    parser.add_argument("--out", type=Path, help="JSON file with all records, written after each")
    parser.add_argument("--append", action="store_true", help="keep what the file has")
    parser.add_argument("--processes", choices=["one", "each"], help="one for each part; one for all on a CPU")
    return parser.parse_args()


def main() -> int:
    args, begin_s = parse_args(), time.perf_counter()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu --small tries the script itself")
    if args.processes == "each" or (args.processes is None and args.device == "cuda"):
        return children.run(args)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    report = Report(args.out, args.time_limit_s, args.append)
    report.put("hardware", hardware.describe(device))
    print(json.dumps(report.content["hardware"]), flush=True)
    limits = hardware.measure(device, args.small)
    report.put("limits", vars(limits))
    print(limits, flush=True)
    for part in args.parts:
        print(f"\n== {part}", flush=True)
        report.run(part, _units(args, device, limits, report)[part](), partial(clean_up, device))
    seconds = report.content.get("total_s", 0.0) + time.perf_counter() - begin_s
    report.put("total_s", seconds)
    return int(report.num_failed > 0)


def clean_up(device: torch.device) -> None:
    """Everything that the last unit took of the device is given back, and kernels are the usual ones again."""
    gc.unfreeze()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        ops.use_attention()


def _units(
    args: argparse.Namespace, device: torch.device, limits: hardware.Limits, report: Report
) -> dict[str, Callable[[], Iterable[Unit]]]:
    """By part."""
    modes = [mode for mode in args.modes if device.type == "cuda" or mode in engine.CPU_MODES]
    small = args.small
    return {
        "correctness": lambda: correctness.units(device),
        "engine": lambda: [
            (f"{shape}, {mode}", partial(engine.run, shape, mode, device, limits, small))
            for mode in modes
            for shape in args.shapes
        ],
        "profile": lambda: [(shape, partial(profile_steps.run, shape, device, small)) for shape in args.shapes],
        "attention": lambda: attention.units(device, limits, small),
        "kernels": lambda: [("kernels", partial(small_kernels.run, device, limits, small))],
        "peers": lambda: peers.units(args.shapes, engine.workloads(small)[-1], device, small, report),
        "tests": lambda: [("tests", lambda: device_tests.run(report.left_s))],
    }


if __name__ == "__main__":
    sys.exit(main())
