"""The block `manta serve` prints when it is ready."""

import json
import shlex

from manta.cluster.launch.launcher import FrontendAddress
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2

_PHASES = {"ray": "Ray", "processes": "processes", "model": "model", "frontends": "frontends"}


def ready_block(
    config: ServeConfig, info: engine_pb2.InfoResponse, address: FrontendAddress, phases: dict[str, float]
) -> str:
    """What is served, with what, where, how long it took, and a line to paste."""
    kind = "GPU" if info.device.startswith("cuda") else "CPU"
    num_tokens = info.num_blocks * info.block_size
    inner = ", ".join(f"{name} {seconds:.1f}" for name, seconds in sorted(info.startup_s.items()))
    outer = ", ".join(f"{title} {phases[name]:.1f}" for name, title in _PHASES.items() if name in phases)
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::", "") else config.host
    url = f"{'https' if config.ssl_certfile else 'http'}://{host}:{address.http_port}"
    lines = [
        f"model        {config.model_name}",
        f"parallel     tensor {config.tensor_parallel_size}, pipeline {config.pipeline_parallel_size}, "
        f"replicas {info.num_replicas}, on {info.device}",
        f"memory       # {kind} blocks: {info.num_blocks} of {info.block_size} tokens ({num_tokens} tokens; "
        f"context {info.max_model_len})",
        f"start-up     {phases['total']:.1f} s: {outer}" + (f" (of it {inner})" if inner else ""),
        f"HTTP         {url}/v1",
        f"gRPC         {host}:{address.grpc_port}" + (" (TLS)" if config.ssl_certfile else ""),
        "try          " + _curl(config, url),
    ]
    rule = "-" * 72
    return "\n".join([rule, "Manta is ready", *lines, "Ctrl-C drains and stops", rule])


def _curl(config: ServeConfig, url: str) -> str:
    question = "CREATE TABLE users (id INTEGER, name TEXT, age INTEGER);\nHow many users are there?"
    body = {"model": config.model_name, "messages": [{"role": "user", "content": question}], "temperature": 0}
    headers = "-H 'Content-Type: application/json'"
    if config.api_key or config.api_key_file:
        headers += ' -H "Authorization: Bearer $OPENAI_API_KEY"'
    if config.ssl_certfile:
        headers += " -k"  # the certificate may be for another name than this address
    return f"curl {url}/v1/chat/completions {headers} -d {shlex.quote(json.dumps(body))}"
