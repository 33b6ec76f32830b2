"""How good the shipped model is, measured through the server: its SQL is executed and the results compared."""

import subprocess
import sys

from tests.support.server import ROOT, ServerProcess


def test_execution_accuracy_on_held_out_questions(server: ServerProcess) -> None:
    command = [sys.executable, str(ROOT / "examples/text2sql/evaluate.py"), "--base-url", f"{server.url}/v1"]
    done = subprocess.run(
        [*command, "--count", "130", "--min-accuracy", "0.9"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
