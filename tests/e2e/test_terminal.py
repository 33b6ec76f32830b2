"""`manta chat`, `manta complete` and `manta top` against the real server, and the flags that the README names."""

import re
import subprocess
import sys

import pytest

from tests.support.server import ROOT, ServerProcess

QUESTION = "CREATE TABLE employees (id INTEGER, name TEXT, salary REAL);\nHow many employees are there?"


def _manta(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manta.cluster.cli.main", *words]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)


def test_chat(server: ServerProcess) -> None:
    url = f"{server.url}/v1"
    quick = _manta("chat", "--url", url, "--quick", QUESTION)
    assert quick.returncode == 0, quick.stderr
    assert "count(*)" in quick.stdout.lower()
    assert _manta("chat", "--url", url, text=QUESTION).stdout == quick.stdout


def test_complete(server: ServerProcess) -> None:
    done = _manta("complete", "--url", server.url, "--quick", "SELECT", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr


def test_top(server: ServerProcess) -> None:
    done = _manta("top", "--url", server.url, "--once")
    assert done.returncode == 0, done.stderr
    assert re.search(r"0 of \d+ blocks in use", done.stdout)


@pytest.mark.parametrize("words", [("chat", "--url"), ("complete", "--url"), ("top", "--once", "--url")])
def test_no_server_is_one_sentence(words: tuple[str, ...]) -> None:
    done = _manta(*words, "http://127.0.0.1:9/v1", text="hello")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no answer from http://127.0.0.1:9" in done.stderr


def test_server_errors_are_passed_on(server: ServerProcess) -> None:
    done = _manta("chat", "--url", f"{server.url}/v1", "--model", "gpt-9", "--quick", "hi")
    assert done.returncode == 2
    assert "404" in done.stderr
    assert "gpt-9" in done.stderr


def test_collect_env() -> None:
    done = _manta("collect-env")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout
    assert "CPU" in done.stdout


def _readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_flags_exist() -> None:
    """Every flag the README and the docs of this repository name is one that `manta serve` or its neighbours know."""
    known = set()
    for command in ("serve", "chat", "complete", "top", "bench serve", "bench throughput", "bench latency"):
        known |= set(re.findall(r"--[a-z][a-z-]+", _manta(*command.split(), "--help").stdout))
    lines = "".join(_readme_blocks("sh")).splitlines()
    ours = [line.rpartition("manta ")[2] for line in lines if "manta " in line]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(ours)))
    assert "--config" in named
    assert named <= known
