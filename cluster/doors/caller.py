"""Who makes the call under way: set by either door once its key is known, read where requests are built."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """`salt` keeps the cached prompts of this caller from all others; "" shares them."""

    tenant: str = ""
    salt: str = ""


_NOBODY = Caller()
_caller: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)


def set_caller(caller: Caller) -> None:
    """For the task that runs the call, and the tasks it starts."""
    _caller.set(caller)


def current_tenant() -> str:
    return _caller.get().tenant


def with_callers_salt(cache_salt: str) -> str:
    """The salt of a request. Tenants' names have no NUL: no salt that a client sends gets into another's cache."""
    salt = _caller.get().salt
    return f"{salt}\0{cache_salt}" if salt else cache_salt
