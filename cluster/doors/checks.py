"""Checks of single values that clients send; each raises RequestError with the name of the field."""

from typing import Any

from manta.cluster.doors.errors import RequestError

MAX_PROMPTS = 1024  # in one call
MAX_SALT_CHARACTERS = 1024
INT32 = 2**31

Prompt = str | list[int]


def check_prompts(value: Any, param: str, most: int = MAX_PROMPTS) -> list[Prompt]:
    """One or several prompts: a text, token ids, or a list of either. Raises RequestError."""
    if value is None:
        raise RequestError(f"{param} is required", param, "missing_required_parameter")
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if len(value) > most:
            message = f"{param} holds {len(value)} prompts; at most {most} are possible in one call"
            raise RequestError(message, param)
        if all(isinstance(item, str) for item in value) or all(isinstance(item, list) for item in value):
            return value
    elif value == []:
        raise RequestError(f"{param} must not be empty", param)
    raise RequestError(
        f"{param} must be a string, a list of strings, a list of token ids or a list of lists of token ids",
        param,
        "invalid_type",
    )


def check_int(value: Any, param: str, low: int, high: int) -> int:
    if type(value) is not int:
        raise RequestError(f"{param} must be an integer, not {shown(value)}", param, "invalid_type")
    if not low <= value <= high:
        raise RequestError(f"{param} must be between {low} and {high}, not {value}", param)
    return value


def check_bool(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{param} must be true or false, not {shown(value)}", param, "invalid_type")
    return value


def shown(value: Any) -> str:
    """A value as errors quote it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_salt(value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"cache_salt must be a string, not {shown(value)}", "cache_salt", "invalid_type")
    if len(value) > MAX_SALT_CHARACTERS:
        message = f"cache_salt has {len(value)} characters; at most {MAX_SALT_CHARACTERS} are possible"
        raise RequestError(message, "cache_salt")
    return value
