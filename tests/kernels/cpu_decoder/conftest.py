"""What all tests of the CPU decoder share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch's own threads would only wait for each other in tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.default_generator.manual_seed(5)  # torch.manual_seed takes milliseconds: it looks for devices
