"""A plan's bytes are those that workers take: of their tensors, and of what they report."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manta.configs.capacity import KVSize
from manta.configs.memory_estimate import activation_bytes, table_bytes, weight_itemsize
from manta.configs.memory_plan import PlannedRank, kv_size, plan_memory, rank_weight_bytes
from manta.configs.model import ModelSpec, read_model_spec
from manta.configs.public_models import public_id, public_models, public_spec
from manta.configs.quantization import QuantizationSpec
from manta.configs.schema import ServeConfig
from manta.configs.weights import Place, weight_names, weight_slice
from manta.kernels import ops
from manta.kernels.metadata import AttentionMetadata
from manta.workers.decode_graphs import graph_sizes
from manta.workers.device_slots import DeviceSlots
from manta.workers.formats import Format, Weights, choose_format
from manta.workers.limits import Limits
from manta.workers.mesh import Mesh
from manta.workers.models.decoder import CausalLM, allocate_kv_cache
from manta.workers.rope import rope_table
from manta.workers.step_buffers import StepBuffers
from manta.workers.token_table import TokenTable
from tests.support.checkpoints import make_checkpoint

GIB = 2**30
CPU, META = torch.device("cpu"), torch.device("meta")
# Parameters as the model pages of the hub have them.
PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
}


def config(**fields: Any) -> ServeConfig:
    return ServeConfig(model="m", **fields)


@pytest.mark.parametrize("model", public_models())
def test_public_shapes_have_the_published_number_of_parameters(model: str) -> None:
    spec, alone = public_spec(model), PlannedRank(0, 1, 0, 1)
    parts = [part for name in weight_names(spec) if (part := weight_slice(spec, alone, name))]
    assert sum(math.prod(part.shape) for part in parts) == PUBLISHED[model]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("/models/Qwen3-32B/", "Qwen/Qwen3-32B"),
        ("qwen/qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("someone/Llama-3.1-8B-FP8", None),
        ("Qwen3-32B-Instruct", None),
    ],
)
def test_a_shape_is_found_by_name(name: str, known: str | None) -> None:
    assert public_id(name) == known


@pytest.fixture(scope="module", params=["llama-bias", "qwen2", "qwen3"])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("model")
    return read_model_spec(make_checkpoint(folder, request.param, vocab_size=132))


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_weights_and_blocks_are_those_of_the_model_that_workers_build(
    spec: ModelSpec, tp_size: int, pp_size: int
) -> None:
    asked = config(tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size, block_size=32, dtype="bfloat16")
    for pp_rank in range(pp_size):
        for tp_rank in range(tp_size):
            place = PlannedRank(tp_rank, tp_size, pp_rank, pp_size)
            model = CausalLM(spec, Mesh(tp_rank, tp_size, pp_rank, pp_size, CPU), torch.bfloat16)
            assert rank_weight_bytes(asked, spec, place) == sum(p.nbytes for p in model.parameters())
            cache = allocate_kv_cache(model, 1, 32, torch.bfloat16, META)
            assert kv_size(asked, spec, place) == KVSize.of(cache, 32)
            pages = allocate_kv_cache(model, 1, 32, torch.float8_e4m3fn, META)
            assert kv_size(asked.model_copy(update={"kv_cache_dtype": "fp8"}), spec, place) == KVSize.of(pages, 32)


@pytest.mark.parametrize(
    ("quantization", "flag"),
    [
        (None, None),
        (None, "fp8"),
        (QuantizationSpec(scales="channel", ignored=("model.layers.0.mlp.down_proj", "lm_head")), None),
        (QuantizationSpec(scales="block", block=(128, 128)), None),
        (QuantizationSpec(scales="tensor", weights_only=True), None),
    ],
)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_bytes_per_value_are_those_of_the_format_that_workers_choose(
    quantization: QuantizationSpec | None, flag: Any, load_format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "has_fp8_products", lambda device: True)
    spec = public_spec("Qwen/Qwen3-0.6B").model_copy(update={"quantization": quantization})
    asked = config(quantization=flag, load_format=load_format)
    chosen = choose_format(spec, torch.bfloat16, CPU, quantization=flag, is_dummy=load_format == "dummy")
    for name in weight_names(spec):
        assert weight_itemsize(asked, spec, name) == chosen.itemsize_of(spec, name), name


def _tensor_bytes(asked: ServeConfig, spec: ModelSpec, place: Place) -> int:
    """Of what a worker on a GPU allocates beside weights and cache, on a device that has no memory."""
    limits = Limits(
        num_blocks=1,
        block_size=asked.block_size,
        max_num_seqs=asked.max_num_seqs,
        max_num_batched_tokens=asked.max_num_batched_tokens,
        max_model_len=asked.max_model_len or spec.max_position,
        vocab_size=spec.vocab_size,
    )
    num_rows = min(limits.max_num_batched_tokens, limits.max_num_slots)
    slots = DeviceSlots(limits, TokenTable(META, limits.max_num_slots, limits.max_model_len), META).columns
    buffers = StepBuffers.empty(limits.max_num_batched_tokens, num_rows, limits.max_blocks_per_seq, None, META)
    inputs = [getattr(buffers.inputs, name) for name in buffers.inputs.__slots__]
    tensors = [slots.length, slots.num_computed, slots.block_table, slots.tokens]
    tensors += [buffers.slots, buffers.query_start, *inputs]
    tensors.append(rope_table(spec.rope, spec.head_dim, spec.max_position))
    if not place.is_first_stage:
        tensors.append(torch.empty(limits.max_num_batched_tokens, spec.hidden_size, dtype=torch.bfloat16, device=META))
    given = (spec.vocab_size, torch.float32) if place.is_last_stage else (spec.hidden_size, torch.bfloat16)
    tensors.append(torch.empty(graph_sizes(asked.max_num_seqs)[-1], given[0], dtype=given[1], device=META))
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(("max_num_seqs", "max_num_batched_tokens"), [(3, 5), (256, 2048), (2000, 2048)])
def test_tables_are_those_that_workers_allocate(
    spec: ModelSpec, max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    asked = config(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=100,
        dtype="bfloat16",
        block_size=8,
    )
    for pp_rank in range(2):
        place = PlannedRank(0, 1, pp_rank, 2)
        assert table_bytes(asked, spec, place, 100) == _tensor_bytes(asked, spec, place)


def test_scales_of_fp8_weights_and_the_padding_of_the_vocabulary_are_counted(spec: ModelSpec) -> None:
    plain, place = config(dtype="bfloat16"), PlannedRank(1, 2, 0, 1)
    odd = spec.model_copy(update={"vocab_size": 131})
    fp8 = odd.model_copy(update={"quantization": QuantizationSpec(scales="channel")})
    mesh = Mesh(1, 2, 0, 1, CPU)
    stored = Format(torch.bfloat16, torch.bfloat16, Weights.STORED_FP8)
    model, wide = CausalLM(fp8, mesh, torch.bfloat16, stored), CausalLM(odd, mesh, torch.bfloat16)
    scales = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("weight_scale"))
    assert scales > 0
    assert table_bytes(plain, fp8, place, 64) - table_bytes(plain, odd, place, 64) == scales
    padding = sum(p.nbytes for p in wide.parameters()) - rank_weight_bytes(plain, odd, place)
    assert padding > 0
    recorded = 256 * 4  # logits of one token less
    assert table_bytes(plain, odd, place, 64) - table_bytes(plain, spec, place, 64) == padding - recorded


class _LiveBytes(TorchDispatchMode):
    """Adds up what operations allocate and nobody has let go of yet."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        """`tensors` have been there before."""
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._live = {key: each for key, each in self._live.items() if not each[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in self._live:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, sum(num_bytes for _, num_bytes in self._live.values()))
        return out


@pytest.mark.parametrize("tp_size", [1, 2])
def test_activations_are_what_the_layers_hold_at_their_worst_moment(
    spec: ModelSpec, tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operation by operation, as on a GPU; attention and the cache are left out, which take little of their own."""
    monkeypatch.setattr(ops, "uses_cpu_decoder", lambda *_: False)
    monkeypatch.setattr(ops, "paged_attention", lambda q, *_: torch.empty_like(q))
    monkeypatch.setattr(ops, "rope_kv_write", lambda *_: None)
    num_tokens, num_rows = 96, 16
    model = CausalLM(spec, Mesh(0, tp_size, 0, 1, CPU), torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.prepare()
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        block_tables=torch.zeros(1, 6, dtype=torch.int32),
        slot_mapping=torch.arange(num_tokens),
        positions=torch.arange(num_tokens),
        num_decodes=0,
        max_query_len=num_tokens,
        max_seq_len=num_tokens,
        block_size=16,
    )
    nothing: Any = [(None, None)] * spec.num_layers
    token_ids = torch.zeros(num_tokens, dtype=torch.int64)
    with _LiveBytes(*model.parameters(), model.rope_table, token_ids, metadata.positions) as live:
        hidden = model(token_ids, metadata, nothing)
        in_layers = live.peak_bytes
        if tp_size == 1:  # else another rank has the rest of the logits
            model.logits(hidden[:num_rows])
    asked = config(max_num_batched_tokens=num_tokens, max_num_seqs=num_rows, enforce_eager=True, dtype="bfloat16")
    place = PlannedRank(0, tp_size, 0, 1)
    without_head = spec.model_copy(update={"has_lm_head": False})
    assert in_layers <= activation_bytes(asked, without_head, place) <= 1.3 * in_layers
    assert live.peak_bytes <= activation_bytes(asked, spec, place)


