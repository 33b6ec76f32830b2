"""Whether Manta's greedy tokens are transformers' own, in float32, through the engines that bench/compare measures.

    python bench/compare/check_tokens.py

Writes smaller relatives of bench/shapes.py, with weights large enough that tokens vary, to a temporary folder.
"""

import sys
import tempfile
from pathlib import Path

import peers
from engine_process import EngineProcess, Spec
from workloads import Workload, make_workload

sys.path.append(str(Path(__file__).parents[1]))
import shapes
import torch

_SMALLER = {"num_hidden_layers": 4, "vocab_size": 4096, "initializer_range": 0.1}
_ENGINES = ("manta:dtype=float32", "transformers:dtype=float32,batch=1")


def tokens_of(engine_text: str, folder: str, workload: Workload) -> list[list[int]]:
    spec = Spec.parse(engine_text)
    engine = EngineProcess(spec, sys.executable, folder, peers.options_of(spec, kv_gib=1), {})
    try:
        engine.resume()
        tokens: list[list[int]] = engine.ask(workload.prompts, workload.output_lens, return_tokens=True)["tokens"]
        return tokens
    finally:
        engine.close()


def main() -> None:
    num_wrong = 0
    for shape in shapes.SHAPES:
        config = shapes.make_config(shape, **_SMALLER)
        workload = make_workload("mixed", vocab_size=config.vocab_size).head(16)
        with tempfile.TemporaryDirectory() as folder:
            shapes.write_weights(Path(folder), config, seed=0, dtype=torch.float32)
            shapes.train_tokenizer(config.vocab_size, shapes.stdlib_texts()).save_pretrained(folder)
            ours, theirs = (tokens_of(engine, folder, workload) for engine in _ENGINES)
        num_equal = sum(mine == other for mine, other in zip(ours, theirs, strict=True))
        distinct = len({token for tokens in theirs for token in tokens})
        print(f"{shape}: {num_equal} of {len(theirs)} outputs equal ({distinct} different tokens)")
        num_wrong += len(theirs) - num_equal
    sys.exit(1 if num_wrong else 0)


if __name__ == "__main__":
    main()
