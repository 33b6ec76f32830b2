"""Launches of the sampler: vocabularies of Llama 3 and Gemma."""

import torch

from manta.kernels import logprobs_triton, sample_triton
from manta.kernels.sample_penalties_triton import make_counts
from manta.kernels.sampling_rows import FLOATS, INTS, SamplingRows
from tests.support.aot import Launches

META = torch.device("meta")


def _sample(num_rows: int, vocab_size: int) -> None:
    rows = SamplingRows(
        torch.empty(len(FLOATS), num_rows, device=META),
        torch.empty(len(INTS) + 4, num_rows, dtype=torch.int64, device=META),
    )
    history = torch.empty(1024, 8192, dtype=torch.int32, device=META)
    counts = make_counts(num_rows, vocab_size, META)
    sample_triton.sample(torch.empty(num_rows, vocab_size, device=META), rows, history, counts)


LAUNCHES: Launches = {
    "256 rows of 128256": lambda: _sample(256, 128256),
    "1 row of 262144": lambda: _sample(1, 262144),
    "logprobs of 128256": lambda: logprobs_triton.logprobs(
        torch.empty(64, 128256, device=META), torch.empty(64, dtype=torch.int64, device=META), 20
    ),
}
