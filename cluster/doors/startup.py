"""What can be known to be wrong with the doors before anything is started: files of keys and certificates."""

from manta.cluster.doors.api_keys import KeyFileError, KeyRing
from manta.cluster.doors.tls import CertificateError, Certificates
from manta.cluster.preflight import PreflightError
from manta.configs.schema import ServeConfig


def check_doors(config: ServeConfig) -> None:
    """Raises PreflightError."""
    try:
        KeyRing.of(config)
        Certificates.of(config)
    except (KeyFileError, CertificateError) as error:
        raise PreflightError(str(error)) from None
