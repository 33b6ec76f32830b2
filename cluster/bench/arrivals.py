"""When requests are sent."""

import math

import numpy as np


def arrival_times_s(num_requests: int, request_rate: float, burstiness: float, seed: int) -> np.ndarray:
    """Seconds from the start, ascending, [num_requests].

    Gaps are gamma distributed with mean 1 / request_rate and variation coefficient 1 / sqrt(burstiness): 1 is a
    Poisson process, less comes in bursts, infinity is a metronome. As in vLLM's benchmark they are then stretched so
    that the last request is sent at num_requests / request_rate, whatever the seed. An infinite rate sends all at 0.
    """
    if math.isinf(request_rate):
        return np.zeros(num_requests)
    if math.isinf(burstiness):
        gaps = np.ones(num_requests)
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1 / burstiness, num_requests)
    times: np.ndarray = np.cumsum(gaps)
    times *= num_requests / request_rate / times[-1]
    return times
