"""Shares of tenants as a flag, a file or a keyword gives them."""

import json
from collections.abc import Mapping
from math import inf

from manta.configs.api_keys import TENANT, TENANT_FORM


def normal_weights(value: object) -> str:
    """What `read_weights` takes, as `a=2,b=1`: the form in which it goes from process to process. Raises ValueError."""
    return ",".join(f"{tenant}={weight:.15g}" for tenant, weight in read_weights(value).items())


def read_weights(value: object) -> dict[str, float]:
    """Weights by tenant, of `a=2,b=1`, a JSON object or a mapping. Raises ValueError naming the tenant."""
    if isinstance(value, str):
        value = _of_text(value.strip())
    if not isinstance(value, Mapping):
        raise ValueError('tenant weights must be written as a=2,b=1 or as JSON, {"a": 2, "b": 1}')  # noqa: TRY004
    weights = {str(tenant): _weight(str(tenant), weight) for tenant, weight in value.items()}
    for tenant in weights:
        if not TENANT.fullmatch(tenant):
            raise ValueError(f"{tenant!r} is no tenant; names are of {TENANT_FORM}")
    return weights


def _of_text(text: str) -> object:
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"tenant weights are no JSON: {error}") from None
    weights: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        tenant, equals, weight = part.rpartition("=")
        if not equals:
            raise ValueError(f"tenant weight {part!r} must be written as tenant=weight")
        weights[tenant.strip()] = weight
    return weights


def _weight(tenant: str, value: object) -> float:
    try:
        weight = float(value)  # type: ignore[arg-type]  # whatever float cannot read is refused
    except (TypeError, ValueError):
        weight = 0.0
    if isinstance(value, bool) or not 0 < weight < inf:
        raise ValueError(f"tenant {tenant!r} has weight {value!r}; a weight is a number above 0")
    return weight
