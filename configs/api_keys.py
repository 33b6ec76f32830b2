"""API keys as the configuration holds them: only their SHA-256, never the keys themselves."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KEY_VARIABLE = "MANTA_API_KEY"  # of the environment of `manta serve`: one key, where no flag gives any
HASHES_VARIABLE = "MANTA_API_KEY_HASHES"  # of the environment of frontend processes: hashes with commas between
MAX_KEY_CHARACTERS = 512
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TENANT_FORM = "letters, digits, dots, dashes and underscores, 64 at most"


@dataclass(frozen=True, slots=True)
class TenantKey:
    """Whom a key belongs to. Several keys may have one tenant: an old one and the one that follows it."""

    tenant: str
    digest: bytes  # SHA-256 of the key


def hash_key(key: str) -> str:
    """`sha256:<64 hex digits>` of a key; what has this form already stays as it is.

    Raises ValueError, whose message does not hold the key.
    """
    if _HASH.fullmatch(key):
        return key
    if not 0 < len(key) <= MAX_KEY_CHARACTERS or not all("!" <= character <= "~" for character in key):
        raise ValueError(f"an API key must be 1 to {MAX_KEY_CHARACTERS} printable ASCII characters without spaces")
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def hash_keys(value: object) -> object:
    """Keys of a flag, a file or a keyword, one or several, hashed. Raises ValueError."""
    keys = (value,) if isinstance(value, str | int) else value
    if not isinstance(keys, list | tuple):
        raise ValueError("API keys must be a text or a list of texts")  # noqa: TRY004 - pydantic wants a ValueError
    return tuple(hash_key(str(key)) for key in keys)


def tenant_keys(hashes: Iterable[str]) -> list[TenantKey]:
    """Keys without a name: each is a tenant of its own, called by the start of its hash."""
    return [_unnamed(each) for each in hashes]


def read_key_lines(lines: Sequence[str]) -> list[TenantKey]:
    """Keys of a file: `tenant:key` or `key` a line, the key in plain text or as `sha256:<hex>`; `#` begins a comment.

    Raises ValueError naming the line by its number; the message does not hold the key.
    """
    keys = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            keys.append(_read_key(text))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return keys


def _read_key(text: str) -> TenantKey:
    tenant, colon, key = text.partition(":")
    if not colon or _HASH.fullmatch(text):
        return _unnamed(hash_key(text))
    if not TENANT.fullmatch(tenant):
        raise ValueError(f"the tenant before the colon must be of {TENANT_FORM}")
    return TenantKey(tenant, _digest(hash_key(key.strip())))


def _unnamed(hashed: str) -> TenantKey:
    digest = _digest(hashed)
    return TenantKey(f"key-{digest.hex()[:8]}", digest)


def _digest(hashed: str) -> bytes:
    return bytes.fromhex(hashed.removeprefix("sha256:"))
