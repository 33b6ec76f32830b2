"""A worker process that waits for its turn: it has imported all it needs and has no device yet.

Most of what a new worker costs before it loads its weights are imports. One that stands by has done them when another
one dies.
"""

import gc
import importlib
import json
import os
from typing import TextIO

_CPU_ONLY = "manta.kernels.cpu_decoder.stage"


def import_all(on_cpu: bool) -> None:
    """Imports what a rank needs, without touching a device."""
    gc.disable()  # it would look again and again at modules that stay; a fifth of the time
    try:
        importlib.import_module("manta.workers.rank")
        if on_cpu:
            importlib.import_module(_CPU_ONLY)
    finally:
        gc.enable()


def wait_for_turn(orders: TextIO) -> bool:
    """Reads a line, a JSON object of environment variables, and sets these; False when none comes any more.

    CUDA reads which devices it may use when it is first called: raises RuntimeError if that has happened.
    """
    line = orders.readline()
    if not line:
        return False
    if _has_gpu_open():
        raise RuntimeError("a worker that stood by has opened a GPU while it imported its modules")
    os.environ.update(json.loads(line))
    return True


def _has_gpu_open() -> bool:
    folder = "/proc/self/fd"
    if not os.path.isdir(folder):
        return False
    for name in os.listdir(folder):
        try:
            if os.readlink(f"{folder}/{name}").startswith("/dev/nvidia"):
                return True
        except OSError:  # the descriptor of this very listing
            continue
    return False
