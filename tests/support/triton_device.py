"""Where the tests of Triton kernels run: on the GPU, or without one in Triton's interpreter, on CPU tensors."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # set by tests/conftest.py where there is no device
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
