import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient
from tests.support.small_tokenizers import write_model_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def shared_doors(model_folder: Path) -> Iterator[DoorThread]:
    with DoorThread(FakeClient(), model_folder) as doors:
        yield doors


@pytest.fixture
def engine(shared_doors: DoorThread) -> FakeClient:
    shared_doors.client.reset()
    return shared_doors.client


@pytest.fixture
def doors(shared_doors: DoorThread, engine: FakeClient) -> Iterator[DoorThread]:
    """Open doors over `engine`; no test may leave a call running."""
    yield shared_doors
    deadline = time.monotonic() + 10
    while len(shared_doors.service.running):
        assert time.monotonic() < deadline, "a call is still running"
        time.sleep(0.005)


@pytest.fixture
def http(doors: DoorThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=doors.base_url, timeout=20) as client:
        yield client
