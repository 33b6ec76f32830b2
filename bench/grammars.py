"""What grammars of structured outputs cost: `python bench/grammars.py MODEL [--tokenizer FOLDER]`.

Per grammar: compiling it in a worker, what it would be to send the compiled form instead (its size, and the time to
read it), and what a sequence costs a step: following its last token, finding the tokens that may come next, and setting
the logits of all others to -inf. Tokens are drawn from those that may come.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xgrammar as xgr

from manta.configs.model import read_model_spec
from manta.configs.schema import ServeConfig
from manta.protos.sampling_pb2 import Grammar
from manta.workers.grammar_masks import SlotGrammar, apply_mask
from manta.workers.grammars import Grammars, load_vocabulary

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
        "place": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "boolean"}}},
    },
    "required": ["name", "age"],
}  # fmt: skip
BOUNDED = {
    "type": "object",
    "properties": {f"field {i}": {"type": "string", "maxLength": 40} for i in range(20)},
    "required": [f"field {i}" for i in range(20)],
}
GRAMMARS = {
    "choice of two": Grammar(kind=Grammar.EBNF, text='root ::= "yes" | "no"'),
    "regex: address": Grammar(kind=Grammar.REGEX, text=r"(\d{1,3}\.){3}\d{1,3}"),
    "schema: person": Grammar(kind=Grammar.JSON_SCHEMA, text=json.dumps(PERSON)),
    "any JSON object": Grammar(kind=Grammar.JSON_SCHEMA, text='{"type":"object"}'),
    "20 bounded strings": Grammar(kind=Grammar.JSON_SCHEMA, text=json.dumps(BOUNDED)),
}
NUM_TOKENS = 100


def seconds_of(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description="costs of grammars")
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--tokenizer", help="another folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    spec = read_model_spec(Path(args.model))
    began_s = time.perf_counter()
    vocabulary = load_vocabulary(ServeConfig(model=args.model, tokenizer=args.tokenizer), spec)
    print(f"{spec.vocab_size} tokens; libraries and vocabulary {time.perf_counter() - began_s:.1f} s")
    print(
        f"{'grammar':20} {'compile ms':>10} {'sent KiB':>9} {'read ms':>8} {'next us':>8} "
        f"{'worst us':>8} {'apply us':>8}"
    )
    for name, grammar in GRAMMARS.items():
        grammars = Grammars(lambda: vocabulary)
        grammars.compile(Grammar(kind=Grammar.EBNF, text='root ::= "a"'))
        compile_s = seconds_of(lambda grammars=grammars, grammar=grammar: grammars.compile(grammar))
        compiled = grammars.compile(grammar)
        sent = compiled.serialize_json()
        read_s = seconds_of(lambda sent=sent: xgr.CompiledGrammar.deserialize_json(sent, vocabulary))
        next_s, apply_s = follow(compiled, spec.vocab_size)
        print(
            f"{name:20} {compile_s * 1e3:10.1f} {len(sent) / 1024:9.0f} {read_s * 1e3:8.1f} "
            f"{np.median(next_s) * 1e6:8.0f} {max(next_s) * 1e6:8.0f} {np.median(apply_s) * 1e6:8.0f}"
        )


def follow(compiled: xgr.CompiledGrammar, vocab_size: int) -> tuple[list[float], list[float]]:
    """Seconds of each token: to follow it and find what comes next, and to change the logits."""
    generator = np.random.default_rng(1)
    next_s: list[float] = []
    apply_s: list[float] = []
    logits = torch.zeros(1, vocab_size)
    mask = torch.empty(1, -(-vocab_size // 32), dtype=torch.int32)
    for _ in range(5):
        slot = SlotGrammar(compiled, 0, [], vocab_size)
        tokens: list[int] = []
        for _ in range(NUM_TOKENS):

            def step(slot: SlotGrammar = slot, tokens: tuple[int, ...] = tuple(tokens)) -> None:
                slot.advance(tokens)
                slot.fill(mask, 0)

            next_s.append(seconds_of(step))
            apply_s.append(seconds_of(lambda: apply_mask(logits, np.zeros(1, np.int64), mask)))
            bits = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")
            tokens = [int(generator.choice(np.flatnonzero(bits)))]
    return next_s, apply_s


if __name__ == "__main__":
    main()
