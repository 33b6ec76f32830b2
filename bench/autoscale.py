"""Replicas and nodes follow a burst of requests on a Ray cluster whose autoscaler adds nodes, and nothing is lost.

python bench/autoscale.py run --lowest 1 --out one.json
python bench/autoscale.py run --lowest 0 --out zero.json
python bench/autoscale.py plot one.json zero.json --out docs/autoscale.png

The nodes are Ray's own fake ones on this machine: the placement group of a replica that waits makes Ray's autoscaler
start one, and one that stays empty is ended. Every answer is compared with that of the undisturbed server.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from ray_autoscaling import autoscaling_cluster

from tests.support.server import DEMO_MODEL, ServerProcess

PROMPTS = ("SELECT", "a", "b", "c")
HIGHEST = 3
SAMPLE_EVERY_S = 0.25
FLAGS = ("--max-replicas", str(HIGHEST), "--worker-resources", "CPU=1", "--max-num-seqs", "4", "--upscale-delay-s", "1",
         "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB", "--port", "0", "--grpc-port", "0")  # fmt: skip


class Observer:
    """Looks at the server and at Ray every so often, on a thread of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.began_s = time.monotonic()
        self.samples: list[dict[str, Any]] = []
        self._thread.start()

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.began_s

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def wait_for(self, num_replicas: int, num_nodes: int, timeout_s: float) -> bool:
        """Whether there are so many, within the time."""
        deadline_s = self.now_s + timeout_s
        while self.now_s < deadline_s:
            last = self.samples[-1] if self.samples else {}
            if (last.get("replicas"), last.get("nodes")) == (num_replicas, num_nodes):
                return True
            time.sleep(SAMPLE_EVERY_S)
        return False

    def _run(self) -> None:
        import ray

        while not self._ended.wait(SAMPLE_EVERY_S):
            load = httpx.get(f"{self._url}/load", timeout=10).json()
            states = [replica["state"] for replica in load["replicas"]]
            nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            self.samples.append(
                {"at_s": round(self.now_s, 2), "running": load["num_running"], "waiting": load["num_waiting"],
                 "replicas": states.count("SERVING"), "nodes": len(nodes)}
            )  # fmt: skip


def ask(url: str, prompt: str, num_tokens: int, observer: Observer | None = None) -> dict[str, Any]:
    """Streams one answer. Raises when it does not end well."""
    body = {"model": str(DEMO_MODEL), "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}
    sent_s, first_s, text = observer.now_s if observer else 0.0, 0.0, ""
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=300) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += event["choices"][0]["text"]
                first_s = first_s or (observer.now_s if observer else 0.0)
        assert line == "" or line == "data: [DONE]", line
    return {"prompt": prompt, "sent_s": sent_s, "first_s": first_s, "end_s": observer.now_s if observer else 0.0,
            "text": text}  # fmt: skip


def drive(url: str, args: argparse.Namespace, observer: Observer, expected: dict[str, str]) -> list[dict[str, Any]]:
    """A few requests, a burst, a few; with nobody left and lowest 0, one more after all replicas have gone."""
    answers: list[dict[str, Any]] = []

    def one(index: int) -> None:
        prompt = PROMPTS[index % len(PROMPTS)]
        try:
            answer = ask(url, prompt, args.tokens, observer)
            answer["is_right"] = answer.pop("text") == expected[prompt]
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what is counted
            answer = {"prompt": prompt, "error": repr(error)}
        answers.append(answer)

    with ThreadPoolExecutor(256) as pool:
        for rate, seconds in ((0.5, 4.0), (args.rate, args.burst_s), (0.5, 4.0)):
            for index in range(round(rate * seconds)):
                pool.submit(one, index)
                time.sleep(1 / rate)
    observer.wait_for(args.lowest, args.lowest, args.quiet_s)
    if args.lowest == 0:
        one(0)
        observer.wait_for(0, 0, args.quiet_s)
    return answers


