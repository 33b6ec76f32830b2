"""TLS of both doors: one certificate, which may be replaced while the server runs."""

import logging
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from manta.configs.schema import ServeConfig

RELOAD_INTERVAL_S = 1.0  # a replaced certificate is used for connections that begin so long after
_Version = tuple[tuple[int, int, int], ...]  # of each file: when it was changed, its size, its inode
logger = logging.getLogger("manta.doors")


class CertificateError(ValueError):
    """A certificate or key cannot be used; the message is one sentence that names the file."""


class Certificates:
    """The files of --ssl-certfile, --ssl-keyfile and --ssl-ca-certs.

    The first two are read again when one has changed and both fit each other; until then the old ones stay. gRPC asks
    for them from threads of its own.
    """

    def __init__(
        self,
        certfile: Path,
        keyfile: Path,
        ca_certs: Path | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """With `ca_certs`, clients need a certificate that one of these signs. Raises CertificateError."""
        self._files = (certfile, keyfile)
        self._ca_certs = ca_certs
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._checked_s = clock_s()
        self._version = _version(self._files)
        self._ca_bytes = None if ca_certs is None else _read(ca_certs, "--ssl-ca-certs")
        self._context = self._load()
        self._pair = (keyfile.read_bytes(), certfile.read_bytes())

    @classmethod
    def of(cls, config: ServeConfig) -> "Certificates | None":
        """None without TLS. Raises CertificateError."""
        if config.ssl_certfile is None:
            return None
        certfile = Path(config.ssl_certfile).expanduser()
        keyfile = Path(config.ssl_keyfile).expanduser() if config.ssl_keyfile else certfile
        return cls(certfile, keyfile, Path(config.ssl_ca_certs).expanduser() if config.ssl_ca_certs else None)

    def http_context(self) -> ssl.SSLContext:
        """For one server; each handshake takes the certificate of its time."""
        context = self._load()

        def choose(connection: Any, name: str | None, first: ssl.SSLContext) -> None:
            connection.context = self._current()[0]

        context.sni_callback = choose
        return context

    def rpc_credentials(self) -> grpc.ServerCredentials:
        """As http_context."""
        return grpc.dynamic_ssl_server_credentials(
            self._rpc_configuration(), self._rpc_configuration, self._ca_certs is not None
        )

    def _rpc_configuration(self) -> Any:
        return grpc.ssl_server_certificate_configuration([self._current()[1]], self._ca_bytes)

    def _current(self) -> tuple[ssl.SSLContext, tuple[bytes, bytes]]:
        with self._lock:
            now_s = self._clock_s()
            if now_s - self._checked_s >= RELOAD_INTERVAL_S:
                self._checked_s = now_s
                self._refresh()
            return self._context, self._pair

    def _refresh(self) -> None:
        try:
            version = _version(self._files)
            if version == self._version:
                return
            context = self._load()
            certfile, keyfile = self._files
            self._pair = (keyfile.read_bytes(), certfile.read_bytes())
        except (CertificateError, OSError) as error:  # one of the two is replaced before the other: soon they fit again
            logger.warning("%s; the old certificate stays in use", error)
            return
        self._context, self._version = context, version
        logger.info("certificate read again from %s", self._files[0])

    def _load(self) -> ssl.SSLContext:
        certfile, keyfile = self._files
        _read(certfile, "--ssl-certfile")
        _read(keyfile, "--ssl-keyfile")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(certfile, keyfile, password=_no_password)
        except ssl.SSLError as error:
            raise CertificateError(_why(error, certfile, keyfile)) from None
        except _PasswordError:
            message = f"--ssl-keyfile {keyfile} has a password; give a key without one"
            raise CertificateError(message) from None
        if self._ca_certs is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self._ca_certs)
            except ssl.SSLError:
                raise CertificateError(f"--ssl-ca-certs {self._ca_certs} holds no certificate in PEM") from None
        return context


class _PasswordError(Exception):
    """Raised instead of asking at the terminal."""


def _no_password() -> str:
    raise _PasswordError


def _why(error: ssl.SSLError, certfile: Path, keyfile: Path) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"--ssl-keyfile {keyfile} is not the key of --ssl-certfile {certfile}"
    if b"-----BEGIN CERTIFICATE-----" not in certfile.read_bytes():
        return f"--ssl-certfile {certfile} holds no certificate in PEM"
    if b"PRIVATE KEY-----" not in keyfile.read_bytes():
        return f"--ssl-keyfile {keyfile} holds no private key in PEM"
    return f"--ssl-certfile {certfile} with --ssl-keyfile {keyfile} cannot be used: {error.reason or error}"


def _read(file: Path, flag: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CertificateError(f"{flag} {file} cannot be read: {error.strerror or error}") from None


def _version(files: tuple[Path, ...]) -> _Version:
    try:
        states = [file.stat() for file in files]
    except OSError as error:
        raise CertificateError(f"certificate {error.filename} cannot be read: {error.strerror or error}") from None
    return tuple((state.st_mtime_ns, state.st_size, state.st_ino) for state in states)
