"""`manta bench serve` against the real server: its figures agree with what the server counts."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import ROOT, ServerProcess

MOONCAKE = [[0, 1], [0, 1, 2], [3], [0, 1, 2, 4]]  # blocks of 512 tokens


def _bench(server: ServerProcess, file: Path, *words: str) -> tuple[str, dict[str, Any]]:
    """What it printed, and the figures it wrote."""
    command = [sys.executable, "-m", "manta.cluster.cli.main", "bench", "serve", "--base-url", server.url]
    words = (
        *words,
        "--save-result",
        "--save-detailed",
        "--result-dir",
        str(file.parent),
        "--result-filename",
        file.name,
    )
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def _counted(server: ServerProcess) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").text
    names = ("prompt_tokens_total", "generation_tokens_total", "prefix_cache_hits_total")
    return {
        name: sum(float(line.split()[-1]) for line in re.findall(rf"^vllm:{name}.*$", text, re.MULTILINE))
        for name in names
    }


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_figures_agree_with_the_server(server: ServerProcess, tmp_path: Path, backend: str) -> None:
    before = _counted(server)
    words = [
        "--random-input-len",
        "40",
        "--random-output-len",
        "12",
        "--random-range-ratio",
        "0.5",
        "--num-prompts",
        "24",
    ]
    out, figures = _bench(server, tmp_path / "a.json", "--backend", backend, *words, "--request-rate", "100")
    after = _counted(server)
    assert figures["completed"] == 24
    assert figures["failed"] == 0
    assert f"Total generated tokens:                  {figures['total_output_tokens']}" in out
    assert set(figures["output_lens"]) <= set(range(6, 19))
    assert sum(figures["output_lens"]) == figures["total_output_tokens"]
    # One more request of one output token tried how prompts can be sent.
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == figures["total_output_tokens"] + 1
    tried = after["prompt_tokens_total"] - before["prompt_tokens_total"] - figures["total_input_tokens"]
    assert 0 < tried < 20
    if backend == "openai":
        assert set(figures["input_lens"]) <= set(range(20, 61))
    for start_s, ttft_s, latency_s, gaps_s in zip(
        figures["start_times"], figures["ttfts"], figures["latencies"], figures["itls"], strict=True
    ):
        assert 0 <= start_s <= figures["duration"]
        assert 0 < ttft_s <= latency_s
        assert ttft_s + sum(gaps_s) <= latency_s + 1e-6


def test_a_trace_shares_its_prefixes(server: ServerProcess, tmp_path: Path) -> None:
    """Blocks of equal hash ids are found in the prefix cache, and no others."""
    lines = [{"timestamp": 0, "input_length": 512 * len(ids), "output_length": 2, "hash_ids": ids} for ids in MOONCAKE]
    trace = tmp_path / "mooncake.jsonl"
    trace.write_text("\n".join(map(json.dumps, lines)))
    words = ["--dataset-name", "trace", "--dataset-path", str(trace), "--trace-length-scale", "0.125", "--seed", "77"]
    before = _counted(server)
    _, figures = _bench(server, tmp_path / "a.json", *words, "--max-concurrency", "1")
    assert figures["input_lens"] == [64 * len(ids) for ids in MOONCAKE]
    # The second request finds the two blocks of the first, the fourth the three of the second. Every prompt is a whole
    # number of KV blocks, and the last token of a prompt is always computed.
    assert figures["total_cached_tokens"] == 64 * (2 + 3)
    assert _counted(server)["prefix_cache_hits_total"] - before["prefix_cache_hits_total"] == 64 * (2 + 3)
