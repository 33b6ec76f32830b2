"""Steps of made-up tokens: one as large as any, to see how much memory steps take, and small ones before the first
request, so that it does not pay for compilation."""

import numpy as np
import torch

from manta.configs.schema import ServeConfig
from manta.kernels.metadata import AttentionMetadata, KVCache
from manta.protos.sampling_pb2 import Sampling
from manta.workers.mesh import Mesh
from manta.workers.model import HiddenShape, Model
from manta.workers.sampler import Sampler
from manta.workers.sampling_table import SamplingTable
from manta.workers.token_table import TokenTable
from manta.workers.transfer import upload

WARMUP_PREFILL_TOKENS = 32


def run_largest_step(
    model: Model, mesh: Mesh, kv_cache: KVCache, config: ServeConfig, hidden: HiddenShape, max_model_len: int
) -> None:
    """A step of max_num_batched_tokens tokens in which max_num_seqs rows sample with every filter on.

    All positions are written to the cache's first block, so one block is enough. A collective under tensor
    parallelism: every rank of the stage calls it.
    """
    num_tokens = config.max_num_batched_tokens
    lengths = [max_model_len] * (num_tokens // max_model_len)
    if num_tokens % max_model_len:
        lengths.append(num_tokens % max_model_len)
    _run(model, mesh, kv_cache, lengths, min(config.max_num_seqs, num_tokens), hidden, config.block_size)


def run_small_steps(model: Model, mesh: Mesh, kv_cache: KVCache, config: ServeConfig, hidden: HiddenShape) -> None:
    """A short prefill and a decode of several rows, on the cache's first block. A collective like the largest step."""
    num_tokens = min(WARMUP_PREFILL_TOKENS, config.max_num_batched_tokens, config.block_size)
    for lengths in ([num_tokens], [1] * min(4, config.max_num_seqs), [1]):
        _run(model, mesh, kv_cache, lengths, len(lengths), hidden, config.block_size)


@torch.inference_mode()
def _run(
    model: Model,
    mesh: Mesh,
    kv_cache: KVCache,
    lengths: list[int],
    num_sampled: int,
    hidden: HiddenShape,
    block_size: int,
) -> None:
    """One step of rows that compute `lengths` tokens from position 0, then `num_sampled` draws of tokens."""
    metadata = _metadata(lengths, block_size, mesh.device)
    num_tokens = sum(lengths)
    if mesh.is_first_stage:
        x = torch.zeros(num_tokens, dtype=torch.int64, device=mesh.device)
    else:
        x = torch.zeros(num_tokens, hidden.size, dtype=hidden.dtype, device=mesh.device)
    x = model(x, metadata, kv_cache)
    if mesh.is_last_stage:
        logits = model.logits(x[:1].expand(num_sampled, -1).contiguous())
        slots = np.zeros(num_sampled, np.int64)
        _sampler(logits.shape[1], mesh.device).sample(logits, slots, np.ones(num_sampled, np.int64))


def _metadata(lengths: list[int], block_size: int, device: torch.device) -> AttentionMetadata:
    num_decodes = len(lengths) if max(lengths) == 1 else 0
    query_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    block_tables = np.zeros((len(lengths), -(-max(lengths) // block_size)), np.int32)
    positions = np.concatenate([np.arange(length) for length in lengths])
    start, seq_lens, tables = upload([query_start, np.array(lengths, np.int32), block_tables], device)
    slot_mapping, position = upload([positions % block_size, positions], device)
    return AttentionMetadata(
        query_start=start,
        seq_lens=seq_lens,
        block_tables=tables,
        slot_mapping=slot_mapping,
        positions=position,
        num_decodes=num_decodes,
        max_query_len=max(lengths),
        max_seq_len=max(lengths),
        block_size=block_size,
    )


def _sampler(vocab_size: int, device: torch.device) -> Sampler:
    """A sampler whose slot 0 uses every filter and penalty."""
    table, tokens = SamplingTable(vocab_size), TokenTable(device)
    tokens.write(0, np.zeros(1, np.int32))
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=0)
    table.set(0, sampling, num_prompt_tokens=1)
    return Sampler(table, tokens)
