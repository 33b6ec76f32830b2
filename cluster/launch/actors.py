"""What the Ray actors hold: the same servers that plain processes run. `on_ray` turns these classes into actors."""

import asyncio
import os
import threading

import ray


class WorkerActor:
    """One rank. Its own thread computes; the actor's methods only start and stop the gRPC server."""

    def start(self) -> str:
        """Opens the gRPC server and returns its address."""
        from manta.workers.server import WorkerServer

        # An actor whose raylet has died may live on, with its device.
        self._server = WorkerServer(ray.util.get_node_ip_address(), on_orphaned=lambda: os._exit(1))
        address: str = self._server.start()
        return address

    def stay(self) -> None:
        """Never returns: the caller learns of this actor's death by the failure of this call."""
        threading.Event().wait()


class SchedulerActor:
    """The scheduler of one served model and its step loops."""

    def __init__(self) -> None:
        self._started = asyncio.Event()

    async def start(self, config_json: str, workers: list[list[str]], port: int = 0) -> str:
        """Loads the model on the workers, starts the step loops, returns the address frontends connect to. At a `port`
        it takes the place of another."""
        from manta.cluster.engine.main import SchedulerServer

        self._server = SchedulerServer(config_json, workers, ray.util.get_node_ip_address(), port, takes_over=port != 0)
        address: str = await self._server.start()
        self._started.set()
        return address

    async def stop(self) -> None:
        await self._server.stop()

    async def stay(self) -> None:
        """As WorkerActor.stay; fails, too, when there is nothing left to schedule for."""
        await self._started.wait()
        raise RuntimeError(f"no replica is left: {await self._server.lost()}")


class FrontendActor:
    """HTTP and gRPC doors."""

    async def prepare(self, config_json: str, key_hashes: list[str]) -> None:
        """Does what needs no scheduler."""
        from manta.cluster.doors.frontend import Frontend

        self._frontend = Frontend(config_json, key_hashes)
        await self._frontend.prepare()

    async def start(self, scheduler: str, http_port: int, grpc_port: int, joins: bool) -> tuple[int, int]:
        """Listens, where others may listen already if it joins them; returns the HTTP and the gRPC port."""
        ports = await self._frontend.start(scheduler, http_port, grpc_port, joins=joins)
        return ports["http"], ports["grpc"]

    async def retire(self, grace_s: float) -> None:
        """Another one has its ports: answers those who are connected, then ends."""
        await self._frontend.retire(grace_s)
        await self._frontend.stop(0.0)
        ray.actor.exit_actor()

    async def stop(self, grace_s: float) -> None:
        await self._frontend.stop(grace_s)

    async def stay(self) -> None:
        """Never returns, as WorkerActor.stay."""
        await asyncio.Event().wait()
