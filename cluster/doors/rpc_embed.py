"""Embed: prompts become vectors, over gRPC."""

import numpy as np

from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.pooling import PoolingAsk, run_pooling
from manta.cluster.doors.rpc_answer import read_request_id
from manta.cluster.doors.service import Service
from manta.protos import inference_pb2 as pb

_OPTIONAL = ("dimensions", "normalize", "truncate_prompt_tokens", "add_special_tokens", "priority")


async def embed(service: Service, request: pb.EmbedRequest) -> pb.EmbedResponse:
    """Raises RequestError or EngineError."""
    service.running.check_open()
    request_id = read_request_id(request.request_id)
    given = {name: getattr(request, name) for name in _OPTIONAL if request.HasField(name)}
    inputs = [_input(each, f"inputs[{index}]") for index, each in enumerate(request.inputs)]
    ask = PoolingAsk(inputs or None, "inputs", model=request.model, cache_salt=request.cache_salt, **given)
    pooled = await run_pooling(service, ask, request_id, np.copy)
    return pb.EmbedResponse(
        request_id=request_id,
        embeddings=[pb.Embedding(values=vector) for vector in pooled.results],
        usage=pb.Usage(prompt_tokens=pooled.num_prompt_tokens, cached_tokens=pooled.num_cached_tokens),
    )


def _input(value: pb.EmbedInput, param: str) -> str | list[int]:
    kind = value.WhichOneof("input")
    if kind is None:
        raise RequestError(f"{param} needs text or tokens", param, "missing_required_parameter")
    return value.text if kind == "text" else list(value.tokens.ids)
