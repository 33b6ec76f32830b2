"""Where the time of decode steps goes on the device, by kernel, as torch's profiler sees it; and how much is gaps.

These are the device's own intervals, with which the engine part's idle share, of events around steps, can be checked.
The profiler adds to the gaps, not to the kernels.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from engine import model_config, started
from inline_engine import InlineEngine

_NUM_STEPS, _WARM_STEPS, _PROMPT = 24, 8, 500
_NUM_SHOWN = 12


def run(shape: str, device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
    """One record per number of sequences."""
    config = model_config(shape, small)
    with started(config, "plain", device, small) as engine:
        for batch in (1, 4) if small else (1, 64, 256):
            record = {
                "shape": shape,
                "batch": batch,
                **_profile(engine, batch, 20 if small else _PROMPT, config, device),
            }
            print(f"{shape}, {batch} sequences: {record['busy_share']:.1%} busy, {record['kernels_ms']:.3f} ms of "
                  f"kernels in steps of {record['span_ms']:.3f} ms", flush=True)  # fmt: skip
            for name, ms in list(record["by_kernel_ms"].items())[:_NUM_SHOWN]:
                print(f"  {ms:>8.3f} ms  {name}", flush=True)
            yield record


def _profile(engine: InlineEngine, batch: int, prompt: int, config: Any, device: torch.device) -> dict[str, Any]:
    """Of the last _NUM_STEPS steps, all of which decode: milliseconds per step."""
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    prompts = [[5 + (i * 7 + j) % (config.vocab_size - 5) for j in range(prompt)] for i in range(batch)]
    engine.generate(prompts, [_WARM_STEPS] * batch)  # in the prefix cache from now on
    with torch.profiler.profile(activities=[kind]) as profiler:
        result = engine.generate(prompts, [_NUM_STEPS + _WARM_STEPS] * batch)
    intervals = _intervals(profiler, device)
    # Backwards from the end: steps have equally many operations, all but those that began with a prompt.
    decodes = intervals[-(len(intervals) * _NUM_STEPS // len(result.device_us)) :]
    by_kernel: dict[str, float] = defaultdict(float)
    for _, us, name in decodes:
        by_kernel[name] += us / 1e3 / _NUM_STEPS
    span_us = max((begin + us for begin, us, _ in decodes), default=0.0) - min(
        (begin for begin, *_ in decodes), default=0
    )
    kernels_ms = sum(by_kernel.values())
    ordered = sorted(by_kernel.items(), key=lambda item: -item[1])
    return {
        "kernels_ms": kernels_ms,
        "span_ms": span_us / 1e3 / _NUM_STEPS,
        "busy_share": kernels_ms * _NUM_STEPS * 1e3 / span_us if span_us else 0.0,
        "operations_per_step": len(decodes) / _NUM_STEPS,
        "by_kernel_ms": dict(ordered),
    }


def _intervals(profiler: Any, device: torch.device) -> list[tuple[float, float, str]]:
    """Begin and length in microseconds, and name, of everything that the device did, in order."""
    wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    found = [
        (event.time_range.start, event.time_range.elapsed_us(), event.name[:80])
        for event in profiler.events()
        if event.device_type == wanted
    ]
    return sorted(found)
