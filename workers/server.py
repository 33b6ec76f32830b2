"""The gRPC server of one worker, for a plain process and for a Ray actor alike."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from manta.protos.model_files_pb2_grpc import add_ModelFilesServicer_to_server
from manta.protos.worker_pb2_grpc import add_WorkerServicer_to_server
from manta.workers.lease import LEASE_S, Lease
from manta.workers.model_files import ModelFilesService
from manta.workers.service import WorkerService
from manta.workers.standby import import_all

# A Run stream holds a thread for its whole life; the rest answer Describe while old streams are still ending.
NUM_CALL_THREADS = 16

# Whoever calls may ping as often as it likes. The worker itself pings seldom and waits long: its own host may be
# loaded, and a stream lost by mistake costs an epoch.
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 100),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 100),
)


class WorkerServer:
    """Serves one rank. `host` is the address it binds and tells the other ranks; port 0 takes a free one.

    Raises OSError if this machine has no such address.

    Whoever holds it may call its methods from any thread: the work itself has its own.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        on_orphaned: Callable[[], None] | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        """on_orphaned: called, on a thread, when no scheduler was heard for `lease_s` since the first."""
        self._host = host
        self._port = port
        self._service = WorkerService(host, Lease(on_orphaned or (lambda: None), lease_s))
        self._server = grpc.server(
            ThreadPoolExecutor(NUM_CALL_THREADS, thread_name_prefix="call"), options=SERVER_OPTIONS
        )
        add_WorkerServicer_to_server(self._service, self._server)
        add_ModelFilesServicer_to_server(ModelFilesService(self._service.model_folder), self._server)

    def start(self) -> str:
        """Listens and returns "host:port". Raises RuntimeError if the port is taken.

        Torch and the models are imported behind the caller's back, while it goes through its other workers.
        """
        port = self._server.add_insecure_port(f"{self._host}:{self._port}")
        self._server.start()
        threading.Thread(target=import_all, args=(False,), daemon=True).start()
        return f"{self._host}:{port}"

    def stop(self) -> None:
        """Ends all calls and stops listening. A step under way is finished on its thread."""
        self._server.stop(grace=None).wait()
        self._service.close()
