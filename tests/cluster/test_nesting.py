"""Depth of clients' JSON beside a count by hand."""

from typing import Any

import orjson
import pytest

from manta.cluster.nesting import MAX_DEPTH, deep_field


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


@pytest.mark.parametrize("kind", ["list", "object"])
def test_the_first_field_that_is_too_deep_is_named(kind: str) -> None:
    fits, deep = nested(MAX_DEPTH, kind), nested(MAX_DEPTH + 1, kind)
    for value, found in (
        ({"x": fits, "y": [[], {}] * 500}, None),
        ({"x": fits, "y": deep, "z": deep}, "y"),
        ({"x": "[" * 10_000, "y": deep}, "y"),
    ):
        assert deep_field(orjson.dumps(value), value) == found
