"""What every endpoint of a frontend works with."""

import secrets
from dataclasses import dataclass, field

from manta.cluster.batches.store import BatchStore
from manta.cluster.doors.api_keys import KeyRing
from manta.cluster.doors.generation import Running
from manta.cluster.doors.validate import Validator
from manta.cluster.engine.client import Client
from manta.configs.schema import ServeConfig


@dataclass(frozen=True, slots=True)
class Service:
    """One served model behind both doors."""

    client: Client
    config: ServeConfig
    validator: Validator
    running: Running
    started_s: float  # Unix time
    keys: KeyRing = field(default_factory=KeyRing)
    batches: BatchStore | None = None  # None: it keeps no files and batches

    def free_id(self, prefix: str, wanted: str) -> str:
        """The id a call runs under; two clients that send the same X-Request-Id do not disturb each other."""
        request_id = f"{prefix}-{wanted}"
        return f"{request_id}-{secrets.token_hex(4)}" if request_id in self.running else request_id
