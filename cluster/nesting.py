"""How deeply the JSON of clients may be nested: no deeper than what can be written again, inside something else, and
quoted in errors. Reading alone takes 1024 levels."""

from typing import Any

import orjson

MAX_DEPTH = 200
_WRITER_DEPTH = 254  # of orjson.dumps
_SHOWN_CHARACTERS = 80


def deep_field(text: bytes | bytearray, value: dict[str, Any]) -> str | None:
    """The name, or its beginning, of the first field of the object `value`, read from `text`, that is nested more than
    MAX_DEPTH deep."""
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return None
    return next((name[:_SHOWN_CHARACTERS] for name, field in value.items() if _is_deep(field)), None)


def too_deep(name: str) -> str:
    """What to tell of such a field."""
    return f"{name} is nested too deeply: at most {MAX_DEPTH} lists and objects inside each other are possible"


def _is_deep(value: Any) -> bool:
    """Lets the writer count, which is faster than a walk: what is left to its limit goes around the value."""
    for _ in range(_WRITER_DEPTH - MAX_DEPTH):
        value = [value]
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return True
    return False
