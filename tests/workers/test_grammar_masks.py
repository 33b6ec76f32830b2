"""Tokens that grammars allow, against a search through all texts of a finite language; in all forms of the sampler, and
in steps whose inputs the host or the device builds."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.configs.model import read_model_spec
from manta.configs.structured_outputs import StructuredOutputsParams
from manta.kernels import ops
from manta.protos.sampling_pb2 import Grammar, Sampling
from manta.protos.worker_pb2 import StepResult
from manta.workers import grammars as grammars_module
from manta.workers.columns import PlanError
from manta.workers.grammar_masks import apply_mask
from manta.workers.grammars import GrammarError, Grammars
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.sampler import Sampler
from manta.workers.sampling_table import SamplingTable
from manta.workers.slot_table import Rows
from manta.workers.token_table import TokenTable
from tests.support.checkpoints import make_checkpoint
from tests.support.gpu_like import BLOCK_SIZE, Recorder, gpu_like_runner, use_plain_torch
from tests.support.plans import Driver
from tests.workers.test_constraints import FORMS

xgrammar = pytest.importorskip("xgrammar", reason="the extra structured is not installed")

PIECES = ["", "", "", "a", "b", "c", "ab", "ba", "aab", "bb", "cab", "abc", "aaaa", "é", "cc"]  # 0 to 2 are special
VOCAB_SIZE = 131  # of the tiny checkpoints; ids without a piece only pad
END = 2
NUM_PROMPT_TOKENS = 10
CHOICES = st.lists(st.text("abcé", min_size=1, max_size=6), min_size=1, max_size=5)


def vocabulary() -> Any:
    tokens = PIECES + [""] * (VOCAB_SIZE - len(PIECES))
    return xgrammar.TokenizerInfo(tokens, vocab_size=VOCAB_SIZE, stop_token_ids=[END])


def choice_of(texts: list[str]) -> Grammar:
    kind, text = StructuredOutputsParams.model_validate({"choice": texts}).grammar_text()
    assert kind == "ebnf"
    return Grammar(kind=Grammar.EBNF, text=text)


def text_of(tokens: list[int]) -> str:
    return "".join(PIECES[token] for token in tokens)


def allowed_after(tokens: list[int], texts: list[str]) -> set[int]:
    """What may follow in the language of these texts."""
    said = text_of(tokens)
    follows = {
        token for token, piece in enumerate(PIECES) if piece and any(text.startswith(said + piece) for text in texts)
    }
    return follows | {END} if said in texts else follows


def make_sampler(form: str, grammars: Grammars) -> tuple[Sampler, SamplingTable, TokenTable]:
    tokens, table = TokenTable(torch.device("cpu")), SamplingTable(VOCAB_SIZE, grammars)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "make_row_sampler", lambda _: FORMS[form]())
        return Sampler(table, tokens), table, tokens


def rows_of(slots: list[int], positions: list[int]) -> Rows:
    """Rows that decode."""
    starts = np.array(positions) - 1
    return Rows(np.array(slots), starts, np.ones_like(starts), np.arange(len(slots)), len(slots))


@pytest.mark.parametrize("form", ["cpu", "torch"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_only_tokens_that_lead_to_a_text_are_sampled(form: str, data: st.DataObject) -> None:
    follow(form, data, num_requests=data.draw(st.integers(1, 5)))


@settings(max_examples=3, deadline=None)  # the interpreter takes a second for each
@given(data=st.data())
def test_gpu_kernels_sample_only_tokens_that_lead_to_a_text(data: st.DataObject) -> None:
    follow("triton", data, num_requests=2)


def follow(form: str, data: st.DataObject, num_requests: int) -> None:
    """Requests with and without grammars and with all kinds of other wishes, some in the midst of their text."""
    sampler, table, tokens = make_sampler(form, Grammars(vocabulary))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    texts: list[list[str] | None] = [data.draw(st.none() | CHOICES) for _ in range(num_requests)]
    outputs: list[list[int]] = []
    prompt = [5, 7, 3]
    for slot, choices in enumerate(texts):
        said: list[int] = []
        while choices and data.draw(st.booleans()) and (follows := allowed_after(said, choices) - {END}):
            said.append(data.draw(st.sampled_from(sorted(follows))))
        sampling = Sampling(
            temperature=data.draw(st.sampled_from([0.0, 1.0, 1.7])), top_p=data.draw(st.sampled_from([0.5, 1])),
            top_k=data.draw(st.sampled_from([0, 3])), repetition_penalty=data.draw(st.sampled_from([1.0, 1.4])),
            frequency_penalty=data.draw(st.sampled_from([0.0, 0.6])), min_tokens=data.draw(st.sampled_from([0, 3, 20])),
            seed=slot, stop_token_ids=[END], bias_token_ids=np.array([1, 30], "<i4").tobytes(),
            biases=np.array([50, 50], "<f4").tobytes(), grammar=choice_of(choices) if choices else None,
        )  # fmt: skip
        tokens.reserve(slot + 1, 40)
        tokens.write(slot, np.array(prompt + said, np.int32))
        table.set(slot, sampling, len(prompt))
        outputs.append(said)
    for _ in range(6):
        slots = np.flatnonzero(generator.integers(0, 2, num_requests)).tolist() or [0]
        rows = rows_of(slots, [len(prompt) + len(outputs[slot]) for slot in slots])
        logits = torch.from_numpy((generator.normal(size=(len(slots), VOCAB_SIZE)) * 2).astype(np.float32))
        sampler.begin(rows)
        sampled = sampler.sample(logits, rows.sampled_slots, rows.sampled_positions)
        tokens.put(torch.tensor(slots), torch.from_numpy(rows.sampled_positions), sampled)
        for slot, token in zip(slots, sampled.tolist(), strict=True):
            choices, said = texts[slot], outputs[slot]
            if choices:
                follows = allowed_after(said, choices) if END not in said else {END}
                if len(said) < table.min_tokens[slot] and follows - {END}:
                    follows -= {END}
                assert token in follows, (text_of(said), choices, token)
            said.append(token)


def test_neighbours_are_left_alone() -> None:
    sampler, table, tokens = make_sampler("cpu", Grammars(vocabulary))
    tokens.reserve(2, 8)
    for slot in (0, 1):
        grammar = choice_of(["abc"]) if slot else None
        table.set(slot, Sampling(repetition_penalty=1, top_p=1, stop_token_ids=[END], grammar=grammar), 1)
    logits = torch.randn(2, VOCAB_SIZE)
    before = logits.clone()
    rows = rows_of([0, 1], [1, 1])
    sampler.begin(rows)
    sampler.sample(logits, rows.sampled_slots, rows.sampled_positions)
    assert torch.equal(logits[0], before[0])
    assert torch.isfinite(logits[1]).nonzero()[:, 0].tolist() == [3, 6, 11]  # a, ab, abc


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 131])
def test_mask_against_its_bits(vocab_size: int) -> None:
    words = -(-vocab_size // 32)
    mask = torch.randint(-(2**31), 2**31 - 1, (3, words), dtype=torch.int64).to(torch.int32)
    logits = torch.randn(5, vocab_size)
    expected = logits.clone()
    for index, row in enumerate([4, 0, 2]):
        for token in range(vocab_size):
            if not int(mask[index, token // 32]) >> token % 32 & 1:
                expected[row, token] = -torch.inf
    apply_mask(logits, np.array([4, 0, 2]), mask)
    assert torch.equal(logits, expected)


def test_steps_follow_grammars_whoever_builds_their_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that comes with a part of its output goes on where it was, as after a preemption."""
    use_plain_torch(monkeypatch)
    folder = make_checkpoint(tmp_path, "qwen3", eos_token_id=END)
    model = load_model(folder, read_model_spec(folder), Mesh.single(torch.device("cpu")), torch.float32)
    texts = ["abcabc", "bbbb", "cab", "cabcab", "ccabé"]
    limited = Sampling(
        temperature=1, top_p=1, repetition_penalty=1, stop_token_ids=[END], grammar=choice_of(texts), seed=3
    )
    free = Sampling(repetition_penalty=1, top_p=1)

    def serve(on_device: bool, record: Recorder | None) -> list[list[int]]:
        runner = gpu_like_runner(model, on_device=on_device, record=record, grammars=Grammars(vocabulary))
        driver = Driver(BLOCK_SIZE)

        def run(prefill: list[tuple[int, int]], **differences: Any) -> None:
            plan = driver.plan(prefill, **differences)
            for add in plan.adds:
                add.num_prompt_tokens = NUM_PROMPT_TOKENS
            step = runner.run(plan)
            driver.take(StepResult(step=plan.step, epoch=plan.epoch, tokens=step.tokens()))

        driver.add(0, [9] * NUM_PROMPT_TOKENS, 18, sampling=limited)
        driver.add(1, [9] * NUM_PROMPT_TOKENS, 30, sampling=free)
        run([(0, 4), (1, 10)])  # in chunks
        run([(0, 6)])
        for _ in range(3):
            run([])
        so_far = driver.output(0)
        run([], frees=[0])
        driver.add(0, [9] * NUM_PROMPT_TOKENS + so_far, 18, sampling=limited)
        run([(0, NUM_PROMPT_TOKENS + len(so_far))])
        while driver.unfinished:
            run([])
        return [so_far + driver.output(0), driver.output(1)]

    constrained, alone = serve(on_device=False, record=None)
    text, ends = text_of(constrained[: constrained.index(END)]), constrained[constrained.index(END) :]
    assert text in texts
    assert set(ends) == {END}
    assert serve(on_device=True, record=None) == [constrained, alone]
    assert serve(on_device=True, record=Recorder()) == [constrained, alone]


