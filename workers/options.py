"""What flags choose of the kernels, for this process, before its model is loaded."""

import torch

from manta.configs.model import ModelError, ModelSpec
from manta.configs.schema import ServeConfig
from manta.kernels import ops
from manta.workers.formats import Format, choose_format


def set_up(config: ServeConfig, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Format:
    """Chooses kernels and the form of weights and KV pages. Raises ModelError naming the flag that cannot be had here.

    A flag that does not go with another one, or with --device cpu, has been refused by ServeConfig.
    """
    _choose_kernels(config, device)
    return choose_format(
        spec,
        dtype,
        device,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        is_dummy=config.load_format == "dummy",
    )


def _choose_kernels(config: ServeConfig, device: torch.device) -> None:
    form = None if config.attention_backend == "auto" else config.attention_backend
    flags = [] if form is None else [f"--attention-backend {form}"]
    flags += ["--batch-invariant"] if config.batch_invariant else []
    if device.type != "cuda":
        if flags:
            raise ModelError(f"{' and '.join(flags)} chooses kernels of GPUs, but this worker runs on {device}")
        return
    try:
        ops.use_attention(form, config.batch_invariant)
    except ValueError as error:
        raise ModelError(f"{' and '.join(flags)}: {error}") from None
