"""Batches of one frontend, put together: the folder, and what runs the lines when it is this frontend's turn."""

from dataclasses import replace
from pathlib import Path

from manta.cluster.batches.background import BackgroundClient
from manta.cluster.batches.gate import Gate, Room
from manta.cluster.batches.keeper import Keeper
from manta.cluster.batches.runner import Runner
from manta.cluster.batches.store import BatchStore
from manta.cluster.doors import patience
from manta.cluster.doors.generation import Running
from manta.cluster.doors.http import build_app
from manta.cluster.doors.local_calls import LocalCalls
from manta.cluster.doors.service import Service
from manta.configs.schema import ServeConfig


async def open_store(config: ServeConfig) -> BatchStore | None:
    """None without --batch-dir. Raises StorageError."""
    if config.batch_dir is None:
        return None
    folder = Path(config.batch_dir).expanduser()
    return await BatchStore.open(folder, config.max_batch_file_bytes, config.max_batch_bytes)


def new_keeper(service: Service, store: BatchStore) -> Keeper:
    """Lines go through endpoints of their own. These differ in that their requests have the lowest priority, and that
    they remember no responses."""
    config = service.config.model_copy(update={"max_stored_responses": 0})
    client = BackgroundClient(service.client)
    running = Running(client, service.validator.tokenizer)
    background = replace(service, client=client, config=config, running=running, batches=None)
    calls = LocalCalls(build_app(background).routes, config.tenant_cache_isolation)
    num_slots = config.max_num_seqs * config.max_num_replicas
    gate = Gate(service.client.load, Room(num_slots, config.max_num_batch_seqs))
    return Keeper(store, Runner(store, calls, gate, patience.MAX_BODY_BYTES), gate)