def run(args: argparse.Namespace) -> None:
    with autoscaling_cluster(HIGHEST) as address:
        import ray  # reads the token that there is now

        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        try:
            words = (*FLAGS, "--min-replicas", str(args.lowest), "--downscale-delay-s", str(args.downscale_s))
            with ServerProcess(str(DEMO_MODEL), "--ray-address", address, *words).wait_ready() as server:
                expected = {prompt: ask(server.url, prompt, args.tokens)["text"] for prompt in PROMPTS}
                observer = Observer(server.url)
                answers = drive(server.url, args, observer, expected)
                observer.close()
                told = [line.strip() for line in server.lines if line.startswith("manta:")]
        finally:
            ray.shutdown()
    result = {"flags": " ".join(words), "lowest": args.lowest, "samples": observer.samples, "requests": answers,
              "told": told}  # fmt: skip
    Path(args.out).write_text(json.dumps(result))
    print("\n".join(told), summary(result), sep="\n")


def summary(result: dict[str, Any]) -> str:
    requests, samples = result["requests"], result["samples"]
    good = [each for each in requests if each.get("is_right")]
    ttfts = sorted(each["first_s"] - each["sent_s"] for each in good)
    steps = [f"{samples[0]['replicas']}"]
    steps += [
        f"{now['replicas']} ({now['at_s']:.0f} s)"
        for last, now in pairwise(samples)
        if last["replicas"] != now["replicas"]
    ]
    return "\n".join([
        f"requests     {len(requests)} sent, {len(good)} answered with the right text",
        f"replicas     {' -> '.join(steps)}",
        f"nodes        at most {max(each['nodes'] for each in samples)}, at the end {samples[-1]['nodes']}",
        f"TTFT         median {statistics.median(ttfts) * 1e3:.0f} ms, longest {ttfts[-1] * 1e3:.0f} ms",
    ])  # fmt: skip


def plot(paths: Sequence[str], out: str) -> None:
    """One column a run: requests, replicas and nodes, time to first token."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.2 * len(paths), 6.2), layout="constrained")
    columns = figure.subplots(3, len(paths), sharex="col", squeeze=False).T
    for axes, path in zip(columns, paths, strict=True):
        result = json.loads(Path(path).read_text())
        samples, good = result["samples"], [each for each in result["requests"] if each.get("is_right")]
        at_s = [each["at_s"] for each in samples]
        running = [each["running"] for each in samples]
        both = [each["running"] + each["waiting"] for each in samples]
        axes[0].fill_between(at_s, running, both, step="post", color="#e08214", alpha=0.5, label="wait", linewidth=0)
        axes[0].fill_between(at_s, running, step="post", color="#2166ac", alpha=0.6, label="run", linewidth=0)
        axes[0].set_ylabel("requests")
        count = f"{len(good)} of {len(result['requests'])} right"
        axes[0].set_title(f"{result['lowest']} to {HIGHEST} replicas: {count}", fontsize=10, loc="left")
        nodes, replicas = ([each[name] for each in samples] for name in ("nodes", "replicas"))
        axes[1].step(at_s, nodes, where="post", color="#7f7f7f", linestyle="--", label="nodes of Ray")
        axes[1].step(at_s, replicas, where="post", color="#2166ac", linewidth=2, label="replicas that serve")
        axes[1].set_ylim(0, HIGHEST + 0.5)
        axes[1].yaxis.set_major_locator(MaxNLocator(integer=True))
        sent_s = [each["sent_s"] for each in good]
        axes[2].scatter(sent_s, [each["first_s"] - each["sent_s"] for each in good], s=8, color="#2166ac",
                        linewidths=0, label="one request, where it was sent")  # fmt: skip
        axes[2].set_ylabel("time to first token (s)")
        axes[2].set_xlabel("time (s)")
        for each in axes:
            each.grid(alpha=0.3)
            each.set_xlim(0, at_s[-1])
            each.set_ylim(bottom=0)
            each.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="serve, drive, write samples")
    running.add_argument("--lowest", type=int, choices=(0, 1), default=1, help="fewest replicas")
    running.add_argument("--rate", type=float, default=3.0, help="requests a second in the burst")
    running.add_argument("--burst-s", type=float, default=45.0)
    running.add_argument("--tokens", type=int, default=200, help="of every answer")
    running.add_argument("--downscale-s", type=float, default=4.0)
    running.add_argument("--quiet-s", type=float, default=60.0, help="how long replicas and nodes may take to go")
    running.add_argument("--out", required=True)
    running.set_defaults(work=run)
    drawing = commands.add_parser("plot", help="draw what was written")
    drawing.add_argument("runs", nargs="+")
    drawing.add_argument("--out", required=True, help="PNG or SVG")
    drawing.set_defaults(work=lambda args: plot(args.runs, args.out))
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
