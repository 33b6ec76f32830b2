"""A whole rank with fp8 KV blocks on a CPU: half the bytes, and the tokens of a model that rounds keys and values."""

from pathlib import Path
from typing import Any

import torch

from manta.configs.memory_plan import PlannedRank, rank_weight_bytes
from manta.configs.schema import ServeConfig
from manta.protos.worker_pb2 import StepResult
from manta.workers.block_copy import BlockCopies
from manta.workers.rank import LoadedRank, Placement, load_rank
from tests.support.checkpoints import make_checkpoint, make_model
from tests.support.fp8_checkpoints import with_fp8_pages
from tests.support.plans import Driver, step_plan

ALONE = Placement(tp_rank=0, pp_rank=0, num_workers_on_host=1, rendezvous_host="", rendezvous_port=0, store=None)
BLOCK_SIZE, NUM_BLOCKS, NUM_NEW = 16, 16, 12


def load(folder: Path, **fields: Any) -> LoadedRank:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 64, "block_size": BLOCK_SIZE}
    config = ServeConfig(model=str(folder), device="cpu", num_gpu_blocks_override=NUM_BLOCKS, **(sizes | fields))
    return load_rank(config, ALONE)


def test_blocks_take_half_the_bytes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16, head_dim=16)
    assert load(tmp_path).bytes_per_block == 2 * load(tmp_path, kv_cache_dtype="fp8").bytes_per_block
    loaded = load(tmp_path)
    assert loaded.weight_bytes == load(tmp_path, kv_cache_dtype="fp8").weight_bytes
    assert loaded.weight_bytes == rank_weight_bytes(loaded.config, loaded.spec, PlannedRank(0, 1, 0, 1))


def test_tokens_are_those_of_rounded_keys_and_values(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    runner = load(tmp_path, kv_cache_dtype="fp8").start(NUM_BLOCKS)
    prompts = [list(range(3, 24)), list(range(40, 49))]
    driver = Driver(BLOCK_SIZE)
    for slot, prompt in enumerate(prompts):
        driver.add(slot, prompt, NUM_NEW)
    prefills: list[list[tuple[int, int]]] = [[(0, 21)], [(1, 5)], [(1, 4)]]
    while driver.unfinished:
        plan = driver.plan(prefills.pop(0) if prefills else [])
        driver.take(StepResult(step=plan.step, tokens=runner.run(plan).tokens()))
    model = with_fp8_pages(make_model("llama"), [(1.0, 1.0)] * 3)
    for slot, prompt in enumerate(prompts):
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(NUM_NEW):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert driver.output(slot) == tokens[len(prompt) :]
        assert len(set(tokens[len(prompt) :])) > 3  # or the comparison says little


def test_blocks_are_copied() -> None:
    kv_cache = [tuple(torch.randn(4, 1, 8, 16).to(torch.float8_e4m3fn) for _ in range(2)) for _ in range(2)]
    before = [pages.float() for layer in kv_cache for pages in layer]
    BlockCopies(kv_cache).apply(step_plan(1, copies=[(0, 2), (2, 3)]))  # type: ignore[arg-type]
    for pages, was in zip((pages for layer in kv_cache for pages in layer), before, strict=True):
        assert torch.equal(pages.float(), was[[0, 1, 0, 2]])
