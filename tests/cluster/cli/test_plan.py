"""`manta plan`: what it prints is what the plan says, what it advises fits, and mistakes are one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

from manta.cluster.cli.flags import UsageError, parse_serve_config
from manta.cluster.cli.main import main
from manta.cluster.cli.plan import plan
from manta.configs.memory_plan import plan_memory
from manta.configs.public_models import public_spec
from tests.support.server import DEMO_MODEL

GIB = 2**30


def _planned(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = plan([*words.split(), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_json_has_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    words = "meta-llama/Llama-3.1-405B-Instruct -tp 8 -pp 2 --max-model-len 32768"
    code, found = _planned(f"{words} --device-memory 96GiB", capsys)
    expected = plan_memory(parse_serve_config(words.split()), public_spec("meta-llama/Llama-3.1-405B"), 96 * GIB)
    assert code == 0
    assert found["fits"] is expected.fits is True
    assert [stage["weight_bytes"] for stage in found["stages"]] == [each.weight_bytes for each in expected.stages]
    assert found["num_gpus"] == 16
    assert found["num_blocks"] == expected.num_blocks
    assert found["sequences_per_replica"]["32768"] == expected.num_blocks * 16 // 32768
    assert found["sequences_per_replica"]["1024"] == 256
    assert "published shape of meta-llama/Llama-3.1-405B" in found["shape_from"]


@pytest.mark.parametrize(
    "words",
    [
        "meta-llama/Llama-3.1-70B --max-model-len 32768",
        "Qwen/Qwen3-32B --device-memory 40GiB --max-model-len 16384",
        "meta-llama/Llama-3.1-405B --device-memory 80GiB",
        "meta-llama/Llama-3.1-8B --max-model-len 131072 --device-memory 24GiB",
        "meta-llama/Llama-3.1-8B --kv-cache-memory-bytes 90GiB",
        "meta-llama/Llama-3.1-8B --gpu-memory-utilization 0.05 --device-memory 40GiB",
    ],
)
def test_every_flag_that_is_advised_makes_it_fit(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = _planned(words, capsys)
    assert code == 1
    assert not found["fits"]
    assert found["problem"]
    assert found["advice"]
    for change in found["advice"]:
        if change.startswith("no "):
            kept = words.split()
            index = kept.index(change.removeprefix("no "))
            again = " ".join(kept[:index] + kept[index + 2 :])
        else:
            again = f"{words} {change}"
        code, changed = _planned(again, capsys)
        assert (code, changed["fits"]) == (0, True), change


def test_text_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "meta-llama/Llama-3.1-70B", "--max-model-len", "32768"])
    assert ended.value.code == 1
    text = capsys.readouterr().out
    assert "fits         no: the weights and what steps need exceed what a GPU allows by" in text
    assert "change       --tensor-parallel-size 4" in text
    assert plan(["/nowhere/Llama-3.1-70B", "-tp", "8", "--max-model-len", "32768"]) == 0
    text = capsys.readouterr().out
    assert "fits         yes" in text
    assert "of 32768 tokens at once" in text


def test_a_file_and_flags_that_win_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"model: {DEMO_MODEL}\nmax-num-seqs: 8\n")
    code, found = _planned(f"{file} --max-num-seqs 9 --device-memory 8GiB", capsys)
    assert (code, found["max_num_seqs"]) == (0, 9)
    assert found["shape_from"] == f"{DEMO_MODEL}/config.json"
    assert _planned(f"-tp 1 {file} --device-memory 8GiB", capsys)[1]["max_num_seqs"] == 8
    assert _planned(f"--config {file} --device-memory 8GiB", capsys)[1]["max_num_seqs"] == 8


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ["name what to plan"]),
        ("--json", ["name what to plan"]),
        ("meta-llama/Llama-3.1-8B --device-memory lots", ["--device-memory", "'lots'", "80GiB"]),
        ("meta-llama/Llama-3.1-8B --device-memory 80", ["--device-memory", "less than 1GiB"]),
        ("meta-llama/Llama-3.1-8B --device cpu", ["device is cpu"]),
        ("meta-llama/Llama-3.1-8B -tp 3", ["--tensor-parallel-size 3", "32 attention heads"]),
        ("meta-llama/Llama-3.1-8B --wings", ["--wings"]),
        ("/no/such/model", ["'/no/such/model' does not exist", "Qwen/Qwen3-8B"]),
        ("a.yaml b.yml", ["b.yml is a second file"]),
        ("--config a.yaml b.yml", ["b.yml is a second file"]),
        ("missing.yaml", ["missing.yaml", "No such file"]),
    ],
)
def test_mistakes_are_one_sentence(words: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        plan(words.split())
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
