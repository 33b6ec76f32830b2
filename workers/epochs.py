"""Which plans a rank follows: those of the current epoch, each with the next step number."""

from manta.protos.worker_pb2 import StepPlan


class RefusedPlanError(RuntimeError):
    """The plan is of a past epoch, out of order, or of an epoch in which this rank has failed."""


class EpochGuard:
    """Owns epoch and step number. A higher epoch is always taken and begins with step 1. Plans of an epoch before that
    for which blocks have come are refused: they might write to these blocks."""

    def __init__(self, after: tuple[int, int] = (0, 0)) -> None:
        """after: epoch and step of the last plan that was taken before this guard; it takes any epoch."""
        self._after = after
        self._epoch = 0
        self._step = 0
        self._failure = ""
        self._blocks_epoch = 0  # the highest that blocks have come for

    @property
    def epoch(self) -> int:
        """Of the last plan that was taken; 0 before the first."""
        return self._epoch

    def admits_blocks(self, epoch: int) -> bool:
        """Whether blocks may come for plans of the epoch: that of the plans here, or a later one. They may come before
        its first plan, but then not for an earlier one any more."""
        if epoch < max(self._epoch, self._blocks_epoch):
            return False
        self._blocks_epoch = epoch
        return True

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and step of the last plan that was taken, by the guard before if this one took none: whoever asks again
        hears the same. Zeros before the first."""
        return (self._epoch, self._step) if self._epoch else self._after

    def admit(self, plan: StepPlan) -> bool:
        """True if the plan opens a new epoch, so that the rank must forget the old one. Raises RefusedPlanError."""
        if plan.epoch < self._blocks_epoch:
            raise RefusedPlanError(
                f"step {plan.step} belongs to epoch {plan.epoch}, but blocks for epoch {self._blocks_epoch} have come"
            )
        is_new = plan.epoch > self._epoch
        if is_new:
            self._epoch, self._step, self._failure = plan.epoch, 0, ""
        if plan.epoch < self._epoch:
            raise RefusedPlanError(f"step {plan.step} belongs to epoch {plan.epoch}, but epoch {self._epoch} has begun")
        if self._failure:
            raise RefusedPlanError(f"step {plan.step}: epoch {self._epoch} has failed already: {self._failure}")
        if plan.step != self._step + 1:
            raise RefusedPlanError(f"step {plan.step} came where step {self._step + 1} of epoch {self._epoch} was due")
        self._step = plan.step
        return is_new

    def fail(self, epoch: int, reason: str) -> None:
        """The rest of the epoch is refused; its first reason stays."""
        if epoch == self._epoch and not self._failure:
            self._failure = reason
