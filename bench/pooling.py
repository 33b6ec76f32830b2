"""What embeddings cost, and what they cost those who generate.

    python bench/pooling.py decode
    python bench/shapes.py smollm2-135m /tmp/smollm2-135m
    python bench/pooling.py prompts /tmp/smollm2-135m

`decode`: time of a worker's decode step in which nobody asks for a vector, of a model so small that hardly anything but
the worker's own Python is left; run it in two checkouts to compare them. `prompts`: the same prompts embedded with
either pooling and continued by one token, one after the other in one engine without prefix caching.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from manta.configs.model import ModelSpec, RopeSpec
from manta.protos.sampling_pb2 import Sampling
from manta.protos.worker_pb2 import SeqAdd, StepPlan
from manta.workers.limits import Limits
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.model import HiddenShape
from manta.workers.models.decoder import allocate_kv_cache
from manta.workers.runner import Runner
from manta.workers.stage import Stage

CPU = torch.device("cpu")
BLOCK_SIZE = 16
LENGTH = 1024  # of a sequence at most
SPEC = ModelSpec(
    architecture="LlamaForCausalLM", family="llama", vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=1,
    num_heads=2, num_kv_heads=1, head_dim=32, rms_norm_eps=1e-5, rope=RopeSpec(), max_position=LENGTH, windows=(None,),
    qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False, tie_word_embeddings=True, dtype="float32",
    eos_token_ids=(),
)  # fmt: skip


def decode_us(num_rows: int) -> list[float]:
    """Microseconds of each of some hundred decode steps."""
    model = load_model(Path(), SPEC, Mesh.single(CPU), torch.float32, load_format="dummy")
    per_row = LENGTH // BLOCK_SIZE
    limits = Limits(num_rows * per_row, BLOCK_SIZE, num_rows, 16 * num_rows, LENGTH, SPEC.vocab_size)
    cache = allocate_kv_cache(model, limits.num_blocks, BLOCK_SIZE, torch.float32, CPU)
    runner = Runner(Stage(model, model.mesh, cache, limits, HiddenShape(SPEC.hidden_size, torch.float32)))
    slots = np.arange(num_rows, dtype="<u4")
    adds = [
        SeqAdd(
            slot=slot,
            tokens=np.full(8, slot % 64, "<i4").tobytes(),
            num_prompt_tokens=8,
            max_length=LENGTH,
            blocks=np.arange(slot * per_row, (slot + 1) * per_row, dtype="<u4").tobytes(),
            sampling=Sampling(top_p=1.0, repetition_penalty=1.0),
        )
        for slot in range(num_rows)
    ]
    lengths = np.full(num_rows, 8, "<u4").tobytes()
    runner.run(StepPlan(step=1, adds=adds, prefill_slots=slots.tobytes(), prefill_lengths=lengths)).tokens()
    times = []
    for step in range(2, 800):
        plan = StepPlan(step=step)
        began = time.perf_counter()
        runner.run(plan).tokens()
        times.append((time.perf_counter() - began) * 1e6)
    return times[100:]


def compare_prompts(model: str, num_prompts: int, num_tokens: int) -> None:
    """Prints prompt tokens per second."""
    from manta.cluster.embedding import VectorJob
    from manta.cluster.engine.batch import Job
    from manta.cluster.engine.types import UNSAMPLED, GenerationRequest
    from manta.cluster.llm import LLM
    from manta.configs.pooling import Pooling

    prompts = np.random.default_rng(0).integers(10, 1000, (num_prompts, num_tokens)).tolist()
    last, mean = (Pooling(kind=kind, normalize=True, dimensions=64) for kind in ("last", "mean"))
    rates: dict[str, list[float]] = {"one token": [], "last": [], "mean": []}
    with LLM(
        model, skip_tokenizer_init=True, device="cpu", enable_prefix_caching=False, max_model_len=1024,
        kv_cache_memory_bytes="400MiB",
    ) as llm:  # fmt: skip
        for _ in range(4):
            for name, pooling in (("one token", None), ("last", last), ("mean", mean)):
                requests = [GenerationRequest("", prompt, UNSAMPLED, pooling=pooling) for prompt in prompts]
                jobs = [Job(request, 0, None) if pooling is None else VectorJob(request) for request in requests]
                began = time.perf_counter()
                llm._run_jobs(iter([[job] for job in jobs]), lambda _: None)
                rates[name].append(num_prompts * num_tokens / (time.perf_counter() - began))
    rates = {name: each[1:] for name, each in rates.items()}
    base = statistics.median(rates["one token"])
    for name, each in rates.items():
        print(f"{name:10} {statistics.median(each):8.0f} prompt tokens/s   {statistics.median(each) / base:5.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["decode", "prompts"])
    parser.add_argument("model", nargs="?", help="for prompts")
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--num-tokens", type=int, default=128)
    args = parser.parse_args()
    if args.part == "decode":
        torch.set_num_threads(1)
        for num_rows in (1, 16, 64):
            times = decode_us(num_rows)
            print(f"{num_rows:4} rows: median {statistics.median(times):7.1f} us, lowest {min(times):7.1f} us")
        return
    compare_prompts(args.model, args.num_prompts, args.num_tokens)


if __name__ == "__main__":
    main()
