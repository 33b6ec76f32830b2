"""What an output must look like: one constraint, in the words of clients, and as the grammar that workers follow."""

import json as json_library
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from manta.configs.json_schema import check_schema

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_DEPTH = 64  # of brackets within brackets
MAX_CHOICES = 1024
CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")

GrammarKind = Literal["json_schema", "regex", "ebnf", "structural_tag"]
_KINDS: dict[str, GrammarKind] = {"json": "json_schema", "regex": "regex", "grammar": "ebnf"}


def _as_choices(value: object) -> object:
    """Strict validation takes no list for a tuple."""
    return tuple(value) if isinstance(value, list) else value


class StructuredOutputsParams(BaseModel):
    """Exactly one constraint, with vLLM's names. Frozen; raises pydantic.ValidationError saying what is wrong.

    Whether the text of a regex or grammar can be used is only known when it is compiled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    json_: Annotated[Any, Field(alias="json", description="a JSON schema: an object, or its text")] = None
    regex: str | None = Field(default=None, description="the whole output matches it")
    choice: Annotated[tuple[str, ...] | None, BeforeValidator(_as_choices)] = Field(
        default=None, min_length=1, max_length=MAX_CHOICES, description="the output is one of these texts"
    )
    grammar: str | None = Field(
        default=None, description="EBNF as of llama.cpp; the output is what its rule `root` writes"
    )
    json_object: bool | None = Field(default=None, description="the output is any JSON object")
    structural_tag: Any = Field(default=None, description="xgrammar's structural tag: an object, or its text")

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in CONSTRAINTS if self._given(name) is not None]
        if len(given) != 1:
            known = ", ".join(CONSTRAINTS)
            raise ValueError(f"structured_outputs needs exactly one of {known}; it has {', '.join(given) or 'none'}")
        if self.choice is not None and not all(self.choice):
            raise ValueError("structured_outputs.choice must not hold an empty text")
        kind, text = self.grammar_text()
        size = len(text.encode(errors="surrogatepass"))
        if size > MAX_GRAMMAR_BYTES:
            raise ValueError(
                f"structured_outputs.{given[0]} has {size} bytes; at most {MAX_GRAMMAR_BYTES} are possible"
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"structured_outputs.{given[0]} is no valid Unicode text")
        if kind in ("json_schema", "structural_tag"):
            value = _read_json(text, given[0])
            if kind == "json_schema":
                check_schema(value)
        elif not self.choice and _depth(text) > MAX_DEPTH:
            raise ValueError(f"structured_outputs.{given[0]} nests brackets more than {MAX_DEPTH} deep")
        return self

    def grammar_text(self) -> tuple[GrammarKind, str]:
        """The constraint as what is compiled."""
        if self.json_object:
            return "json_schema", '{"type":"object"}'
        if self.choice is not None:
            return "ebnf", "root ::= " + " | ".join(map(_literal, dict.fromkeys(self.choice)))
        if self.structural_tag is not None:
            return "structural_tag", _as_text(self.structural_tag, "structural_tag")
        name = next(name for name in _KINDS if self._given(name) is not None)
        value = self._given(name)
        return _KINDS[name], _as_text(value, "json") if name == "json" else value

    def _given(self, name: str) -> Any:
        value = getattr(self, "json_" if name == "json" else name)
        return None if name == "json_object" and value is False else value


def as_structured_outputs(value: object) -> object:
    """Builds the constraint from a mapping; errors are one sentence. For use as a validator of a field."""
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("structured_outputs must be an object")  # noqa: TRY004 (pydantic reports ValueErrors)
    known = {name: each for name, each in value.items() if each is not None}
    for name in known.keys() - set(CONSTRAINTS):
        raise ValueError(f"structured_outputs has an unknown field {name!r}; known ones: {', '.join(CONSTRAINTS)}")
    expected = {"regex": str, "grammar": str, "choice": list | tuple, "json_object": bool}
    for name, kinds in expected.items():
        if name in known and not isinstance(known[name], kinds):
            raise ValueError(f"structured_outputs.{name} must be {_WORDS[name]}")
    if not all(isinstance(each, str) for each in known.get("choice", ())) or known.get("choice") == []:
        raise ValueError(f"structured_outputs.choice must be {_WORDS['choice']}")
    if len(known.get("choice", ())) > MAX_CHOICES:
        raise ValueError(f"structured_outputs.choice has more than {MAX_CHOICES} texts")
    return StructuredOutputsParams.model_validate(known)


_WORDS = {"regex": "a text", "grammar": "a text", "choice": "a list of texts", "json_object": "true or false"}


def _as_text(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, type) and issubclass(value, BaseModel):
        value = value.model_json_schema()
    if not isinstance(value, Mapping | bool):
        raise ValueError(f"structured_outputs.{name} must be an object or the text of one")  # noqa: TRY004
    try:
        return json_library.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"structured_outputs.{name} cannot be written as JSON") from None


def _read_json(text: str, name: str) -> Any:
    if _depth(text) > MAX_DEPTH:
        raise ValueError(f"structured_outputs.{name} nests brackets more than {MAX_DEPTH} deep")
    try:
        return json_library.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs.{name} is not valid JSON: {error}") from None


def _depth(text: str) -> int:
    """Of brackets within brackets. Those inside of strings count too, which errs on the safe side."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def _literal(text: str) -> str:
    """A text in EBNF."""
    return json_library.dumps(text, ensure_ascii=False).replace("\x7f", "\\x7f")
