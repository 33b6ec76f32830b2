"""Finds requests that make every step fail which they are part of.

When the workers of a replica fail, it is known who was part of the steps that they have not answered. Most often it
is nobody's fault: everybody goes on, gets further, and is forgotten here. Who has been part of two failures in a row
without getting further in between is a suspect. Suspects do not go back to the queue: they are let in one at a time,
and nobody enters beside them until they have got past the point where they were when it failed. Who is the only
suspect in a third failure is convicted, provided that others got on in that replica since its first: else it may be
the replica that fails whatever it does. Where there are no others to tell, or their trials failed as well, new
workers must have failed, too.

What is suspected together stands together: the samples of a prompt, the beams of a search.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from manta.scheduler.group import Group
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence, Status

NUM_SUSPECT = 2  # failures in a row that make a suspect
NUM_CONVICTED = 3
MAX_EXCUSED = 3  # failures of a replica in a row for which requests may be blamed, unless others get on in between

Unit = Group | Sequence


@dataclass(slots=True)
class _Record:
    num_tokens: int  # when it failed first
    num_good: int  # of the replica, then
    num_failures: int = 1
    num_alone: int = 0  # of these, trials
    workers: set[int] = field(default_factory=set)  # that failed


class Trials:
    """Owns the suspects that wait. `closed`: replicas that nobody plans."""

    def __init__(self, replicas: list[Replica], closed: set[int]) -> None:
        self.waiting: dict[Sequence, None] = {}
        self.num_excused = [0] * len(replicas)  # failures, by replica, that requests are blamed for
        self._replicas = replicas
        self._closed = closed
        self._expected: set[int] = set()  # replicas that have failed and will be there again
        self._records: dict[Unit, _Record] = {}
        self._under_way: dict[int, Sequence] = {}  # by replica
        self._num_good = [0] * len(replicas)  # by replica: how often others were seen to get on
        self._num_in_a_row = [0] * len(replicas)  # failures since then

    def judge(self, index: int, workers: int, num_steps: int | None, *, others_wait: bool) -> list[Unit]:
        """The replica has failed, and still has what it had then. Returns who is convicted of it. `workers` is another
        number whenever it has new ones. num_steps: so many of the steps, the oldest ones, may have to do with it."""
        replica = self._replicas[index]
        self._expected.add(index)
        self._forget_ended()
        self._look_for_good(index)
        trial = self._under_way.pop(index, None)
        lengths = _in_flight(replica, num_steps)
        for unit, num_tokens in lengths.items():
            self._note(unit, num_tokens, index, workers)
        suspects = [unit for unit in lengths if self._is_suspect(unit)]
        self._num_in_a_row[index] += 1
        if not suspects:
            return []
        if self._num_in_a_row[index] <= MAX_EXCUSED:
            self.num_excused[index] += 1
        if trial is None or suspects != [_unit(trial)]:
            return []
        record = self._records[suspects[0]]
        record.num_alone += 1
        others = others_wait or bool(self.waiting) or len(lengths) > 1
        return suspects if self._is_certain(record, index, others) else []

    def takes(self, sequence: Sequence) -> bool:
        """Whether a sequence that has lost its replica is a suspect. It waits here then, and not in the queue."""
        if not self._is_suspect(_unit(sequence)):
            return False
        self.waiting[sequence] = None
        return True

    def drop(self, sequence: Sequence) -> bool:
        """Whether a sequence that has ended waited here; it does no longer."""
        if sequence not in self.waiting:
            return False
        del self.waiting[sequence]
        return True

    def next(self, index: int, *, others_wait: bool) -> Sequence | None:
        """The suspect that the replica should let in now."""
        if not self.waiting or self.is_under_way(index) or not self._may_try(index):
            return None
        for sequence in self.waiting:
            record = self._records.get(_unit(sequence))  # none where another of its group has got past the point
            if record is None or not record.num_alone:
                return sequence
        # Those that are left have failed alone. Others come first: they show whether the replica can do anything.
        self._look_for_good(index)
        for sequence in self.waiting:
            if self._num_good[index] > self._records[_unit(sequence)].num_good:
                return sequence
        others = others_wait or bool(self._replicas[index].residents)
        return None if others else next(iter(self.waiting))

    def begin(self, index: int, sequence: Sequence) -> None:
        """The sequence has entered the replica."""
        del self.waiting[sequence]
        self._under_way[index] = sequence

    def is_under_way(self, index: int) -> bool:
        """Whether nobody may enter the replica, for a suspect is there that has not got further yet."""
        sequence = self._under_way.get(index)
        if sequence is None:
            return False
        record = self._records.get(_unit(sequence))
        replica = self._replicas[index]
        is_here = sequence.replica == index and sequence.status not in (Status.WAITING, Status.FINISHED)
        if is_here and record is not None:
            num_tokens = replica.num_tokens(sequence) if sequence.slot >= 0 else len(sequence.tokens)
            if num_tokens <= record.num_tokens + _margin(replica):
                return True
            del self._records[_unit(sequence)]
            self._note_good(index)
        del self._under_way[index]
        return False

    def expect(self, index: int, will_come: bool) -> None:
        """Whether a replica that has failed will be there again; it is there now, or never."""
        if will_come:
            self._expected.add(index)
        else:
            self._expected.discard(index)

    def _note(self, unit: Unit, num_tokens: int, index: int, workers: int) -> None:
        record = self._records.get(unit)
        if record is None or num_tokens > record.num_tokens + _margin(self._replicas[index]):
            self._records[unit] = _Record(num_tokens, self._num_good[index], workers={workers})
        else:
            record.num_failures += 1
            record.workers.add(workers)

    def _is_suspect(self, unit: Unit) -> bool:
        record = self._records.get(unit)
        return record is not None and record.num_failures >= NUM_SUSPECT

    def _is_certain(self, record: _Record, index: int, others: bool) -> bool:
        if record.num_failures < NUM_CONVICTED:
            return False
        if self._num_good[index] > record.num_good:
            return True
        return len(record.workers) > 1 and (not others or record.num_alone > 1)

    def _may_try(self, index: int) -> bool:
        """In an empty replica, if there is one or will be one: others should not suffer. Not where some are about to
        enter, who do not come from the queue."""
        replica = self._replicas[index]
        if replica.followers or replica.num_expected:
            return False
        if not replica.residents:
            return True
        others = (each for each in self._replicas if each.index not in self._closed and each.accepts)
        return not self._expected and all(_is_used(other) for other in others)

    def _look_for_good(self, index: int) -> None:
        """Whether somebody who is no suspect has got tokens from the replica in this epoch."""
        replica = self._replicas[index]
        for sequence in replica.residents.values():
            gained = replica.num_tokens(sequence) - len(sequence.tokens)
            if gained > _margin(replica) and not self._is_suspect(_unit(sequence)):
                self._note_good(index)
                return

    def _note_good(self, index: int) -> None:
        self._num_good[index] += 1
        self._num_in_a_row[index] = 0

    def _forget_ended(self) -> None:
        self._records = {unit: record for unit, record in self._records.items() if not _has_ended(unit)}


def members_of(unit: Unit) -> list[Sequence]:
    return list(unit.members) if isinstance(unit, Group) else [unit]


def _unit(sequence: Sequence) -> Unit:
    return sequence if sequence.group is None else sequence.group


def _has_ended(unit: Unit) -> bool:
    return all(member.status is Status.FINISHED for member in members_of(unit))


def _is_used(replica: Replica) -> bool:
    return bool(replica.residents or replica.followers or replica.num_expected)


def _margin(replica: Replica) -> int:
    """Tokens beyond those that are known which steps in flight may have been about."""
    return replica.capacity.max_in_flight


def _in_flight(replica: Replica, num_steps: int | None) -> dict[Unit, int]:
    """Who is part of the first steps that are not answered, with the most tokens that one of them has."""
    lengths: dict[Unit, int] = {}
    for step in islice(replica.in_flight, num_steps):
        slots: Iterable[int] = (*step.rows.slots.tolist(), *step.prefills)
        for slot in slots:
            sequence = replica.residents.get(slot)
            if sequence is not None and slot not in step.left:
                unit = _unit(sequence)
                lengths[unit] = max(lengths.get(unit, 0), replica.num_tokens(sequence))
    return lengths
