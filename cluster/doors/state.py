"""Endpoints that tell the state of the server: health, load, metrics, block tables, models, version."""

import asyncio
from collections.abc import Awaitable
from importlib import metadata
from typing import Any, TypeVar

import orjson
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from manta.cluster.doors.block_picture import draw_blocks
from manta.cluster.doors.errors import Kind, RequestError
from manta.cluster.doors.service import Service
from manta.cluster.engine.client import EngineError

ANSWER_TIMEOUT_S = 5.0  # an engine that says nothing for so long is not healthy
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus exposition format

T = TypeVar("T")


class State:
    """GET endpoints over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health),
            Route("/ping", self.health, methods=["GET", "POST"]),
            Route("/ready", self.ready),
            Route("/health/ready", self.ready),
            Route("/live", self.live),
            Route("/health/live", self.live),
            Route("/load", self.load),
            Route("/metrics", self.metrics),
            Route("/block_tables", self.block_tables),
            Route("/version", self.version),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
        ]

    async def health(self, request: Request) -> Response:
        """200 while the engine answers and is healthy, 503 with the reason otherwise. What is wrong with replicas
        beside others that serve is told, too."""
        detail = await check_health(self._service)
        return json_response({"status": "ok"} | ({"detail": detail} if detail else {}))

    async def live(self, request: Request) -> Response:
        """200 while this process answers at all: what tells whether to restart it."""
        return json_response({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """As health, and 503 once the server drains."""
        self._service.running.check_open()
        await check_health(self._service)
        return json_response({"status": "ready"})

    async def load(self, request: Request) -> Response:
        load = as_json(await answer_in_time(self._service.client.load()))
        return json_response({"server_load": len(self._service.running), **load})

    async def metrics(self, request: Request) -> Response:
        text = await answer_in_time(self._service.client.metrics())
        return Response(text, media_type=METRICS_TYPE)

    async def block_tables(self, request: Request) -> Response:
        """JSON, or with ?format=text the picture."""
        kind = request.query_params.get("format", "json")
        if kind not in ("json", "text"):
            raise RequestError(f"format must be json or text, not {kind!r}", "format")
        tables = await answer_in_time(self._service.client.block_tables())
        if kind == "text":
            return PlainTextResponse(draw_blocks(tables) + "\n")
        return json_response(as_json(tables))

    async def version(self, request: Request) -> Response:
        return json_response({"version": manta_version()})

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        self._service.validator.check_model(request.path_params["name"])
        return json_response(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.config.model_name,
            "object": "model",
            "created": int(service.started_s),
            "owned_by": "manta",
            "root": service.config.model,
            "parent": None,
            "max_model_len": service.validator.limits.max_model_len,
        }


async def check_health(service: Service) -> str:
    """What is wrong with some replica, "" if nothing is. Raises RequestError (UNAVAILABLE) when none serves."""
    try:
        load = await answer_in_time(service.client.load())
    except EngineError as error:
        raise RequestError(str(error), code="engine_unavailable", kind=Kind.UNAVAILABLE)
    if not load.healthy:
        message = load.detail or "the engine is not healthy"
        raise RequestError(message, code="engine_unhealthy", kind=Kind.UNAVAILABLE)
    return load.detail


async def answer_in_time(answer: Awaitable[T]) -> T:
    try:
        return await asyncio.wait_for(answer, ANSWER_TIMEOUT_S)
    except TimeoutError:
        message = f"the engine did not answer within {ANSWER_TIMEOUT_S:g} s"
        raise RequestError(message, code="engine_unavailable", kind=Kind.UNAVAILABLE)


def as_json(message: Message) -> dict[str, Any]:
    """All fields of a protobuf message under their proto names, zeros included."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def manta_version() -> str:
    try:
        return metadata.version("manta")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
