"""`manta serve`."""

import os

from manta.cluster.cli.flags import UsageError, parse_serve_config
from manta.cluster.launch.launcher import LaunchError
from manta.cluster.launch.supervisor import Supervisor
from manta.cluster.preflight import PreflightError
from manta.configs.api_keys import KEY_VARIABLE, hash_key
from manta.configs.schema import ServeConfig


def serve(argv: list[str]) -> int:
    """Serves until Ctrl-C. Raises UsageError with one sentence when the deployment cannot come up."""
    config = _with_key_of_environment(parse_serve_config(argv))
    try:
        return Supervisor(config).run()
    except (PreflightError, LaunchError) as error:
        raise UsageError(str(error)) from None


def _with_key_of_environment(config: ServeConfig) -> ServeConfig:
    """Takes the key out of the environment, which every process that is started would inherit."""
    key = os.environ.pop(KEY_VARIABLE, "")
    if not key or config.api_key:
        return config
    try:
        return config.model_copy(update={"api_key": (hash_key(key),)})
    except ValueError as error:
        raise UsageError(f"{KEY_VARIABLE}: {error}") from None
