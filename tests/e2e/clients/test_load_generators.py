"""Public load generators, each in an environment of its own that has it on the PATH: every request succeeds, and the
numbers of tokens are those asked for."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.server import DEMO_MODEL, ServerProcess

_NUM_REQUESTS, _OUTPUT_LEN = 12, 9


def run(*words: str, cwd: Path) -> str:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("guidellm") is None, reason="the command guidellm is missing")
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm(server: ServerProcess, tmp_path: Path, path: str) -> None:
    run(
        "guidellm", "run", "--disable-console",
        "--backend", f"kind=openai_http,target={server.url},request_format={path}",
        "--profile", "kind=concurrent,streams=3",
        "--constraint", f"kind=max_requests,count={_NUM_REQUESTS}",
        "--tokenizer", f"kind=huggingface_auto,model={DEMO_MODEL}",
        "--data", f"kind=synthetic_text,prompt_tokens=20,output_tokens={_OUTPUT_LEN}",
        "--output", "kind=json,path=report.json",
        cwd=tmp_path,
    )  # fmt: skip
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), requests["errored"]) == (_NUM_REQUESTS, [])
    assert {request["output_metrics"]["text_tokens"] for request in requests["successful"]} == {_OUTPUT_LEN}


@pytest.mark.skipif(shutil.which("vllm") is None, reason="the command vllm is missing")
@pytest.mark.parametrize(("backend", "path"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")])
def test_vllm_bench_serve(server: ServerProcess, tmp_path: Path, backend: str, path: str) -> None:
    printed = run(
        "vllm", "bench", "serve", "--backend", backend, "--base-url", server.url, "--endpoint", path,
        "--model", "text2sql", "--tokenizer", str(DEMO_MODEL), "--dataset-name", "random",
        "--random-input-len", "20", "--random-output-len", str(_OUTPUT_LEN), "--num-prompts", str(_NUM_REQUESTS),
        "--ignore-eos", "--temperature", "0.5",
        cwd=tmp_path,
    )  # fmt: skip
    assert re.search(rf"Successful requests: +{_NUM_REQUESTS}\b", printed), printed
    assert re.search(r"Failed requests: +0\b", printed), printed
    assert re.search(rf"Total generated tokens: +{_NUM_REQUESTS * _OUTPUT_LEN}\b", printed), printed
