"""The benchmarks around a device that is only a clock run from end to end, in a setting too small to tell anything."""

import os
import subprocess
import sys
import uuid

import pytest

from tests.support.bench_scripts import BENCH
from tests.support.server import DEMO_MODEL, processes_with_tag


def run(script: str, *words: str) -> str:
    tag = uuid.uuid4().hex
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"MANTA_TEST_TAG": tag},
    )
    assert done.returncode == 0, done.stderr
    assert processes_with_tag(tag) == {}, "left behind"
    return done.stdout


@pytest.mark.parametrize("words", [(), ("--grpc",)], ids=["links", "grpc"])
def test_dispatch(words: tuple[str, ...]) -> None:
    printed = run("dispatch.py", "--ranks", "2", "--step-ms", "5", "--running", "4", "--duration-s", "0.3", *words)
    rows = [line.split()[:4] for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert rows == [["1", "x", "2", "5"]]


@pytest.mark.parametrize("words", [(), ("--chat",)], ids=["completions", "chat"])
def test_token_path(words: tuple[str, ...]) -> None:
    arguments = ("--model", str(DEMO_MODEL), "--streams", "3", "--step-ms", "10", "--duration-s", "0.3")
    printed = run("token_path.py", *arguments, *words)
    assert "us" in printed
