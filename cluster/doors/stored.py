"""What endpoints of files and batches have in common: lists in pages, and errors of the disk."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Protocol

from starlette.requests import Request

from manta.cluster.batches.database import StorageError
from manta.cluster.batches.store import BatchStore
from manta.cluster.doors.checks import check_int, shown
from manta.cluster.doors.errors import Kind, RequestError


class Listed(Protocol):
    @property
    def id(self) -> str: ...
    def body(self) -> dict[str, Any]: ...


def opened(store: BatchStore | None) -> BatchStore:
    """Raises RequestError where the server has no folder for batches."""
    if store is None:
        message = "this server keeps no files and batches; start it with --batch-dir DIR"
        raise RequestError(message, code="not_found", kind=Kind.NOT_FOUND)
    return store


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Turns what is wrong with the disk into the client's error."""
    try:
        yield
    except StorageError as error:
        raise RequestError(str(error), code="storage_error", kind=Kind.STORAGE) from None


def read_limit(request: Request, default: int, largest: int) -> int:
    text = request.query_params.get("limit")
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text):
        raise RequestError(f"limit must be an integer, not {shown(text)}", "limit", "invalid_type")
    return check_int(int(text), "limit", 1, largest)


def read_choice(request: Request, name: str, choices: Sequence[str]) -> str | None:
    value = request.query_params.get(name)
    if value is not None and value not in choices:
        raise RequestError(f"{name} must be {' or '.join(choices)}, not {shown(value)}", name)
    return value


def page(found: Sequence[Listed], limit: int) -> dict[str, Any]:
    """The list object of the OpenAI API; one of `found` more than `limit` tells that there are others."""
    listed = found[:limit]
    return {
        "object": "list",
        "data": [each.body() for each in listed],
        "first_id": listed[0].id if listed else None,
        "last_id": listed[-1].id if listed else None,
        "has_more": len(found) > limit,
    }


def missing(kind: str, wanted: str, param: str) -> NoReturn:
    raise RequestError(f"there is no {kind} {shown(wanted)}", param, "not_found", Kind.NOT_FOUND)
