"""Starts every part of a deployment anew, one after the other, while it serves: for new code, certificates or keys."""

import threading
from collections.abc import Callable, Sequence

from manta.cluster.launch.launcher import Part
from manta.cluster.launch.repairs import Repairs, name_of, tell


class RollingRestart:
    """Has a thread of its own. The next part is begun when the last one serves."""

    def __init__(self, repairs: Repairs, parts: Sequence[Part], clock: Callable[[], float]) -> None:
        self._repairs = repairs
        self._parts = parts
        self._clock = clock
        self._thread = threading.Thread(target=self._run, name="rolling restart", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        began_s = self._clock()
        tell(f"rolling restart of {len(self._parts)} parts")
        for part in self._parts:
            why = self._renew(part)
            if why is not None:
                tell(f"the rolling restart ends before its time: {why}")
                return
        tell(f"the rolling restart is complete after {self._clock() - began_s:.1f} s")

    def _renew(self, part: Part) -> str | None:
        """Why the others have to be left as they are, if so. A part that is given up, or was taken away
        meanwhile, is none that serves."""
        repairs = self._repairs
        with repairs.changed:
            repairs.changed.wait_for(lambda: repairs.is_closed or part not in repairs.jobs)
            if repairs.is_closed:
                return "the deployment is being taken down"
            if part in repairs.failures.given_up or (part[0] == "worker" and not repairs.has_workers(part[1])):
                return None
            tell(f"{name_of(part)} is started anew")
            repairs.renew(part)
            repairs.changed.wait_for(lambda: repairs.is_closed or part not in repairs.jobs)
            if part in repairs.failures.given_up:
                return f"{name_of(part)} does not serve"
        return None
