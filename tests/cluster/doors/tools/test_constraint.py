"""Forced choices as schemas: what follows them, judged by another reader of schemas, is what the parsers read."""

from typing import Any

import pytest

from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.tools.constraint import force_calls, tool_schema
from manta.cluster.doors.tools.request import ToolRequest, read_tools

TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}, "like": {"$ref": "#"}},
    "required": ["root"],
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "n": {"type": "integer"}}}},
}
OTHER = {"type": "object", "properties": {"x": {"$ref": "#/$defs/node"}}, "$defs": {"node": {"type": "string"}}}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


def resolve(schema: dict[str, Any], reference: str) -> Any:
    found: Any = schema
    for step in reference.removeprefix("#").split("/")[1:]:
        found = found[step]
    return found


def references(part: Any) -> list[str]:
    if isinstance(part, list):
        return [each for item in part for each in references(item)]
    if not isinstance(part, dict):
        return []
    own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
    return own + [each for item in part.values() for each in references(item)]


def test_references_of_several_tools_keep_their_meaning() -> None:
    schema = tool_schema(ToolRequest([tool("f", TREE), tool("g", OTHER), tool("h")], "required"))
    first, second, third = schema["items"]["anyOf"]
    assert first["properties"]["name"]["enum"] == ["f"]
    f = resolve(schema, first["properties"]["parameters"]["$ref"])
    assert resolve(schema, f["properties"]["root"]["$ref"])["properties"]["n"] == {"type": "integer"}
    assert resolve(schema, f["properties"]["like"]["$ref"]) is f
    g = resolve(schema, second["properties"]["parameters"]["$ref"])
    assert resolve(schema, g["properties"]["x"]["$ref"]) == {"type": "string"}
    assert resolve(schema, third["properties"]["parameters"]["$ref"])["additionalProperties"] is False
    assert all(resolve(schema, reference) is not None for reference in references(schema))
    assert "maxItems" not in schema
    assert tool_schema(ToolRequest([tool("h")], "required", is_parallel=False))["maxItems"] == 1


def test_a_named_function_is_its_own_schema() -> None:
    assert tool_schema(ToolRequest([tool("f"), tool("g", TREE)], "named", "g")) == TREE
    request = read_tools({"tools": [tool("g")], "tool_choice": {"type": "function", "function": {"name": "g"}}})
    sampling: dict[str, Any] = {}
    force_calls(request, sampling)
    assert sampling["structured_outputs"].grammar_text()[0] == "json_schema"


def test_what_cannot_be_forced() -> None:
    request = ToolRequest([tool("f", {"type": "object", "not": {}})], "required")
    with pytest.raises(RequestError, match="'not' is not supported") as caught:
        force_calls(request, {})
    assert caught.value.param == "tools"
    deep: Any = {}
    for _ in range(900):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="deep"):
        force_calls(ToolRequest([tool("f", deep)], "required"), {})
    with pytest.raises(RequestError, match="excludes response_format"):
        force_calls(ToolRequest([tool("f")], "required"), {"structured_outputs": {"regex": "a"}})
    sampling: dict[str, Any] = {}
    force_calls(ToolRequest([tool("f")], "auto"), sampling)
    assert sampling == {}


def test_xgrammar_accepts_what_the_parsers_read_and_nothing_else() -> None:
    xgrammar = pytest.importorskip("xgrammar")
    testing = pytest.importorskip("xgrammar.testing")
    sampling: dict[str, Any] = {}
    force_calls(ToolRequest([tool("f", TREE), tool("g", OTHER), tool("h")], "required"), sampling)
    grammar = xgrammar.Grammar.from_json_schema(sampling["structured_outputs"].grammar_text()[1])

    def fits(text: str) -> bool:
        return bool(testing._is_grammar_accept_string(grammar, text))

    assert fits('[{"name": "f", "parameters": {"root": {"next": {"n": 5}}}}]')
    assert fits('[{"name": "g", "parameters": {"x": "a"}}, {"name": "h", "parameters": {}}]')
    assert not fits('[{"name": "g", "parameters": {"x": {"n": 5}}}]')
    assert not fits('[{"name": "f", "parameters": {"root": {"n": "a"}}}]')
    assert not fits('[{"name": "i", "parameters": {}}]')
    assert not fits("[]")
