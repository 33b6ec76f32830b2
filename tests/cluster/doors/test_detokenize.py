"""Incremental detokenization, against decoding all tokens at once."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from manta.cluster.doors.detokenize import WindowDetokenizer, new_detokenizer
from manta.cluster.doors.text import Tokenizer
from tests.support.small_tokenizers import VOCAB_SIZE, byte_fallback, byte_level

BYTES = Tokenizer(byte_level())
PIECES = Tokenizer(byte_fallback())
DEMO_MODEL = Path(__file__).parents[3] / "examples" / "text2sql" / "model"
TEXTS = st.text(st.sampled_from("helo wrd,.!?HW你好🙂ß👩‍\n"), max_size=30)


def run(detokenizer: object, token_ids: list[int]) -> list[str]:
    deltas = [detokenizer.push(token) for token in token_ids]  # type: ignore[attr-defined]
    return [*deltas, detokenizer.flush()]  # type: ignore[attr-defined]


@given(st.lists(st.integers(0, VOCAB_SIZE + 3), max_size=40), st.booleans())
def test_deltas_of_random_tokens_join_to_the_decoding_of_all(token_ids: list[int], skip: bool) -> None:
    deltas = run(new_detokenizer(BYTES, skip), token_ids)
    assert "".join(deltas) == BYTES.hf.decode(token_ids, skip_special_tokens=skip)


@given(TEXTS)
def test_a_character_is_never_cut(text: str) -> None:
    token_ids = BYTES.encode(text, add_special_tokens=False)
    deltas = run(new_detokenizer(BYTES), token_ids)
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)


@given(TEXTS)
def test_byte_fallback_never_cuts_a_character(text: str) -> None:
    token_ids = PIECES.encode(text, add_special_tokens=False)
    deltas = run(new_detokenizer(PIECES), token_ids)
    assert "".join(deltas) == text == PIECES.hf.decode(token_ids)
    assert not any("\ufffd" in delta for delta in deltas)


@given(TEXTS, TEXTS)
def test_output_continues_the_prompt(prompt: str, text: str) -> None:
    """A word that begins with a space keeps it, though the decoder strips the first space of a text."""
    tokens = PIECES.encode(f"{prompt}w w{text}", add_special_tokens=False)
    cut = len(PIECES.encode(f"{prompt}w", add_special_tokens=False))
    deltas = run(new_detokenizer(PIECES, prompt_token_ids=tokens[:cut]), tokens[cut:])
    assert "".join(deltas) == f" w{text}"


def test_the_window_detokenizer_agrees_on_byte_level_text() -> None:
    text = "Bitte schön 你好🙂 how are you 👩‍👩‍👧"
    token_ids = BYTES.encode(text, add_special_tokens=False)
    assert "".join(run(WindowDetokenizer(BYTES, BYTES.special_ids, []), token_ids)) == text


def test_invalid_bytes_go_out_after_a_bounded_number_of_tokens() -> None:
    lone_byte = PIECES.hf.convert_tokens_to_ids("<0xFF>")
    detokenizer = new_detokenizer(PIECES)
    deltas = [detokenizer.push(lone_byte) for _ in range(64)]
    assert "".join(deltas).count("\ufffd") >= 48
    assert len(detokenizer._window) <= 32  # type: ignore[attr-defined]


def test_skipped_special_tokens_do_not_pile_up() -> None:
    detokenizer = new_detokenizer(PIECES)
    assert all(detokenizer.push(2) == "" for _ in range(100))
    assert detokenizer._window == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES])
def test_special_tokens_that_are_to_be_seen(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.hf.convert_tokens_to_ids(["<s>", "</s>"])
    word = tokenizer.encode("hello", add_special_tokens=False)
    token_ids = [start, *word, end, *word, start]
    deltas = run(new_detokenizer(tokenizer, True, [*word, start], frozenset({"</s>", "[TOOL_CALLS]"})), token_ids)
    first, second = "".join(deltas).split("</s>")
    assert first.strip() == second.strip() == "hello"
    assert "".join(run(new_detokenizer(tokenizer), token_ids)) == tokenizer.decode(token_ids, True)


@pytest.mark.skipif(not (DEMO_MODEL / "tokenizer.json").is_file(), reason="the demo model is not trained")
@settings(deadline=None)
@given(st.data())
def test_demo_model_tokenizer(data: st.DataObject) -> None:
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(DEMO_MODEL))
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer.hf) - 1), max_size=30))
    deltas = run(new_detokenizer(tokenizer, False), token_ids)
    assert "".join(deltas) == tokenizer.hf.decode(token_ids)
