"""What can be known to be wrong with the doors before anything is started: files of keys and certificates, and the
folder of batches."""

from pathlib import Path

from manta.cluster.batches.database import StorageError, open_folder
from manta.cluster.doors.api_keys import KeyFileError, KeyRing
from manta.cluster.doors.tls import CertificateError, Certificates
from manta.cluster.preflight import PreflightError
from manta.configs.schema import ServeConfig


def check_doors(config: ServeConfig) -> None:
    """Raises PreflightError."""
    try:
        KeyRing.of(config)
        Certificates.of(config)
        if config.batch_dir is not None:
            open_folder(Path(config.batch_dir).expanduser())
    except (KeyFileError, CertificateError, StorageError) as error:
        raise PreflightError(str(error)) from None
