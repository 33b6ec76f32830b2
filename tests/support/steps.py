"""Runs a model through steps as a scheduler would, and collects each sequence's logits."""

from pathlib import Path

import torch
from torch import Tensor

from manta.configs.model import ModelSpec, read_model_spec
from manta.kernels.metadata import AttentionMetadata, KVCache
from manta.workers.formats import Format
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.models.decoder import CausalLM, allocate_kv_cache
from tests.support.paging import PagedSequences

# Steps of (sequence, new tokens): whole prompts, chunks across blocks, decodes, and all of them mixed.
STEPS = [
    [(0, 37)],
    [(0, 1), (1, 19)],
    [(0, 1), (1, 18), (2, 5)],
    [(0, 1), (1, 1), (2, 30), (3, 1)],
    [(0, 1), (1, 1), (2, 1), (3, 8)],
    [(3, 1), (1, 1), (0, 1)],
]
BLOCK_SIZE = 8
NUM_BLOCKS = 24


def sequence_tokens(vocab_size: int) -> Tensor:
    """int64 [4, 64]: the tokens of the sequences that STEPS runs."""
    return torch.randint(0, vocab_size, (4, 64), generator=torch.Generator().manual_seed(11))


def run_steps(
    folder: Path, mesh: Mesh, dtype: torch.dtype, load_format: str = "auto", format: Format | None = None
) -> list[Tensor] | None:
    """Loads this rank's part of the model and runs STEPS. Per step the logits [T, vocab] of all tokens, on the last
    stage; None on others. Also passes each step's tokens back to the first stage and checks them there."""
    spec = read_model_spec(folder)
    model = load_model(folder, spec, mesh, dtype, load_format=load_format, format=format)
    kv_cache = allocate_kv_cache(model, NUM_BLOCKS, BLOCK_SIZE, model.format.kv_dtype, mesh.device)
    sequences = PagedSequences(BLOCK_SIZE, NUM_BLOCKS)
    computed = [0] * 4
    logits = []
    for rows in STEPS:
        token_ids = torch.cat([sequence_tokens(spec.vocab_size)[s, computed[s] : computed[s] + n] for s, n in rows])
        for sequence, num_new in rows:
            computed[sequence] += num_new
        out = _run_stage(model, spec, mesh, dtype, token_ids, sequences.step(rows), kv_cache)
        if out is not None:
            logits.append(out)
    return logits or None


def _run_stage(
    model: CausalLM,
    spec: ModelSpec,
    mesh: Mesh,
    dtype: torch.dtype,
    token_ids: Tensor,
    metadata: AttentionMetadata,
    kv_cache: KVCache,
) -> Tensor | None:
    num_tokens = int(token_ids.shape[0])
    x = token_ids if mesh.is_first_stage else mesh.recv_hidden(num_tokens, spec.hidden_size, dtype)
    hidden = model(x, metadata, kv_cache)
    if not mesh.is_last_stage:
        mesh.send_hidden(hidden)
        if mesh.is_first_stage:
            assert torch.equal(mesh.recv_tokens(num_tokens), token_ids)
        return None
    if not mesh.is_first_stage:
        mesh.send_tokens(token_ids)
    return model.logits(hidden).clone()  # the next step overwrites them
