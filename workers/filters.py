"""Which tokens may be drawn. Every filter is a cutoff per row: tokens of less weight than it are out.

A weight is exp(x - max of the row's x), so the best token's is 1 and a probability is a weight divided by the row's
sum. Ties with the last token kept stay, so that the choice never hangs on the order in which a sort leaves equal
weights. Sums are float64, so that a row's cutoff does not depend on how its batch is summed.
"""

import torch
from torch import Tensor

from manta.workers.largest import largest

TOP_P_CANDIDATES = 256  # tokens looked at first; real distributions rarely need more
TOP_P_WIDENING = 16  # times as many in each further round


def top_k_cutoff(weights: Tensor, top_k: Tensor, largest_k: int) -> Tensor:
    """The k-th largest weight. weights float32 [R, vocab], top_k int64 [R] in 1 : largest_k -> float32 [R]."""
    return largest(weights, largest_k).gather(1, top_k[:, None] - 1)[:, 0]


def top_p_cutoff(weights: Tensor, top_p: Tensor) -> Tensor:
    """Holtzman et al., "The curious case of neural text degeneration" (2019): a token stays while the tokens more
    probable than it sum to less than top_p.

    weights float32 [R, vocab], 0 for tokens that are out already (the rest count as 1 together), top_p [R] ->
    float32 [R]. Looks at the best candidates only and widens the search for the rows that need more.
    """
    vocab_size = weights.shape[1]
    cutoff = torch.empty_like(top_p)
    target = top_p * weights.sum(dim=-1, dtype=torch.float64)
    open_rows = torch.arange(weights.shape[0], device=weights.device)
    num_candidates = min(TOP_P_CANDIDATES, vocab_size)
    while True:
        best = largest(weights if open_rows.numel() == weights.shape[0] else weights[open_rows], num_candidates)
        before = torch.cumsum(best, dim=-1, dtype=torch.float64) - best
        num_kept = (before < target[open_rows, None]).sum(dim=-1).clamp(min=1)
        cutoff[open_rows] = best.gather(1, num_kept[:, None] - 1)[:, 0]
        open_rows = open_rows[num_kept == num_candidates]
        if num_candidates == vocab_size or not open_rows.numel():
            return cutoff
        num_candidates = min(num_candidates * TOP_P_WIDENING, vocab_size)


def drop_below(weights: Tensor, cutoff: Tensor) -> None:
    """Sets the weights float32 [R, vocab] below cutoff [R] to 0, in place. A product: several times as fast on the CPU
    as masked_fill."""
    weights.mul_(weights >= cutoff[:, None])
