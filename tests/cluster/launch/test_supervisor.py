"""What the command says when a part ends at the worst moment."""

import socket

import pytest

from manta.cluster.launch.launcher import LaunchError
from manta.cluster.launch.supervisor import Supervisor
from manta.configs.schema import ServeConfig


def test_a_scheduler_that_ends_as_soon_as_it_has_started_is_told_of_in_a_sentence() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(LaunchError, match="the scheduler has started but does not answer"):
            Supervisor(ServeConfig(model="m"))._info(f"127.0.0.1:{nobody.getsockname()[1]}")
