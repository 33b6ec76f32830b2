"""Checks of the objects that are values of fields."""

from collections.abc import Set
from typing import Any

from manta.cluster.doors.checks import shown
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.fields import unknown_field

MAX_METADATA, MAX_KEY_CHARACTERS, MAX_VALUE_CHARACTERS = 16, 64, 512  # as in the OpenAI API


def check_object(value: Any, param: str, known: Set[str]) -> dict[str, Any]:
    """An object with no other fields than the known ones. Raises RequestError."""
    if not isinstance(value, dict):
        raise RequestError(f"{param} must be an object, not {shown(value)}", param, "invalid_type")
    for name in value.keys() - known:
        error = unknown_field(str(name), known, known)
        error.message, error.param = f"{param}: {error.message}", f"{param}.{name}"
        raise error
    return value


def read_metadata(value: Any) -> dict[str, str]:
    """Raises RequestError."""
    if not isinstance(value, dict):
        raise RequestError(f"metadata must be an object, not {shown(value)}", "metadata", "invalid_type")
    if len(value) > MAX_METADATA:
        raise RequestError(f"metadata may have up to {MAX_METADATA} keys, not {len(value)}", "metadata")
    for key, text in value.items():
        if len(key) > MAX_KEY_CHARACTERS or not isinstance(text, str) or len(text) > MAX_VALUE_CHARACTERS:
            message = (
                f"metadata: keys may have {MAX_KEY_CHARACTERS} characters, and values are strings of up to "
                f"{MAX_VALUE_CHARACTERS}; {shown(key)} breaks that"
            )
            raise RequestError(message, "metadata")
    return value
