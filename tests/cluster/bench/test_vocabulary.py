"""Text that has a wanted number of tokens, read by the tokenizer itself."""

from pathlib import Path

import numpy as np
import pytest

from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.vocabulary import PromptTokenizer, fit_text, load_prompt_tokenizer
from tests.support.server import DEMO_MODEL
from tests.support.small_tokenizers import SPECIAL_TOKENS, byte_fallback, write_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def demo() -> PromptTokenizer:
    return load_prompt_tokenizer(str(DEMO_MODEL))


def test_plain_ids_hold_no_special_token(folder: Path) -> None:
    tokenizer = load_prompt_tokenizer(str(folder))
    ids = tokenizer.plain_ids()
    text = tokenizer.decode(ids.tolist())
    assert len(ids) > 256
    assert not any(token in text for token in SPECIAL_TOKENS)


def test_a_folder_without_tokenizer_json_goes_through_transformers(tmp_path: Path) -> None:
    byte_fallback().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "other.json")
    with pytest.raises(BenchError, match="no tokenizer can be loaded"):
        load_prompt_tokenizer(str(tmp_path))
    with pytest.raises(BenchError, match="there is no tokenizer folder"):
        load_prompt_tokenizer(str(tmp_path / "missing"))


@pytest.mark.parametrize("length", [1, 7, 64, 513])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_text_has_the_wanted_length(demo: PromptTokenizer, length: int, add_special_tokens: bool) -> None:
    rng = np.random.default_rng(length)
    ids = demo.plain_ids()
    wrong = 0
    for _ in range(20):
        text, told = fit_text(demo, rng.choice(ids, length), ids, add_special_tokens, rng)
        read = len(demo.encode(text, add_special_tokens))
        assert told == read, "what is told is what a tokenizer reads"
        assert abs(read - length) <= 2
        wrong += read != length
    assert wrong <= 1


def test_equal_leading_ids_are_equal_leading_text(demo: PromptTokenizer) -> None:
    rng = np.random.default_rng(0)
    ids = demo.plain_ids()
    prefix = rng.choice(ids, 200)
    first, second = (
        demo.encode(fit_text(demo, np.concatenate([prefix, rng.choice(ids, 60)]), ids, True, rng)[0], True)
        for _ in range(2)
    )
    equal = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    # Reading the text again may change the number of tokens in the prefix, but hardly by a tenth.
    assert equal > 180
