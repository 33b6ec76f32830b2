"""`manta serve`."""

from manta.cluster.cli.flags import UsageError, parse_serve_config
from manta.cluster.launch.launcher import LaunchError
from manta.cluster.launch.supervisor import Supervisor
from manta.cluster.preflight import PreflightError


def serve(argv: list[str]) -> int:
    """Serves until Ctrl-C. Raises UsageError with one sentence when the deployment cannot come up."""
    config = parse_serve_config(argv)
    try:
        return Supervisor(config).run()
    except (PreflightError, LaunchError) as error:
        raise UsageError(str(error)) from None
