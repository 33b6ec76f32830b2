"""Ends this process when the one that started it is gone, so that no worker keeps a device nobody uses."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

POLL_INTERVAL_S = 0.5
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def watch_parent(parent_pid: int, on_death: Callable[[], None]) -> None:
    """Calls `on_death` once the process `parent_pid` is no longer this one's parent; main thread only.

    On Linux the kernel sends a signal at once. It does so too when only the thread that started this process has ended,
    so the signal merely makes us look; elsewhere, and in case the parent ended before we asked, a thread looks twice
    a second.
    """
    gone = threading.Event()

    def look() -> None:
        if os.getppid() != parent_pid and not gone.is_set():
            gone.set()
            on_death()

    def poll() -> None:
        while not gone.wait(POLL_INTERVAL_S):
            look()

    if sys.platform == "linux":
        signal.signal(signal.SIGUSR1, lambda *_: look())
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    threading.Thread(target=poll, name="parent-watch", daemon=True).start()
