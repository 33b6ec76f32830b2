"""Which JSON schemas can be followed: those of which every keyword that restricts the output can be turned into a
grammar. A keyword that would be ignored is an error, with its place in the schema."""

from collections.abc import Iterator
from typing import Any

# They restrict what is valid, and no grammar is made of them.
_UNSUPPORTED = frozenset(
    {
        "uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else", "dependentRequired",
        "dependentSchemas", "dependencies", "unevaluatedItems", "$dynamicRef", "$recursiveRef", "additionalItems",
    }
)  # fmt: skip
# Values of which nothing is asked.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"uniqueItems": (False,), "unevaluatedItems": (True, False)}
# Where one of the first stands, all that restricts beside it is ignored.
_WHOLE = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
_RESTRICTING = frozenset(
    {
        "type", "properties", "required", "additionalProperties", "patternProperties", "propertyNames",
        "minProperties", "maxProperties", "unevaluatedProperties", "items", "prefixItems", "minItems", "maxItems",
        "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
        "multipleOf", *_WHOLE,
    }
)  # fmt: skip
# They are ignored without a type.
_NEED_TYPE = frozenset(
    {
        "pattern", "minLength", "maxLength", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
        "multipleOf", "minItems", "maxItems", "patternProperties", "propertyNames", "minProperties", "maxProperties",
    }
)  # fmt: skip
# Of two of these only one is followed.
_EXCLUDE = (
    ("pattern", ("minLength", "maxLength", "format")),
    ("format", ("minLength", "maxLength")),
    ("multipleOf", ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    ("patternProperties", ("properties",)),
)
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE_SCHEMAS = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties")
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
    "array": (list,), "object": (dict,),
}  # fmt: skip


def check_schema(schema: Any) -> None:
    """Raises ValueError naming the place and what cannot be followed."""
    if not isinstance(schema, dict | bool):
        raise ValueError("structured_outputs.json must be a JSON schema: an object")  # noqa: TRY004
    for place, part in _parts(schema, "#"):
        _check_part(place, part, schema)


def _parts(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within the schema, with its place."""
    if not isinstance(schema, dict):
        return
    yield place, schema
    for name in _SCHEMAS_BY_NAME:
        inner = schema.get(name)
        for key, value in inner.items() if isinstance(inner, dict) else ():
            yield from _parts(value, f"{place}/{name}/{key}")
    for name in _LISTS_OF_SCHEMAS:
        inner = schema.get(name)
        for index, value in enumerate(inner if isinstance(inner, list) else ()):
            yield from _parts(value, f"{place}/{name}/{index}")
    for name in _SINGLE_SCHEMAS:
        yield from _parts(schema.get(name), f"{place}/{name}")


def _check_part(place: str, part: dict[str, Any], root: Any) -> None:
    for name in sorted(_UNSUPPORTED & part.keys()):
        if not any(part[name] is neutral for neutral in _NEUTRAL.get(name, ())):
            raise _error(place, f"{name!r} is not supported")
    if "type" not in part and _NEED_TYPE & part.keys():
        raise _error(place, f"{sorted(_NEED_TYPE & part.keys())[0]!r} needs a 'type' beside it")
    for name, others in _EXCLUDE:
        if name in part and part.keys() & set(others):
            raise _error(place, f"{name!r} beside {sorted(part.keys() & set(others))[0]!r} is not supported")
    if "multipleOf" in part and part["type"] != "integer":
        raise _error(place, "'multipleOf' needs the type 'integer'")
    if isinstance(part.get("allOf"), list) and len(part["allOf"]) > 1:
        raise _error(place, "'allOf' of several schemas is not supported")
    whole = next((name for name in _WHOLE if name in part), None)
    beside = part.keys() & _RESTRICTING - {whole} if whole else set()
    if whole in ("const", "enum") and "type" in beside:
        _check_values(place, part, whole)
        beside -= {"type"}
    if beside:
        raise _error(place, f"{sorted(beside)[0]!r} beside {whole!r} is not supported")
    if "$ref" in part:
        _check_reference(place, part["$ref"], root)
    properties = part.get("properties", {})
    required = part.get("required", [])
    if isinstance(required, list) and isinstance(properties, dict):
        unlisted = [name for name in required if name not in properties]
        if unlisted:
            raise _error(place, f"'required' names {unlisted[0]!r}, which is not among 'properties'")


def _check_values(place: str, part: dict[str, Any], whole: str) -> None:
    types = part["type"] if isinstance(part["type"], list) else [part["type"]]
    values = part[whole] if whole == "enum" else [part[whole]]
    for value in values if isinstance(values, list) else ():
        fits = any(
            isinstance(value, _TYPES.get(name, (object,))) and (name == "boolean" or not isinstance(value, bool))
            for name in types
        )
        if not fits:
            raise _error(place, f"{value!r} of {whole!r} is not of the type {part['type']!r}")


def _check_reference(place: str, reference: Any, root: Any) -> None:
    """References within the schema are followed, no others."""
    found = root
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise _error(place, f"'$ref' must begin with '#/', not {reference!r}")
    for step in reference.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            raise _error(place, f"'$ref' names {reference!r}, which is not there")


def _error(place: str, message: str) -> ValueError:
    return ValueError(f"structured_outputs.json cannot be followed: at {place}, {message}")
