"""`manta run-batch` as a user runs it: with a model of its own, and by a running server."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import DEMO_MODEL, ServerProcess, processes_with_tag

QUESTIONS = ["How many users are there?", "List all names.", "Who is the oldest?"]


def write_requests(path: Path) -> None:
    lines: list[Any] = [
        {
            "custom_id": f"chat-{index}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 12},
        }
        for index, question in enumerate(QUESTIONS)
    ]
    lines.append({"custom_id": "text", "url": "/v1/completions", "body": {"prompt": "SELECT", "temperature": 0}})
    lines.append({"custom_id": "bad", "url": "/v1/completions", "body": {"prompt": "SELECT", "max_tokens": -1}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_batch(*words: str) -> subprocess.CompletedProcess[str]:
    tag = uuid.uuid4().hex
    done = subprocess.run(
        [sys.executable, "-m", "manta.cluster.cli.main", "run-batch", *words],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"MANTA_TEST_TAG": tag},
    )
    assert processes_with_tag(tag) == {}, "left behind"
    return done


def answers(path: Path) -> dict[str, Any]:
    """By custom_id: the text of the answer, or the status of a refusal."""
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        value = json.loads(line)
        response = value["response"]
        if response["status_code"] != 200:
            found[value["custom_id"]] = response["status_code"]
            continue
        (choice,) = response["body"]["choices"]
        found[value["custom_id"]] = choice["text"] if "text" in choice else choice["message"]["content"]
    return found


@pytest.mark.timeout(240)
def test_both_ways_give_the_servers_answers(server: ServerProcess, tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    write_requests(requests)
    with_model = run_batch(
        "-i", str(requests), "-o", str(tmp_path / "own.jsonl"), "--model", str(DEMO_MODEL), "--dtype", "float32",
        "--kv-cache-memory-bytes", "64MiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "256",
    )  # fmt: skip
    assert with_model.returncode == 0, with_model.stderr
    assert "4 answered, 1 refused, 0 failed" in with_model.stderr
    by_server = run_batch("-i", str(requests), "-o", str(tmp_path / "url.jsonl"), "--url", server.url)
    assert by_server.returncode == 0, by_server.stderr
    own = answers(tmp_path / "own.jsonl")
    assert own == answers(tmp_path / "url.jsonl")
    assert own["bad"] == 400
    asked = {"messages": [{"role": "user", "content": QUESTIONS[1]}], "temperature": 0, "max_tokens": 12}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).json()
    assert own["chat-1"] == answer["choices"][0]["message"]["content"]


WRONG = [
    (["--model", "m"], "-i"),
    (["-i", "IN", "-o", "OUT"], "--model"),
    (["-i", "IN", "-o", "OUT", "--model", "m", "--url", "http://x"], "--url"),
    (["-i", "missing.jsonl", "-o", "OUT", "--model", "m"], "missing.jsonl"),
    (["-i", "IN", "-o", "IN", "--url", "http://x"], "output-file"),
    (["-i", "IN", "-o", "OUT", "--url", "x"], "--url"),
    (["-i", "IN", "-o", "OUT", "--url", "http://x", "--dtype", "float32"], "--dtype"),
    (["-i", "IN", "-o", "OUT", "--model", "m", "--max-num-sequences", "3"], "--max-num-seqs"),
    (["-i", "IN", "-o", "OUT", "--model", "/no/such/model"], "/no/such/model"),
]


@pytest.mark.parametrize(("words", "named"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_usage_is_one_sentence(words: list[str], named: str, tmp_path: Path) -> None:
    write_requests(tmp_path / "in.jsonl")
    places = {"IN": str(tmp_path / "in.jsonl"), "OUT": str(tmp_path / "out.jsonl")}
    (tmp_path / "out.jsonl").write_text("earlier answers")
    done = run_batch(*[places.get(word, word) for word in words])
    assert done.returncode == 2
    assert (tmp_path / "out.jsonl").read_text() == "earlier answers"
    assert named in done.stderr
    assert "Traceback" not in done.stderr
