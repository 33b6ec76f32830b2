"""What can be known to be wrong with the doors before anything is started: key files."""

from pathlib import Path

from manta.cluster.doors.api_keys import KeyFileError, read_key_file
from manta.cluster.preflight import PreflightError
from manta.configs.schema import ServeConfig


def check_doors(config: ServeConfig) -> None:
    """Raises PreflightError."""
    try:
        if config.api_key_file and not read_key_file(Path(config.api_key_file).expanduser()) and not config.api_key:
            raise PreflightError(f"--api-key-file {config.api_key_file} holds no key")
    except KeyFileError as error:
        raise PreflightError(str(error)) from None
