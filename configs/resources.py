"""What a worker asks of Ray, as a flag, a file or a keyword gives it."""

import json
from collections.abc import Mapping
from math import inf


def normal_resources(value: object) -> str:
    """What `read_resources` takes, as `CPU=2,disk=1`: the form in which it goes from process to process. Raises
    ValueError."""
    return ",".join(f"{name}={amount:.15g}" for name, amount in read_resources(value).items())


def read_resources(value: object) -> dict[str, float]:
    """Amounts by Ray's names of resources, of `CPU=2,disk=1`, a JSON object or a mapping. Raises ValueError naming the
    resource."""
    if isinstance(value, str):
        value = _of_text(value.strip())
    if not isinstance(value, Mapping):
        raise ValueError('resources must be written as CPU=2,disk=1 or as JSON, {"CPU": 2}')  # noqa: TRY004
    return {str(name): _amount(str(name), amount) for name, amount in value.items()}


def _of_text(text: str) -> object:
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"resources are no JSON: {error}") from None
    amounts: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, amount = part.rpartition("=")
        if not equals or not name.strip():
            raise ValueError(f"resource {part!r} must be written as name=amount")
        amounts[name.strip()] = amount
    return amounts


def _amount(name: str, value: object) -> float:
    if name == "GPU":
        raise ValueError("a GPU is not to be asked for: every worker has one, or computes on the CPU with device=cpu")
    try:
        amount = float(value)  # type: ignore[arg-type]  # whatever float cannot read is refused
    except (TypeError, ValueError):
        amount = 0.0
    if isinstance(value, bool) or not 0 < amount < inf:
        raise ValueError(f"resource {name!r} has amount {value!r}; an amount is a number above 0")
    if amount > 1 and amount != int(amount):
        raise ValueError(f"resource {name!r} has amount {amount:g}; above 1 Ray knows whole numbers only")
    return amount
