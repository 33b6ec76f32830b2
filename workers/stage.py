"""One rank's stage as its runner gets it."""

from dataclasses import dataclass

from manta.kernels.metadata import KVCache
from manta.workers.limits import Limits
from manta.workers.mesh import Mesh
from manta.workers.model import HiddenShape, Model


@dataclass(frozen=True, slots=True)
class Stage:
    """The layers of a rank, where they keep keys and values, whom they talk to, and the sizes of steps."""

    model: Model
    mesh: Mesh
    kv_cache: KVCache
    limits: Limits
    hidden: HiddenShape
