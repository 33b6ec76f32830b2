"""What the OpenMP wait setting of CPU workers costs: ms per token of one stream of the demo model, by GOMP_SPINCOUNT.

`python bench/cpu_wait.py` measures on the machine as it is; with `--busy` beside a program that keeps two threads busy.
"""

import argparse
import subprocess
import sys
import time

from manta import LLM, SamplingParams
from manta.cluster.launch import local

_BUSY = "import torch; torch.set_num_threads(2); a = torch.randn(600, 600)\nwhile True: a @ a"
_NUM_TOKENS = 400


def measure(spin_count: str) -> float:
    """ms per token of a single greedy stream."""
    worker_env = local.cpu_worker_env
    local.cpu_worker_env = lambda num_threads: worker_env(num_threads) | {"GOMP_SPINCOUNT": spin_count}
    try:
        with LLM("examples/text2sql/model", kv_cache_memory_bytes=64 * 2**20) as llm:
            sampling = SamplingParams(temperature=0, max_tokens=_NUM_TOKENS, ignore_eos=True)
            llm.generate([5] * 64, sampling, use_tqdm=False)
            start_s = time.perf_counter()
            llm.generate([6] * 64, sampling, use_tqdm=False)
            return (time.perf_counter() - start_s) / _NUM_TOKENS * 1e3
    finally:
        local.cpu_worker_env = worker_env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", action="store_true", help="beside a program with two busy threads")
    parser.add_argument("--spin-counts", nargs="+", default=["0", "1000", "50000"])
    args = parser.parse_args()
    other = subprocess.Popen([sys.executable, "-c", _BUSY]) if args.busy else None
    try:
        for spin_count in args.spin_counts:
            print(f"GOMP_SPINCOUNT={spin_count}: {measure(spin_count):.2f} ms per token", flush=True)
    finally:
        if other is not None:
            other.kill()
            other.wait()


if __name__ == "__main__":
    main()
