"""What a running batch costs interactive requests, and what it gets done meanwhile.

    python bench/batch_interference.py --model /tmp/smollm2-135m --batch-seqs 0 8
    python bench/batch_interference.py --model /tmp/smollm2-135m --device-us 10000 1200 460

A server is started for each --max-num-batch-seqs. `manta bench serve` measures it alone, beside a batch of
/v1/batches, and, for comparison, beside the same lines from a client that sends them as ordinary requests
(`manta run-batch --url`). Lines have 128 random tokens in and 96 out.

With --device-us the worker is a clock (`modelled_device.py`) behind the real frontend and scheduler: the figures are
those of a device as fast as that, whatever else this machine does.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from processes import spawn

from manta.configs.schema import ServeConfig

_MANTA = Path(sys.executable).parent / "manta"
_FIGURES = {
    "median_ttft_ms": "TTFT p50, ms",
    "p99_ttft_ms": "TTFT p99, ms",
    "median_itl_ms": "ITL p50, ms",
    "p99_itl_ms": "ITL p99, ms",
}
_INPUT, _OUTPUT, _NUM_LINES = 128, 96, 4000
_VOCABULARY = 40_000
_BATCH = "batch lines/s meanwhile"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, for example from bench/shapes.py")
    parser.add_argument("--batch-seqs", nargs="+", type=int, default=[8], help="values of --max-num-batch-seqs")
    parser.add_argument("--rate", type=float, default=2.0, help="interactive requests per second")
    parser.add_argument("--num-prompts", type=int, default=40, help="interactive requests of a run")
    parser.add_argument("--port", type=int, default=8471)
    parser.add_argument("--device-us", nargs=3, metavar=("STEP", "ROW", "TOKEN"), help="a clock instead of the model")
    parser.add_argument("--no-client", action="store_true", help="leave out the ordinary client")
    return parser.parse_args()


@contextlib.contextmanager
def server(args: argparse.Namespace, batch_seqs: int, folder: Path) -> Iterator[str]:
    """Its URL."""
    words = ["--distributed-executor-backend", "local", "--host", "127.0.0.1", "--port", str(args.port)]
    words += ["--grpc-port", "0", "--max-num-seqs", "64", "--max-num-batch-seqs", str(batch_seqs)]
    words += ["--batch-dir", str(folder / f"batches-{batch_seqs}")]
    log = (folder / "server.log").open("w")
    process = subprocess.Popen([str(_MANTA), "serve", args.model, *words], stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{args.port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                sys.exit((folder / "server.log").read_text())
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)
        log.close()


@contextlib.contextmanager
def clock(args: argparse.Namespace, batch_seqs: int, folder: Path) -> Iterator[str]:
    """As `server`, around a worker without a model."""
    config = ServeConfig(
        model=args.model, device="cpu", host="127.0.0.1", port=args.port, grpc_port=0, max_num_seqs=64,
        batch_dir=str(folder / f"batches-{batch_seqs}"), max_num_batch_seqs=batch_seqs,
    )  # fmt: skip
    parent = ["--parent-pid", str(os.getpid())]
    child = ["--config-json", config.model_dump_json(), *parent]
    frontend = spawn("frontend", "manta.cluster.doors.main", child)
    children = [frontend, spawn("worker", "modelled_device", ["--device-us", *args.device_us, *parent])]
    try:
        worker = children[1].wait_for_address(60)
        children.append(spawn("scheduler", "manta.cluster.engine.main", [*child, "--workers", worker]))
        frontend.tell(f"{children[2].wait_for_address(60)} {args.port} 0")
        yield f"http://{frontend.wait_for_address(60).split()[0]}"
    finally:
        for process in children:
            process.terminate()
        for process in children:
            process.join(10)


def write_lines(path: Path, model: str) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(_NUM_LINES):
            prompt = [draw.randrange(10, _VOCABULARY) for _ in range(_INPUT)]
            body = {"model": model, "prompt": prompt, "max_tokens": _OUTPUT, "ignore_eos": True, "temperature": 0}
            each = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(each) + "\n")


def measure(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, float]:
    file = folder / "result.json"
    flags = {"--num-prompts": args.num_prompts, "--request-rate": args.rate, "--random-input-len": 144,
             "--random-output-len": 96, "--random-range-ratio": 0.5, "--seed": seed, "--num-warmups": 2,
             "--port": args.port, "--result-dir": folder, "--result-filename": file.name}  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]
    done = subprocess.run(
        [str(_MANTA), "bench", "serve", "--disable-tqdm", "--save-result", *words], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    result: dict[str, Any] = json.loads(file.read_text())
    return {name: float(result[name]) for name in _FIGURES}


@contextlib.contextmanager
def batch(url: str, lines: Path) -> Iterator[str]:
    """The path of a batch that is running well when the block begins, and cancelled with it."""
    with lines.open("rb") as file:
        made = httpx.post(f"{url}/v1/files", data={"purpose": "batch"}, files={"file": file}, timeout=60)
    asked = {"input_file_id": made.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    path = f"{url}/v1/batches/{httpx.post(f'{url}/v1/batches', json=asked).json()['id']}"
    while num_done(path) < 24:
        time.sleep(0.1)
    try:
        yield path
    finally:
        httpx.post(f"{path}/cancel", timeout=60)
        while httpx.get(path).json()["status"] != "cancelled":
            time.sleep(0.1)


def num_done(path: str) -> int:
    counts: dict[str, int] = httpx.get(path).json()["request_counts"]
    return counts["completed"]


@contextlib.contextmanager
def ordinary_client(url: str, lines: Path, output: Path) -> Iterator[None]:
    words = ["run-batch", "-i", str(lines), "-o", str(output), "--url", url]
    process = subprocess.Popen([str(_MANTA), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not output.exists() or output.read_bytes().count(b"\n") < 24:
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def run(args: argparse.Namespace, batch_seqs: int, folder: Path, lines: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    with (clock if args.device_us else server)(args, batch_seqs, folder) as url:
        found["alone"] = measure(args, folder, seed=1)
        with batch(url, lines) as path:
            begin_s, begin = time.perf_counter(), num_done(path)
            time.sleep(15)
            rate = (num_done(path) - begin) / (time.perf_counter() - begin_s)
            print(f"the batch with nobody else: {rate:.2f} lines/s", flush=True)
            begin_s, begin = time.perf_counter(), num_done(path)
            name = f"batch, --max-num-batch-seqs {batch_seqs}"
            found[name] = measure(args, folder, seed=2)
            found[name][_BATCH] = (num_done(path) - begin) / (time.perf_counter() - begin_s)
        if not args.no_client:
            output = folder / f"output-{batch_seqs}.jsonl"
            with ordinary_client(url, lines, output):
                begin_s, begin = time.perf_counter(), output.read_bytes().count(b"\n")
                found["ordinary client"] = measure(args, folder, seed=3)
                num_lines = output.read_bytes().count(b"\n") - begin
                found["ordinary client"][_BATCH] = num_lines / (time.perf_counter() - begin_s)
    return found


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = folder / "in.jsonl"
        write_lines(lines, args.model)
        for batch_seqs in args.batch_seqs:
            found = run(args, batch_seqs, folder, lines)
            print("| figure | " + " | ".join(found) + " |\n" + "| --- " * (len(found) + 1) + "|")
            for figure, title in (_FIGURES | {_BATCH: _BATCH}).items():
                cells = [f"{each[figure]:.1f}" if figure in each else "-" for each in found.values()]
                print(f"| {title} | " + " | ".join(cells) + " |", flush=True)
            args.no_client = True  # it does not depend on the flag


if __name__ == "__main__":
    main()
