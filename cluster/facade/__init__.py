"""What users import: `from manta import LLM, SamplingParams`. Names load on first use, so `import manta` is free."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manta.cluster.async_llm import AsyncLLM
    from manta.cluster.doors.errors import RequestError
    from manta.cluster.engine.outputs import RequestOutput
    from manta.cluster.llm import LLM
    from manta.configs.beam_search import BeamSearchParams
    from manta.configs.pooling import PoolingParams
    from manta.configs.sampling import RequestOutputKind, SamplingParams
    from manta.configs.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "PoolingParams",
    "RequestError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

_HOMES = {
    "LLM": "manta.cluster.llm",
    "AsyncLLM": "manta.cluster.async_llm",
    "BeamSearchParams": "manta.configs.beam_search",
    "PoolingParams": "manta.configs.pooling",
    "RequestError": "manta.cluster.doors.errors",
    "RequestOutput": "manta.cluster.engine.outputs",
    "RequestOutputKind": "manta.configs.sampling",
    "SamplingParams": "manta.configs.sampling",
    "StructuredOutputsParams": "manta.configs.structured_outputs",
}

# In a wheel the other folders lie beside this file. In a checkout (an editable install) they lie two levels up, and
# the editable finder looks for packages without an __init__.py only under namespace packages, which `manta` is not.
_here = Path(__file__).parent
if _here.name == "facade":
    __path__.append(str(_here.parents[1]))


def __getattr__(name: str) -> Any:
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("manta")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'manta' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
