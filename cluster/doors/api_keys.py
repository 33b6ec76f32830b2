"""Which keys are taken at the doors, and whose they are."""

import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from manta.cluster.doors.caller import Caller
from manta.cluster.doors.errors import Kind, RequestError
from manta.configs.api_keys import TenantKey, read_key_lines, tenant_keys
from manta.configs.schema import ServeConfig

RELOAD_INTERVAL_S = 1.0  # a changed key file counts after so long at most
_SCHEME = "bearer"
_Version = tuple[int, int, int]  # of a file: when it was changed, its size, its inode
logger = logging.getLogger("manta.doors")


class KeyFileError(ValueError):
    """The key file cannot be used; the message is one sentence without any key."""


class KeyRing:
    """The keys of --api-key and of --api-key-file; without both of them everybody may call.

    The file is read again when it has changed. One that cannot be read then leaves the keys as they were; one without
    keys lets nobody in.
    """

    def __init__(
        self,
        hashes: Sequence[str] = (),
        file: Path | None = None,
        salts: bool = True,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`salts`: tenants share no cached prompts. Raises KeyFileError."""
        self._fixed = tenant_keys(hashes)
        self._file = file
        self._salts = salts
        self._clock_s = clock_s
        self._from_file: list[TenantKey] = []
        self._checked_s = clock_s()
        self._version: _Version | None = None
        if file is not None:
            self._version = _version(file)
            self._from_file = read_key_file(file)
            if not self._from_file and not self._fixed:
                raise KeyFileError(f"--api-key-file {file} holds no key")

    @classmethod
    def of(cls, config: ServeConfig) -> "KeyRing":
        """Raises KeyFileError."""
        file = Path(config.api_key_file).expanduser() if config.api_key_file else None
        return cls(config.api_key, file, config.tenant_cache_isolation)

    @property
    def is_open(self) -> bool:
        """Nobody needs a key."""
        return not self._fixed and self._file is None

    def caller(self, authorization: str | None) -> Caller:
        """Who calls with this `Authorization: Bearer KEY`. Raises RequestError (UNAUTHENTICATED)."""
        if self.is_open:
            return Caller()
        self._refresh()
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != _SCHEME or not key:
            raise _refusal("no API key was given; send it as 'Authorization: Bearer KEY'", "missing_api_key")
        tenant = self._tenant(key.strip())
        if tenant is None:
            raise _refusal("the API key is not one of this server's", "invalid_api_key")
        return Caller(tenant, tenant if self._salts else "")

    def _tenant(self, key: str) -> str | None:
        """Looks at every key there is, so that the time says nothing of where or how far one agrees."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for each in (*self._from_file, *self._fixed):
            if hmac.compare_digest(each.digest, digest) and found is None:
                found = each.tenant
        return found

    def _refresh(self) -> None:
        now_s = self._clock_s()
        if self._file is None or now_s - self._checked_s < RELOAD_INTERVAL_S:
            return
        self._checked_s = now_s
        try:
            version = _version(self._file)
            if version == self._version:
                return
            self._version = version
            self._from_file = read_key_file(self._file)
        except KeyFileError as error:
            logger.error("%s; the keys stay as they were", error)
            return
        logger.info("%d API keys read from %s", len(self._from_file), self._file)


def read_key_file(file: Path) -> list[TenantKey]:
    """Raises KeyFileError."""
    try:
        return read_key_lines(file.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise KeyFileError(f"--api-key-file {file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise KeyFileError(f"--api-key-file {file} is no UTF-8 text") from None
    except ValueError as error:
        raise KeyFileError(f"--api-key-file {file}, {error}") from None


def _version(file: Path) -> _Version:
    try:
        status = file.stat()
    except OSError as error:
        raise KeyFileError(f"--api-key-file {file} cannot be read: {error.strerror or error}") from None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _refusal(message: str, code: str) -> RequestError:
    return RequestError(message, code=code, kind=Kind.UNAUTHENTICATED)
