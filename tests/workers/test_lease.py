"""A worker that nobody calls any more ends."""

import threading
import time

from manta.workers.lease import Lease


def test_it_lapses_after_the_last_call() -> None:
    lapsed = threading.Event()
    lease = Lease(lapsed.set, length_s=0.2, check_s=0.01)
    assert not lapsed.wait(0.4), "nobody has called yet"
    with lease.call():
        assert not lapsed.wait(0.4), "a call is under way"
    began_s = time.monotonic()
    assert lapsed.wait(20)
    assert time.monotonic() - began_s >= 0.15


def test_an_ended_lease_does_not_lapse() -> None:
    lapsed = threading.Event()
    lease = Lease(lapsed.set, length_s=0.05, check_s=0.01)
    with lease.call():
        pass
    lease.end()
    assert not lapsed.wait(0.3)
