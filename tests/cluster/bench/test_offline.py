"""`manta bench throughput` and `manta bench latency` with real workers on a tiny checkpoint."""

import json
import re
from pathlib import Path

import pytest

from manta.cluster.cli.main import main
from tests.support.checkpoints import make_checkpoint
from tests.support.small_tokenizers import VOCAB_SIZE, write_model_folder

ENGINE = ["--dtype", "float32", "--device", "cpu", "--block-size", "8", "--max-num-seqs", "8", "--disable-tqdm"]
ENGINE += ["--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", "4MiB"]
NUMBER = r"\d+\.\d+"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    return make_checkpoint(folder, "llama", vocab_size=VOCAB_SIZE, eos_token_id=1)


def bench(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_throughput(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    words = ["--model", str(folder), "--input-len", "20", "--output-len", "6", "--num-prompts", "10", "--n", "2"]
    words += ["--num-warmups", "3"]
    assert bench("throughput", *words, *ENGINE, "--random-prefix-len", "16", "--output-json", str(file)) == 0
    out = capsys.readouterr().out
    line = rf"^Throughput: ({NUMBER}) requests/s, ({NUMBER}) total tokens/s, ({NUMBER}) output tokens/s$"
    found = re.search(line, out, re.MULTILINE)
    assert found, out
    requests, total, output = map(float, found.groups())
    figures = json.loads(file.read_text())
    assert figures["num_requests"] == 10
    assert figures["total_output_tokens"] == 10 * 2 * 6
    assert figures["total_num_tokens"] == 10 * 36 + 10 * 2 * 6
    assert figures["num_cached_tokens"] >= 16, "the prefix of 16 tokens is two blocks that prompts share"
    elapsed_s = figures["elapsed_time"]
    assert (requests, total, output) == pytest.approx((10 / elapsed_s, 480 / elapsed_s, 120 / elapsed_s), abs=0.01)


def test_latency(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    words = [
        "--input-len",
        "9",
        "--output-len",
        "4",
        "--batch-size",
        "3",
        "--num-iters",
        "3",
        "--num-iters-warmup",
        "1",
    ]
    assert bench("latency", "--model", str(folder), *words, *ENGINE, "--output-json", str(file)) == 0
    out = capsys.readouterr().out
    average = re.search(rf"^Avg latency: ({NUMBER}) seconds$", out, re.MULTILINE)
    assert average, out
    named = re.findall(rf"^(\d+)% percentile latency: ({NUMBER}) seconds$", out, re.MULTILINE)
    assert [int(percentage) for percentage, _ in named] == [10, 25, 50, 75, 90, 99]
    figures = json.loads(file.read_text())
    latencies_s = sorted(figures["latencies"])
    assert len(latencies_s) == 3
    assert float(average.group(1)) == figures["avg_latency"] == pytest.approx(sum(latencies_s) / 3)
    assert dict(named)["50"] == str(latencies_s[1])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--model"]),
        (["--model", "/no/such/folder"], ["/no/such/folder"]),
        (["--model", "FOLDER", "--max-num-seq", "4"], ["--max-num-seq", "did you mean --max-num-seqs?"]),
        (["--model", "FOLDER", "--max-num-seqs", "many"], ["--max-num-seqs", "'many'"]),
        (["--model", "FOLDER", "--block-size", "24"], ["power of two"]),
        (["--model", "FOLDER", "--input-len", "8", "--n", "200"], ["--n", "128", "200"]),
        (["--model", "FOLDER", "--temperature", "-1"], ["--temperature", "-1.0"]),
        (["--model", "FOLDER", "--output-json", "/no/such/folder/a.json"], ["--output-json", "/no/such/folder"]),
    ],
)
@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_mistakes_are_one_sentence(
    command: str, words: list[str], parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(command, *(str(folder) if word == "FOLDER" else word for word in words)) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_lengths_beyond_the_model(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(command, "--model", str(folder), "--input-len", "600", "--output-len", "9") == 2
    assert "600 input and 9 output tokens does not fit the model's 512" in capsys.readouterr().err


def test_commands_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--help") == 0
    assert bench() == 2
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in ("serve", "throughput", "latency"))
    assert bench("sevre") == 2
    assert "there are: serve, throughput, latency" in capsys.readouterr().err
    assert bench("latency", "--help") == 0
    text = capsys.readouterr().out
    for part in ("--num-iters-warmup", "KV cache:", "--tensor-parallel-size", "-tp", "(default: off)"):
        assert part in text
    assert "--port" not in text
