"""The HTTP door: all endpoints of one frontend as an ASGI application."""

import uuid

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from manta.cluster.doors.authentication import HttpKeys
from manta.cluster.doors.batches import batch_routes
from manta.cluster.doors.chat import ChatCompletions
from manta.cluster.doors.completions import Completions
from manta.cluster.doors.embeddings import Embeddings
from manta.cluster.doors.errors import Kind, RequestError, from_engine, internal
from manta.cluster.doors.exchange import Handler, JsonEndpoint, RequestIds, error_headers
from manta.cluster.doors.messages import CountTokens, Messages, tell
from manta.cluster.doors.peers import Peers
from manta.cluster.doors.responses.routes import response_routes
from manta.cluster.doors.score import Score
from manta.cluster.doors.service import Service
from manta.cluster.doors.state import State, json_response
from manta.cluster.doors.tokenization import Detokenize, Tokenize
from manta.cluster.engine.client import EngineError


def build_app(service: Service, peers: Peers | None = None) -> Starlette:
    """The application; every error it answers has the OpenAI API's body. `peers` are those who share the port."""
    posts: dict[str, Handler] = {
        "/v1/completions": Completions(service),
        "/v1/chat/completions": ChatCompletions(service),
        "/v1/embeddings": Embeddings(service),
        "/v1/score": Score(service),
        "/score": Score(service),
        "/tokenize": Tokenize(service),
        "/detokenize": Detokenize(service),
    }
    routes = [Route(path, JsonEndpoint(handler), methods=["POST"]) for path, handler in posts.items()]
    anthropic: dict[str, Handler] = {
        "/v1/messages": Messages(service),
        "/v1/messages/count_tokens": CountTokens(service),
    }
    routes += [Route(path, JsonEndpoint(handler, tell), methods=["POST"]) for path, handler in anthropic.items()]
    routes += response_routes(service, peers or Peers())
    routes += batch_routes(service.batches, routes)
    return Starlette(
        routes=routes + State(service).routes(),
        middleware=[
            Middleware(RequestIds, new_id=lambda: uuid.uuid4().hex),
            Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"]),
            Middleware(HttpKeys, keys=service.keys),
        ],
        exception_handlers={
            RequestError: _on_request_error,
            EngineError: _on_engine_error,
            HTTPException: _on_http_error,
            Exception: _on_exception,
        },
    )


def _answer(error: RequestError) -> Response:
    response = json_response(error.body(), error.kind.value.http)
    for name, value in error_headers(error):
        response.headers[name.decode()] = value.decode()
    return response


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _answer(error)


async def _on_engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    return _answer(from_engine(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: an unknown path, or a method that the path does not take."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        return _answer(RequestError(f"there is nothing at {path}", code="not_found", kind=Kind.NOT_FOUND))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{path} takes {allowed}, not {request.method}"
        response = _answer(RequestError(message, code="method_not_allowed", kind=Kind.WRONG_METHOD))
        response.headers["Allow"] = allowed
        return response
    response = _answer(RequestError(error.detail))
    response.status_code = error.status_code
    return response


async def _on_exception(request: Request, error: Exception) -> Response:
    """The server logs the traceback; the client learns that it was not its fault."""
    return _answer(internal(error))