@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.integers(1, 4),
    gib=st.integers(16, 192),
    length=st.sampled_from([None, 512, 8192, 131072]),
    seqs=st.integers(1, 2048),
    kv=st.sampled_from(["auto", "fp8"]),
    model=st.sampled_from(["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"]),
)
@settings(max_examples=30, deadline=None)
def test_what_fits_stays_within_the_memory(
    tp: int, pp: int, gib: int, length: int | None, seqs: int, kv: Any, model: str
) -> None:
    asked = config(
        tensor_parallel_size=tp, pipeline_parallel_size=pp, max_model_len=length, max_num_seqs=seqs, kv_cache_dtype=kv
    )
    plan = plan_memory(asked, public_spec(model), gib * GIB)
    for stage in plan.stages:
        assert stage.num_blocks is None or stage.num_blocks * stage.kv.block_bytes <= stage.left_bytes
    if plan.fits:
        assert plan.num_sequences(plan.max_model_len) >= 1
        assert length is None or plan.max_model_len == length
        assert plan.num_sequences(256) <= seqs
    # What is left says it, too: a sequence of the length that was asked for, or a little one.
    need = max(stage.kv.bytes_of(length or 256) - stage.left_bytes for stage in plan.stages)
    assert plan.fits or need > -2 * 2**20 * max(stage.kv.num_tensors for stage in plan.stages)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"gpu_memory_utilization": 0.1}, "the weights and what steps need exceed what a GPU allows by"),
        ({"num_gpu_blocks_override": 10**6}, "--num-gpu-blocks-override does not suit a GPU"),
        ({"kv_cache_memory_bytes": "90GiB"}, "--kv-cache-memory-bytes does not suit a GPU"),
        ({"kv_cache_memory_bytes": "1GiB", "max_model_len": 131072}, "--kv-cache-memory-bytes gives 8192 tokens"),
        ({"max_model_len": 131072, "gpu_memory_utilization": 0.35}, "one sequence of 131072 tokens needs 16.0 GiB"),
        ({"kv_cache_memory_bytes": "1GiB", "max_model_len": 8192}, None),
        ({}, None),
    ],
)
def test_problems_are_named(fields: dict[str, Any], problem: str | None) -> None:
    plan = plan_memory(config(**fields), public_spec("meta-llama/Llama-3.1-8B"), 80 * GIB)
    assert plan.problem is None if problem is None else problem in str(plan.problem)
