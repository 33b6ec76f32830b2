"""Every text that a model of random weights writes under a constraint is one that the constraint allows: schemas
against jsonschema, regular expressions against Python's own."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manta import LLM, SamplingParams, StructuredOutputsParams
from manta.cluster.engine.outputs import CompletionOutput
from manta.cluster.engine.types import InvalidRequestError
from tests.support.checkpoints import make_checkpoint
from tests.support.small_tokenizers import TEXTS, VOCAB_SIZE, byte_fallback, write_model_folder

pytest.importorskip("xgrammar", reason="the extra structured is not installed")
FIELDS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": 8, "max_num_seqs": 8}
MAX_TOKENS = 300
PROMPT = TEXTS[0]
REGEXES = [
    r"\d{1,3}(\.\d{1,3}){3}",
    r"[A-Z][a-z]{2,5} (yes|no)?!+",
    r"(ä|ö|ü|🙂){2,4}",
    r"a{0,3}b|[^a-y ]{3}",
    r"\w{2}\s\w",
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Few blocks: sequences are preempted and come back."""
    torch.set_num_threads(1)
    folder = make_checkpoint(
        write_model_folder(tmp_path_factory.mktemp("model")), "llama", vocab_size=VOCAB_SIZE, eos_token_id=1
    )
    with LLM(str(folder), num_gpu_blocks_override=64, max_num_batched_tokens=24, **FIELDS) as llm:
        yield llm


def generate(llm: LLM, asked: list[SamplingParams]) -> list[CompletionOutput]:
    return [each.outputs[0] for each in llm.generate([PROMPT] * len(asked), asked, use_tqdm=False)]


def params(constraint: dict[str, Any], **fields: Any) -> SamplingParams:
    given = {"temperature": 1.0, "max_tokens": MAX_TOKENS, "structured_outputs": constraint}
    return SamplingParams.model_validate(given | fields)


def bounded(low: str, high: str, numbers: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, int]]:
    """Any of a lower and an upper bound."""
    return st.fixed_dictionaries({}, optional={low: numbers, high: numbers.map(lambda number: number + 41)})


NAMES = st.sampled_from(["a", "name", "größe", 'q"uote', "back\\slash", "🙂"])
LEAVES = st.one_of(
    bounded("minimum", "maximum", st.integers(-20, 20)).map(lambda bounds: {"type": "integer"} | bounds),
    st.integers(0, 3).map(lambda low: {"type": "string", "minLength": low, "maxLength": low + 6}),
    st.sampled_from(["^[a-c]{2,4}$", "^(x|yz)?[0-9]$"]).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.lists(st.sampled_from(["red", "größe", 'a"b', 7, None, True]), min_size=1, max_size=3, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from([{"type": "boolean"}, {"type": ["null", "boolean"]}, {"const": {"a": [1]}}]),
    st.sampled_from([{"type": "string", "format": "date"}, {"type": "number", "minimum": 0, "maximum": 1}]),
)


def arrays(items: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(items, st.integers(0, 2)).map(
        lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": pair[1] + 2}
    )


def objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], flags: list[bool]) -> dict[str, Any]:
        required = [name for name, flag in zip(properties, flags, strict=False) if flag]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(build, st.dictionaries(NAMES, values, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3))


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        arrays(inner), objects(inner), st.lists(inner, min_size=1, max_size=2).map(lambda either: {"anyOf": either})
    ),
    max_leaves=5,
)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(schemas=st.lists(SCHEMAS, min_size=6, max_size=10), seed=st.integers(0, 2**32))
def test_outputs_are_valid_under_their_schemas(llm: LLM, schemas: list[dict[str, Any]], seed: int) -> None:
    outputs = generate(llm, [params({"json": schema}, seed=seed + i) for i, schema in enumerate(schemas)])
    num_ended = 0
    for schema, output in zip(schemas, outputs, strict=True):
        if output.finish_reason == "length":
            assert len(output.token_ids) == MAX_TOKENS
            continue
        num_ended += 1
        jsonschema.validate(json.loads(output.text), schema)
    assert num_ended > len(schemas) // 2


