"""The flags of `manta serve`, made from the fields of ServeConfig: nothing is listed twice."""

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliPositionalArg, CliSettingsSource

from manta.configs.schema import ServeConfig


class UsageError(Exception):
    """What the user typed cannot be used; the message is one sentence that says what would work."""


class _ServeArgs(BaseSettings, ServeConfig):  # type: ignore[misc]  # both have a model_config
    """ServeConfig with the model as a positional argument. Only its fields are read: it is never built."""

    model: CliPositionalArg[str]


class Parser(argparse.ArgumentParser):
    """argparse with errors raised, and the nearest flag named for one that does not exist."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            unknown = next((word for word in message.removeprefix(prefix).split() if word.startswith("-")), None)
            if unknown:
                known = [flag for action in self._actions for flag in action.option_strings]
                near = difflib.get_close_matches(unknown.split("=")[0], known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"{self.prog} --help lists the flags"
                raise UsageError(f"unknown flag {unknown}; {hint}")
        raise UsageError(message)


def parse_serve_config(argv: list[str]) -> ServeConfig:
    """ServeConfig from the words after `manta serve`; flags win over --config. Raises UsageError."""
    parser = Parser(
        prog="manta serve",
        usage="manta serve MODEL [flags]",
        description="Serve a model over HTTP (OpenAI-compatible) and gRPC.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the settings below; flags win over it")
    own, rest = _split_config(parser, argv)
    source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
        _ServeArgs,
        root_parser=parser,
        add_argument_method=_GroupedArguments(),
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_parse_args=rest,
    )
    values = (read_config_file(Path(own)) if own else {}) | source()
    if not values.get("model"):
        raise UsageError("name the model to serve: manta serve MODEL, or manta serve --config FILE")
    return build_config(values)


def build_config(values: dict[str, Any]) -> ServeConfig:
    """Validates settings by name. Raises UsageError with one sentence."""
    try:
        return ServeConfig(**values)
    except ValidationError as error:
        raise UsageError(_sentence(error)) from None


def read_config_file(path: Path) -> dict[str, Any]:
    """Settings of a YAML file; names may be written with dashes or underscores. Raises UsageError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold 'name: value' lines")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in values:
        if name not in ServeConfig.model_fields:
            near = difflib.get_close_matches(name, ServeConfig.model_fields, n=1)
            raise UsageError(
                f"--config {path}: unknown setting {name!r}" + (f"; did you mean {near[0]}?" if near else "")
            )
    return values


def _split_config(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[str | None, list[str]]:
    """Takes --config out, since it is no field of ServeConfig."""
    early = Parser(add_help=False, allow_abbrev=False, prog=parser.prog)
    early.add_argument("--config")
    own, rest = early.parse_known_args(argv)
    return own.config, rest


class _GroupedArguments:
    """Puts each flag under the heading its field names, with unit and default in the help."""

    def __init__(self) -> None:
        self._groups: dict[str, Any] = {}

    def __call__(self, parser: argparse.ArgumentParser, *names: str, **kwargs: Any) -> argparse.Action:
        name = kwargs.get("dest") or names[0]
        field = ServeConfig.model_fields[name]
        extra = field.json_schema_extra
        assert isinstance(extra, dict), f"{name} has no group"
        title = str(extra["group"])
        if title not in self._groups:
            self._groups[title] = parser.add_argument_group(title)
        kwargs["help"] = _help(field)
        if name == "model":
            return self._groups[title].add_argument(  # type: ignore[no-any-return]
                "model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=kwargs["help"]
            )
        if "metavar" in kwargs:
            kwargs["metavar"] = _METAVARS.get(kwargs["metavar"], kwargs["metavar"])
        short = (f"-{extra['short']}",) if extra.get("short") else ()
        return self._groups[title].add_argument(*names, *short, **kwargs)  # type: ignore[no-any-return]


_METAVARS = {"int": "N", "float": "X", "str": "TEXT", "ByteSize": "BYTES"}


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    if field.is_required() or field.default in (None, ()):
        return text
    default = (
        {True: "on", False: "off"}.get(field.default, field.default)
        if isinstance(field.default, bool)
        else field.default
    )
    return f"{text} (default: {default})"


def _sentence(error: ValidationError) -> str:
    """The first problem as one sentence: which flag, what was given, what would work."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, ServeConfig.model_fields, n=1)
        return f"unknown setting {name!r}" + (f"; did you mean {near[0]}?" if near else "")
    flag = "--" + name.replace("_", "-")
    if not ServeConfig.model_fields[name].repr:  # a secret
        return f"{flag}: {message}"
    return f"{flag}: {message[:1].lower()}{message[1:]}, not {first['input']!r}"


def fail(message: str) -> NoReturn:
    """Ends the command with one line on stderr."""
    print(f"manta: error: {message}", file=sys.stderr)
    raise SystemExit(2)
