"""Calls a worker's gRPC service as the scheduler process does, one plan at a time."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any

import grpc

from manta.configs.schema import ServeConfig
from manta.protos import worker_pb2 as pb
from manta.protos.worker_pb2_grpc import WorkerStub
from tests.support.plans import Driver

DEADLINE_S = 120.0


def tiny_config(folder: Path, **overrides: Any) -> ServeConfig:
    """Small limits, float32, CPU."""
    fields: dict[str, Any] = {
        "model": str(folder), "dtype": "float32", "device": "cpu", "block_size": 8, "max_model_len": 128,
        "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 100,
    }  # fmt: skip
    return ServeConfig(**(fields | overrides))


class RunStream:
    """One open Run stream. Results come in order; None is the end of the stream, an exception its failure."""

    def __init__(self, stub: WorkerStub) -> None:
        self._plans: SimpleQueue[pb.StepPlan | None] = SimpleQueue()
        self._results: SimpleQueue[pb.StepResult | grpc.RpcError | None] = SimpleQueue()
        self.call = stub.Run(iter(self._plans.get, None))
        Thread(target=self._read, daemon=True).start()

    def send(self, plan: pb.StepPlan) -> None:
        self._plans.put(plan)

    def receive(self, timeout_s: float = DEADLINE_S) -> pb.StepResult:
        try:
            result = self._results.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError("the worker did not answer") from None
        if isinstance(result, grpc.RpcError):
            raise result
        assert result is not None, "the worker ended the stream"
        return result

    def step(self, plan: pb.StepPlan) -> pb.StepResult:
        self.send(plan)
        return self.receive()

    def close(self) -> None:
        """Says that no plans follow."""
        self._plans.put(None)

    def _read(self) -> None:
        try:
            for result in self.call:
                self._results.put(result)
            self._results.put(None)
        except grpc.RpcError as error:
            self._results.put(error)


class WorkerClient:
    """A channel to one worker."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self.stub = WorkerStub(self._channel)
        self._streams: list[RunStream] = []

    def describe(self, open_rendezvous: bool = False) -> pb.DescribeResponse:
        response: pb.DescribeResponse = self.stub.Describe(
            pb.DescribeRequest(open_rendezvous=open_rendezvous), timeout=DEADLINE_S
        )
        return response

    def load(self, config: ServeConfig, **fields: Any) -> pb.LoadResponse:
        response: pb.LoadResponse = self.load_future(config, **fields).result()
        return response

    def load_future(self, config: ServeConfig, **fields: Any) -> Any:
        fields = {"num_workers_on_host": 2} | fields
        return self.stub.Load.future(pb.LoadRequest(config_json=config.model_dump_json(), **fields), timeout=DEADLINE_S)

    def start(self, num_blocks: int = 100) -> pb.StartResponse:
        response: pb.StartResponse = self.stub.Start(pb.StartRequest(num_blocks=num_blocks), timeout=DEADLINE_S)
        return response

    def run(self) -> RunStream:
        self._streams.append(RunStream(self.stub))
        return self._streams[-1]

    def cancel_streams(self) -> None:
        """Ends the Run streams that are still open."""
        for stream in self._streams:
            stream.close()
            stream.call.cancel()
        self._streams.clear()

    def close(self) -> None:
        self.cancel_streams()
        self._channel.close()


class WorkerProcesses:
    """`manta.workers.main` as child processes, killed at the end."""

    def __init__(self, num: int) -> None:
        self.processes = [_start_worker() for _ in range(num)]
        self.clients: list[WorkerClient] = []

    def __enter__(self) -> "WorkerProcesses":
        self.clients = [_client_of(process) for process in self.processes]
        return self

    def replace(self, rank: int) -> None:
        """Kills a worker and starts another in its place."""
        _end_worker(self.processes[rank])
        self.clients[rank].close()
        self.processes[rank] = _start_worker()
        self.clients[rank] = _client_of(self.processes[rank])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for client in self.clients:
            client.close()
        for process in self.processes:
            _end_worker(process)


def _start_worker() -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "manta.workers.main", "--parent-pid", str(os.getpid())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def _client_of(process: "subprocess.Popen[str]") -> WorkerClient:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("MANTA_ADDRESS "), line
    return WorkerClient(line.split()[1])


def _end_worker(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@contextlib.contextmanager
def replica(config: ServeConfig) -> Iterator[list[WorkerClient]]:
    """The started workers of one replica, in rank order."""
    with WorkerProcesses(config.num_ranks) as workers:
        load_and_start(config, workers.clients)
        yield workers.clients


def load_and_start(config: ServeConfig, clients: list[WorkerClient], meeting: str = "") -> list[pb.LoadResponse]:
    """What the scheduler does with the workers of one replica."""
    described = [client.describe(open_rendezvous=rank == 0) for rank, client in enumerate(clients)]
    loads = []
    for rank, client in enumerate(clients):
        pp_rank, tp_rank = divmod(rank, config.tensor_parallel_size)
        loads.append(
            client.load_future(
                config,
                tp_rank=tp_rank,
                pp_rank=pp_rank,
                rendezvous_host=described[0].host,
                rendezvous_port=described[0].rendezvous_port,
                meeting=meeting,
            )
        )
    responses = [load.result() for load in loads]
    num_blocks = min(response.num_blocks for response in responses)
    starts = [client.stub.Start.future(pb.StartRequest(num_blocks=num_blocks)) for client in clients]
    for start in starts:
        start.result(timeout=DEADLINE_S)
    return responses


def run_to_the_end(driver: Driver, stream: RunStream) -> None:
    """Decodes until every sequence has all its tokens; one lane, one plan at a time."""
    while driver.unfinished:
        driver.take(stream.step(driver.plan([])))
