"""ShareGPT files: which conversations are used, and how long their answers are."""

import json
from pathlib import Path

import pytest

from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.sharegpt import sharegpt_samples
from manta.cluster.bench.vocabulary import PromptTokenizer, load_prompt_tokenizer
from tests.support.small_tokenizers import write_model_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    return load_prompt_tokenizer(str(write_model_folder(tmp_path_factory.mktemp("model"))))


def _write(folder: Path, conversations: list[list[str]]) -> Path:
    file = folder / "sharegpt.json"
    entries = [{"id": str(i), "conversations": [{"from": "human", "value": text} for text in turns]}
               for i, turns in enumerate(conversations)]  # fmt: skip
    file.write_text(json.dumps([{"id": "none"}, *entries]))
    return file


def test_lengths_and_filters(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    fits = [["Hello world, how are you today?", "The quick brown fox jumps over the lazy dog.", "and on"],
            ["SELECT name, salary FROM employees", "WHERE salary > 100 ORDER BY name;"]]  # fmt: skip
    short_prompt, short_answer = ["a", fits[0][1]], [fits[0][0], "b"]
    long_prompt, too_long_together = ["x " * 1100, fits[0][1]], ["x " * 400, "y " * 900]
    alone = ["only one turn"]
    file = _write(tmp_path, [short_prompt, *fits, short_answer, alone, long_prompt, too_long_together])
    samples = sharegpt_samples(file, tokenizer, 2)
    assert {sample.text for sample in samples} == {fits[0][0], fits[1][0]}
    for sample in samples:
        answer = next(turns[1] for turns in fits if turns[0] == sample.text)
        assert sample.token_ids.tolist() == tokenizer.encode(sample.text or "", True)
        assert sample.output_len == len(tokenizer.encode(answer, True))
    again = sharegpt_samples(file, tokenizer, 5)
    assert [sample.text for sample in again] == [samples[i % 2].text for i in range(5)]
    with_len = sharegpt_samples(file, tokenizer, 4, output_len=3)
    assert {sample.output_len for sample in with_len} == {3}
    assert short_answer[0] in {sample.text for sample in with_len}, "a given length spares the check of the answer"


def test_seed_decides_the_order(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    file = _write(tmp_path, [[f"Hello world number {i}", "how are you today?"] for i in range(20)])
    orders = [[sample.text for sample in sharegpt_samples(file, tokenizer, 20, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert set(orders[0]) == set(orders[2])


@pytest.mark.parametrize(
    ("text", "part"), [("{", "not valid JSON"), ('{"a": 1}', "no ShareGPT file"), ("[]", "usable")]
)
def test_other_files(tmp_path: Path, tokenizer: PromptTokenizer, text: str, part: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(BenchError, match=part):
        sharegpt_samples(file, tokenizer, 1)
