"""What ranks of one host pay for talking to each other: gloo against shared memory, in one run.

    python bench/all_reduce.py                          # all-reduce of 1 KiB to 4 MiB, 2 and 4 processes
    python bench/all_reduce.py --model smollm2-135m     # steps of a model over 2 tensor-parallel processes
    python bench/all_reduce.py --hops                   # one token to the next pipeline stage and back, over gloo

Each rank is a process of one thread. `--busy N` adds N processes that compute all the time; `--spin-us` gives shared
memory with other spins than the default. Every sum is compared with torch's.
"""

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import make_config

from manta.configs.model import read_model_spec
from manta.kernels.barrier_cpu import spins_per_us
from manta.kernels.metadata import AttentionMetadata
from manta.workers.host_collectives import HostCollectives
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh, connect_mesh, open_store
from manta.workers.models.decoder import allocate_kv_cache

SIZES_KIB = (1, 4, 16, 64, 256, 1024, 4096)
NUM_BLOCKS = 10  # gloo and shared memory take turns so often
BLOCK_SIZE = 32
STEPS = {"decode, 1 x 512": (1, 1, 512), "decode, 16 x 512": (16, 1, 512), "prefill of 512": (1, 512, 512)}
MODELS: dict[str, dict[str, Any]] = {  # 9 heads cannot be split
    "smollm2-135m": {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8, "num_key_value_heads": 4},
    "qwen3-0.6b": {"architectures": ["Qwen3ForCausalLM"]},
}
Times = dict[tuple[str, str], list[float]]  # (what, over what) -> us of each


def gloo_and_shared(connect: Callable[..., Mesh], spins_us: list[float]) -> dict[str, Mesh]:
    """Meshes of the same ranks that differ in how they talk. The last one is the default."""
    meshes = {"gloo": connect("gloo", shared_memory=False)}
    for spin_us in spins_us:
        mesh = connect(f"spin {spin_us:g} us")
        assert isinstance(mesh._tp, HostCollectives)
        mesh._tp._spins = round(spin_us * spins_per_us(mesh._tp._barrier))
        meshes[f"spin {spin_us:g} us"] = mesh
    return meshes | {"shared": connect("shared")}


