"""Which tokens may be drawn. Every filter is a cutoff: tokens whose scaled logit is below it are out.

All keep ties with the last token kept, so that the choice never depends on the order a sort happens to give equal
logits. Sums are float64, so that a row's cutoff does not depend on how its batch is summed.
"""

import torch
from torch import Tensor

TOP_P_CANDIDATES = 256  # tokens looked at first; real distributions rarely need more
TOP_P_WIDENING = 16  # times as many in each further round


def min_p_cutoff(x: Tensor, min_p: Tensor) -> Tensor:
    """Nguyen et al., "Min-p sampling" (2024): the best token's probability times min_p is the least that stays.

    x float32 [R, vocab], min_p float32 [R] -> float32 [R]; -inf where min_p is 0.
    """
    return x.amax(dim=-1) + torch.log(min_p)


def top_k_cutoff(x: Tensor, top_k: Tensor, largest_k: int) -> Tensor:
    """The k-th largest logit. x float32 [R, vocab], top_k int64 [R] in 1 : largest_k -> float32 [R]."""
    best = torch.topk(x, largest_k, dim=-1).values
    return best.gather(1, top_k[:, None] - 1)[:, 0]


def top_p_cutoff(x: Tensor, top_p: Tensor) -> Tensor:
    """Holtzman et al., "The curious case of neural text degeneration" (2019): a token stays while the tokens more
    probable than it sum to less than top_p.

    x float32 [R, vocab] with -inf for tokens that are out already (top_p counts the rest as 1), top_p [R] ->
    float32 [R]. Looks at the best candidates only and widens the search for the rows that need more.
    """
    vocab_size = x.shape[1]
    cutoff = torch.empty_like(top_p)
    target = top_p.to(torch.float64) * _weights(x).sum(dim=-1)
    open_rows = torch.arange(x.shape[0], device=x.device)
    num_candidates = min(TOP_P_CANDIDATES, vocab_size)
    while True:
        rows = x if open_rows.numel() == x.shape[0] else x[open_rows]
        best = torch.topk(rows, num_candidates, dim=-1).values
        weights = _weights(best)
        before = torch.cumsum(weights, dim=-1) - weights
        num_kept = (before < target[open_rows, None]).sum(dim=-1).clamp(min=1)
        cutoff[open_rows] = best.gather(1, num_kept[:, None] - 1)[:, 0]
        if num_candidates == vocab_size:
            return cutoff
        open_rows = open_rows[num_kept == num_candidates]
        if not open_rows.numel():
            return cutoff
        num_candidates = min(num_candidates * TOP_P_WIDENING, vocab_size)


def _weights(x: Tensor) -> Tensor:
    """Probabilities before their division by the row's sum, float64 [R, n]."""
    return torch.exp(x - x.amax(dim=-1, keepdim=True)).to(torch.float64)