def test_what_was_used_least_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_now = grammars_module._compile

    def noted(compiler: Any, grammar: Grammar) -> Any:
        compiled.append(grammar.text)
        return compile_now(compiler, grammar)

    monkeypatch.setattr(grammars_module, "_compile", noted)
    grammars = Grammars(vocabulary, max_bytes=1)
    for text in ("a", "b", "b", "a"):
        grammars.compile(Grammar(kind=Grammar.REGEX, text=text))
    assert compiled == ["a", "b", "a"]
    unbounded = Grammars(vocabulary)
    threads = [
        threading.Thread(target=unbounded.compile, args=(Grammar(kind=Grammar.REGEX, text="c+"),)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert compiled == ["a", "b", "a", "c+"]


def test_a_bad_grammar_says_why_and_is_not_kept() -> None:
    grammars, bad = Grammars(vocabulary), Grammar(kind=Grammar.REGEX, text="(")
    for _ in range(2):
        with pytest.raises(GrammarError, match=r"structured_outputs cannot be compiled: .*parenthesis"):
            grammars.compile(bad)
    with pytest.raises(PlanError, match="slot 4: structured_outputs cannot be compiled"):
        SamplingTable(VOCAB_SIZE, grammars).set(4, Sampling(grammar=bad), 1)