def test_regexes_choices_and_grammars_with_neighbours(llm: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    alone = generate(llm, [free])[0]
    expression = 'root ::= term ("+" term)*\nterm ::= [0-9] | "(" root ")"'
    choices = ["red", "green", "größer 🙂", 'a "quoted"\nline']
    asked = [params({"regex": regex}, seed=i) for i, regex in enumerate(REGEXES * 2)]
    asked += [params({"choice": choices}, seed=i, top_k=3) for i in range(4)]
    asked += [params({"grammar": expression}, seed=i, min_tokens=4) for i in range(3)]
    asked += [params({"json_object": True}, seed=i) for i in range(3)]
    outputs = generate(llm, [free, *asked, free])
    assert outputs[0].token_ids == outputs[-1].token_ids == alone.token_ids
    for sampling, output in zip(asked, outputs[1:-1], strict=True):
        constraint = sampling.structured_outputs
        assert constraint is not None
        if output.finish_reason == "length":
            assert constraint.json_object or constraint.grammar, output.text
        elif constraint.regex:
            assert re.fullmatch(constraint.regex, output.text), (constraint.regex, output.text)
        elif constraint.choice:
            assert output.text in choices
        elif constraint.json_object:
            assert isinstance(json.loads(output.text), dict)
        else:
            assert len(output.token_ids) >= 4
            assert isinstance(eval(output.text.lstrip("0") or "0"), int) or re.fullmatch(r"[0-9+()]+", output.text)


def test_preempted_sequences_go_on_in_their_grammars(llm: LLM) -> None:
    """The pool holds a few of them at a time."""
    before = preemptions(llm)
    outputs = generate(llm, [params({"regex": "([a-z]{3},){20,30}"}, seed=i, min_tokens=70) for i in range(8)])
    assert preemptions(llm) > before
    for output in outputs:
        assert re.fullmatch("([a-z]{3},){20,30}" if output.finish_reason == "stop" else "[a-z,]*", output.text)


def preemptions(llm: LLM) -> float:
    found = re.search(r"^vllm:num_preemptions_total{[^}]*} (\S+)$", llm.metrics_text().decode(), re.MULTILINE)
    assert found, llm.metrics_text()
    return float(found.group(1))


def test_the_end_of_a_text(llm: LLM) -> None:
    choice = {"choice": ["yes"]}
    ended, early, late, whole, cut, stopped = generate(
        llm,
        [
            params(choice),
            params(choice, max_tokens=2),
            params(choice, min_tokens=12),
            params(choice, ignore_eos=True, max_tokens=9),
            params({"choice": ["yes, indeed"]}, stop=["s,"]),
            params({"regex": "x*"}, stop_token_ids=[llm.get_tokenizer().encode("x", add_special_tokens=False)[0]]),
        ],
    )
    assert (ended.text, ended.finish_reason) == ("yes", "stop")
    assert early.finish_reason == "length"
    assert "yes".startswith(early.text)
    assert (late.text, late.finish_reason, len(late.token_ids)) == ("yes", "stop", 12)
    assert (whole.text, whole.finish_reason, len(whole.token_ids)) == ("yes", "length", 9)
    assert (cut.text, cut.finish_reason, cut.stop_reason) == ("ye", "stop", "s,")
    assert stopped.finish_reason == "stop"


def test_log_probabilities_are_those_of_the_model(llm: LLM) -> None:
    """Of the same first token with and without a constraint."""
    constrained, free = generate(
        llm,
        [params({"choice": ["no"]}, logprobs=5), SamplingParams(temperature=0.0, max_tokens=1, logprobs=5)],
    )
    assert constrained.logprobs is not None
    assert free.logprobs is not None
    best = dict(list(constrained.logprobs[0].items())[-5:])
    assert {token: one.logprob for token, one in best.items()} == pytest.approx(
        {token: one.logprob for token, one in free.logprobs[0].items()}, abs=1e-4
    )


def test_a_bad_grammar_is_an_error(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="parenthesis"):
        generate(llm, [SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))])
    assert generate(llm, [params({"choice": ["yes"]})])[0].text == "yes"


def test_stages_and_byte_fallback(tmp_path: Path) -> None:
    """A vocabulary of another kind, whose words begin with U+2581; the last stage alone follows grammars."""
    tokenizer = byte_fallback()
    folder = make_checkpoint(tmp_path, "llama", vocab_size=len(tokenizer.get_vocab()) + 5, eos_token_id=2)
    tokenizer.save_pretrained(folder)
    asked = [params({"regex": regex}, seed=i) for i, regex in enumerate(REGEXES)]
    with LLM(str(folder), pipeline_parallel_size=2, num_gpu_blocks_override=64, **FIELDS) as llm:
        for regex, output in zip(REGEXES, generate(llm, asked), strict=True):
            assert re.fullmatch(regex, output.text), (regex, output.text)
