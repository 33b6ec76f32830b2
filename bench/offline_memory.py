"""Memory of a long offline run: the resident set of every process at intervals, while LLM.generate works through many
prompts of an iterator, and after each of several such runs.

What is generated is kept until the end of a run, as a user would; between runs it is dropped. Steady is: the worker and
the engine do not grow after the first seconds, and the program grows by its outputs only, not from run to run.

    python bench/offline_memory.py --num-prompts 10000 --rounds 3
"""

import argparse
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from manta import LLM, SamplingParams

_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MIB


def children(pid: int) -> dict[int, str]:
    """pid -> the last word of the module that it runs."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        module = words[words.index("-m") + 1] if "-m" in words else words[0]
        found[int(child)] = module.removeprefix("manta.")
    return found


class Sampler:
    """Prints a row each `interval_s` until the `with` block ends."""

    def __init__(self, interval_s: float, progress: list[int]) -> None:
        self._interval_s, self._progress = interval_s, progress
        self._names = {os.getpid(): "program"} | children(os.getpid())
        self._start = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        print("    time s  prompts taken " + "".join(f"{name:>20}" for name in self._names.values()) + "  (MiB)")

    def row(self, note: str = "") -> None:
        sizes = "".join(f"{resident_mib(pid):20.1f}" for pid in self._names)
        print(f"{time.monotonic() - self._start:10.1f} {self._progress[0]:14d} {sizes}  {note}", flush=True)

    def _run(self) -> None:
        while not self._done.wait(self._interval_s):
            self.row()

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()


def prompts(num_prompts: int, num_words: int, progress: list[int]) -> Iterator[str]:
    for i in range(num_prompts):
        progress[0] += 1
        yield " ".join(f"w{(i * 7 + j * 13) % 997}" for j in range(num_words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/text2sql/model")
    parser.add_argument("--num-prompts", type=int, default=10_000)
    parser.add_argument("--num-words", type=int, default=8, help="of a prompt")
    parser.add_argument("--output-len", type=int, default=8, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--interval-s", type=float, default=5.0)
    parser.add_argument("--kv-cache-memory-bytes", default="64MiB")
    args = parser.parse_args()
    sampling = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
    with LLM(args.model, kv_cache_memory_bytes=args.kv_cache_memory_bytes) as llm:
        progress = [0]
        with Sampler(args.interval_s, progress) as sampler:
            sampler.row("before")
            for round_number in range(1, args.rounds + 1):
                outputs = llm.generate(prompts(args.num_prompts, args.num_words, progress), sampling)
                sampler.row(f"round {round_number}: {len(outputs)} outputs kept")
                del outputs
                gc.collect()
                sampler.row("dropped")


if __name__ == "__main__":
    main()
