"""From token chunks to deltas: stop tokens, stop strings over token borders, min_tokens."""

from typing import Any

import pytest

from manta.cluster.doors.output import Delta, OutputText
from manta.cluster.doors.text import Tokenizer
from manta.cluster.engine.client import TokenChunk
from manta.configs.sampling import SamplingParams
from tests.support.small_tokenizers import byte_level

TOKENIZER = Tokenizer(byte_level())
EOS = 1


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def run(chunks: list[TokenChunk], **sampling: Any) -> list[Delta]:
    output = OutputText(TOKENIZER, SamplingParams(**sampling))
    deltas = []
    for chunk in chunks:
        deltas.append(output.push(chunk))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def one_by_one(text: str, reason: str = "length") -> list[TokenChunk]:
    chunks = [TokenChunk([token]) for token in ids(text)]
    chunks[-1].finish_reason = reason
    return chunks


@pytest.mark.parametrize("per_chunk", [1, 3, 100])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_over_token_borders(per_chunk: int, include: bool) -> None:
    tokens = ids("The quick brown fox jumps over")
    chunks = [TokenChunk(tokens[start : start + per_chunk]) for start in range(0, len(tokens), per_chunk)]
    chunks[-1].finish_reason = "length"
    deltas = run(chunks, stop=["ick bro"], include_stop_str_in_output=include)
    assert "".join(delta.text for delta in deltas) == ("The quick bro" if include else "The qu")
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "ick bro")
    used = [token for delta in deltas for token in delta.token_ids]
    assert used == tokens[: len(used)]
    assert "ick bro" in TOKENIZER.decode(used)
    assert "ick bro" not in TOKENIZER.decode(used[:-1])


def test_held_back_text_goes_out_at_the_end() -> None:
    deltas = run(one_by_one("Hello wor"), stop=["world"])
    assert "".join(delta.text for delta in deltas) == "Hello wor"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("length", None)


@pytest.mark.parametrize(("include", "text"), [(False, "Hello"), (True, "Hello</s>")])
def test_stop_token_is_counted_but_not_written(include: bool, text: str) -> None:
    chunks = [TokenChunk(ids("Hello")), TokenChunk([EOS], "stop", EOS)]
    deltas = run(chunks, include_stop_str_in_output=include, skip_special_tokens=False)
    assert "".join(delta.text for delta in deltas) == text
    assert deltas[-1].token_ids == [EOS]
    assert deltas[-1].stop_reason is None  # the model's own end, not asked for


def test_stop_token_of_the_request_is_the_stop_reason() -> None:
    world = ids(" world")[-1]
    deltas = run([TokenChunk([*ids("Hello"), world], "stop", world)], stop_token_ids=[world])
    assert deltas[-1].stop_reason == world
    assert deltas[-1].text == "Hello"


def test_incomplete_character_at_the_end_is_written_as_replacement() -> None:
    tokens = ids("🚀🚀")
    assert len(tokens) > 2
    deltas = run([TokenChunk(tokens[:-1], "length")])
    assert deltas[-1].text.endswith("\ufffd")


def test_min_tokens_keeps_stop_strings_from_counting() -> None:
    tokens = ids("a b a b")
    deltas = run([TokenChunk([token]) for token in tokens[:-1]] + [TokenChunk(tokens[-1:], "length")],
                 stop=["a"], min_tokens=2)  # fmt: skip
    text = "".join(delta.text for delta in deltas)
    assert text.startswith("a")
    assert deltas[-1].finish_reason == "stop"
    assert len([token for delta in deltas for token in delta.token_ids]) > 2
