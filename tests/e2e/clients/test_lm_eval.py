"""lm-eval with the completions endpoint, against lm-eval with transformers on the same checkpoint: equal
log-likelihoods and texts, of a task that this test writes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import DEMO_MODEL, ServerProcess

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra clients is not installed"),
    pytest.mark.timeout(600),
]
_TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}{{choices[gold]}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "tiny_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{choices[gold]}}",
        # As many as the model's own default: lm-eval's transformers do not go below it.
        "generation_kwargs": {"until": [" WHERE", "\n"], "max_gen_toks": 128, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> None:
    docs = []
    for number, table in enumerate(["users", "pets", "employees", "orders"]):
        question = f"CREATE TABLE {table} (id INTEGER, name TEXT, age INTEGER);\nHow many {table} are there?"
        texts = [f" SELECT COUNT(*) FROM {table}", f" SELECT * FROM {table}", f" SELECT name FROM {table}"]
        gold = number % 3
        docs.append({"q": question, "choices": texts[-gold:] + texts[:-gold] if gold else texts, "gold": gold})
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for name, fields in _TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
            "test_split": "test",
            "num_fewshot": 0,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task | fields))  # JSON is YAML


def evaluate(folder: Path, name: str, *words: str) -> dict[tuple[str, int], list[Any]]:
    """(task, document) -> the responses, from the samples that lm-eval logs."""
    out = folder / name
    command = [sys.executable, "-m", "lm_eval", "run", *words, "--include_path", str(folder)]
    command += ["--tasks", ",".join(_TASKS), "--output_path", str(out), "--log_samples"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for path in out.rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            found[task, sample["doc_id"]] = sample["filtered_resps"]
    return found


def test_as_transformers(server: ServerProcess, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    expected = evaluate(
        tmp_path, "hf", "--model", "hf", "--device", "cpu", "--model_args", f"pretrained={DEMO_MODEL},dtype=float32"
    )
    fields = f"model=text2sql,base_url={server.url}/v1/completions,tokenizer={DEMO_MODEL},max_length=2048,max_retries=1"
    ways = {"concurrent": (f"{fields},num_concurrent=4", "1"), "texts": (f"{fields},tokenized_requests=False", "4")}
    for name, (arguments, batch_size) in ways.items():
        words = ("--model", "local-completions", "--model_args", arguments, "--batch_size", batch_size)
        found = evaluate(tmp_path, name, *words)
        assert found.keys() == expected.keys()
        assert len(found) == 12
        for key, responses in found.items():
            if key[0] == "tiny_generate":
                assert responses == expected[key], (name, key)
                continue
            for ours, theirs in zip(responses, expected[key], strict=True):
                mine, other = (ours, theirs) if isinstance(ours, list) else ([ours], [theirs])
                assert float(mine[0]) == pytest.approx(float(other[0]), abs=1e-3), (name, key)
                assert mine[1:] == other[1:], "whether the text is what the model would have written"