def all_reduces(rank: int, connect: Callable[..., Mesh], args: argparse.Namespace) -> Times:
    """Times of single calls that all ranks begin together."""
    meshes = gloo_and_shared(connect, args.spin_us)
    num_ranks, start, dtype = meshes["shared"].tp_size, meshes["shared"], getattr(torch, args.dtype)
    times: Times = {}
    for size in SIZES_KIB:
        generators = [torch.Generator().manual_seed(r) for r in range(num_ranks)]
        parts = [torch.randn(size * 1024 // dtype.itemsize, generator=g).to(dtype) for g in generators]
        expected = torch.stack([part.double() for part in parts]).sum(0)
        x = parts[rank].clone()
        for number in range(NUM_BLOCKS * len(meshes)):
            name, mesh = list(meshes.items())[number % len(meshes)]
            for _ in range(args.rounds // NUM_BLOCKS // (1 if size < 1024 else 4)):
                x.copy_(parts[rank])
                start.all_reduce(torch.zeros(1))  # wakes who sleeps
                start.all_reduce(torch.zeros(1))
                begin_ns = time.perf_counter_ns()
                mesh.all_reduce(x)
                times.setdefault((f"{size} KiB", name), []).append((time.perf_counter_ns() - begin_ns) / 1e3)
            torch.testing.assert_close(x.double(), expected, rtol=2e-2, atol=2e-2)
    return times


@torch.inference_mode()
def model_steps(rank: int, connect: Callable[..., Mesh], args: argparse.Namespace) -> Times:
    """Times of whole steps, layers and head, of a model with random weights; without sampling."""
    times: Times = {}
    meshes = gloo_and_shared(connect, args.spin_us)
    with tempfile.TemporaryDirectory() as folder:
        make_config(args.model, **MODELS[args.model]).save_pretrained(folder)
        spec = read_model_spec(Path(folder))
        model = load_model(Path(folder), spec, meshes["shared"], torch.bfloat16, load_format="dummy")
    num_blocks = 16 * (512 // BLOCK_SIZE + 1) + 1
    kv_cache = allocate_kv_cache(model, num_blocks, BLOCK_SIZE, torch.bfloat16, torch.device("cpu"))
    for what, (num_rows, num_new, length) in STEPS.items():
        metadata = make_metadata(num_rows, num_new, length)
        tokens = torch.randint(0, spec.vocab_size, (num_rows * num_new,), generator=torch.Generator().manual_seed(0))
        outputs: list[torch.Tensor] = []
        for number in range(args.rounds // 40 if num_new > 1 else args.rounds // 5):
            for name, mesh in meshes.items():
                model.mesh = model.embed.mesh = mesh
                meshes["shared"].all_reduce(torch.zeros(1))
                begin_ns = time.perf_counter_ns()
                hidden = model(tokens, metadata, kv_cache)
                logits = model.logits(hidden[-num_rows:])
                times.setdefault((what, name), []).append((time.perf_counter_ns() - begin_ns) / 1e3)
                if number == 0:
                    outputs.append(logits)
        for logits in outputs:
            torch.testing.assert_close(logits, outputs[0], rtol=0.05, atol=0.05)
    return times


def hops(rank: int, connect: Callable[..., Mesh], args: argparse.Namespace) -> Times:
    """Times of hidden states to the next stage and of tokens back."""
    times: Times = {}
    mesh = connect("hops", stages=True)
    for _ in range(args.rounds):
        begin_ns = time.perf_counter_ns()
        if rank == 0:
            mesh.send_hidden(torch.zeros(1, 576, dtype=torch.bfloat16))
            mesh.recv_tokens(1)
        else:
            mesh.recv_hidden(1, 576, torch.bfloat16)
            mesh.send_tokens(torch.zeros(1, dtype=torch.int64))
        times.setdefault(("there and back", "gloo"), []).append((time.perf_counter_ns() - begin_ns) / 1e3)
    return times


def make_metadata(num_rows: int, num_new: int, length: int) -> AttentionMetadata:
    """Rows of `length` tokens, the last `num_new` of them new, in blocks of their own."""
    positions = np.tile(np.arange(length - num_new, length), num_rows)
    width = -(-length // BLOCK_SIZE)
    tables = 1 + np.arange(num_rows * width).reshape(num_rows, width)
    rows = np.repeat(np.arange(num_rows), num_new)
    slots = tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    return AttentionMetadata(
        query_start=torch.arange(num_rows + 1, dtype=torch.int32) * num_new,
        seq_lens=torch.full((num_rows,), length, dtype=torch.int32),
        block_tables=torch.from_numpy(tables).int(),
        slot_mapping=torch.from_numpy(slots),
        positions=torch.from_numpy(positions),
        num_decodes=num_rows if num_new == 1 else 0,
        max_query_len=num_new,
        max_seq_len=length,
        block_size=BLOCK_SIZE,
    )


def run_rank(rank: int, num_ranks: int, port: int, answers: Any, measure: Any, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("localhost", port, is_master=False)

    def connect(name: str, *, shared_memory: bool = True, stages: bool = False) -> Mesh:
        return connect_mesh(
            store=torch.distributed.PrefixStore(name, store), device=torch.device("cpu"), timeout_s=100.0,
            tp_rank=0 if stages else rank, tp_size=1 if stages else num_ranks,
            pp_rank=rank if stages else 0, pp_size=num_ranks if stages else 1, shared_memory=shared_memory,
        )  # fmt: skip

    times = measure(rank, connect, args)
    if rank == 0:
        answers.put(times)
    store.set(f"done/{rank}", "")
    store.wait([f"done/{other}" for other in range(num_ranks)])


def run(measure: Callable[..., Times], num_ranks: int, args: argparse.Namespace) -> None:
    """Measures on so many processes and prints what rank 0 saw."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    store, port = open_store()
    arguments = (num_ranks, port, answers, measure, args)
    ranks = [context.Process(target=run_rank, args=(rank, *arguments), daemon=True) for rank in range(num_ranks)]
    with busy(args.busy):
        for process in ranks:
            process.start()
        while answers.empty():
            assert not any(process.exitcode for process in ranks), "a rank failed"
            time.sleep(0.1)
        times = answers.get()
    for process in ranks:
        process.join()
    del store
    print(f"\n{num_ranks} processes, {args.busy} busy ones beside them")
    print(f"{'':16} {'over':12} {'p50 us':>10} {'p99 us':>10} {'gloo / it':>10}")
    for (what, name), values in times.items():
        taken = np.array(values[len(values) // 10 :])  # the first ones find cold caches
        ratio = np.median(times[what, "gloo"][len(values) // 10 :]) / np.median(taken)
        print(
            f"{what:16} {name:12} {np.median(taken):10.1f} {np.percentile(taken, 99):10.1f} {ratio:10.1f}", flush=True
        )


@contextmanager
def busy(number: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--model", choices=list(MODELS))
    parser.add_argument("--hops", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--spin-us", type=float, nargs="+", default=[])
    args = parser.parse_args()
    measure = hops if args.hops else model_steps if args.model else all_reduces
    for num_ranks in args.ranks or ([2, 4] if measure is all_reduces else [2]):
        run(measure, num_ranks, args)


if __name__ == "__main__":
    main()
