"""Moves running sequences between replicas: with their KV blocks copied, or computed again where that is cheaper.

A sequence is frozen first: nothing more is planned of it, and when the plans that compute something of it are answered,
all its KV is in blocks that nobody writes to. Then it gives up its slot, blocks of the target are reserved, and whoever
calls `ready` copies; the source's blocks stay referenced meanwhile. With `end` the sequence joins the target, parked
with its blocks, and goes on before anyone from the queue. Where its epoch ends on either side, or copying fails, it
returns to the queue with its tokens: what is not copied is computed again.

Blocks of the target are written to until `end` is called or the target's epoch is over, whatever becomes of their
sequence. So they are given back then and not earlier. Those of the source may be read after they were given back, in
vain: what was read goes to blocks that nobody will read.
"""

from collections.abc import Iterable

from manta.scheduler.admission import blocks_for
from manta.scheduler.grouping import leaders_of
from manta.scheduler.move import Move, Part, Wish
from manta.scheduler.move_cost import MoveFigures, is_copying_cheaper
from manta.scheduler.rebalance import Rebalancer
from manta.scheduler.replica import Replica
from manta.scheduler.room import has_room, is_movable, spare_blocks
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.trials import Trials
from manta.scheduler.types import Counters
from manta.scheduler.waiting import WaitingQueue

MAX_TOGETHER = 4  # sequences that leave a replica at once: the others run meanwhile


class Moves:
    """Owns the sequences that are in no replica. `closed`: replicas that nobody plans."""

    def __init__(
        self, replicas: list[Replica], queue: WaitingQueue, counters: Counters, closed: set[int], trials: Trials
    ) -> None:
        self._replicas = replicas
        self._queue = queue
        self._counters = counters
        self._closed = closed
        self._trials = trials  # nobody moves to or from a replica where one is under way
        self._rebalancer = Rebalancer(replicas, closed, MAX_TOGETHER)
        self._wishes: list[Wish] = []
        self._under_way: dict[int, Move] = {}
        self._num_moves = 0

    @property
    def sequences(self) -> list[Sequence]:
        """Those that have left one replica and are not yet in another."""
        return [sequence for move in self._under_way.values() for sequence in move.sequences]

    @property
    def under_way(self) -> list[Move]:
        """Those that have not ended, also where no sequence waits for them any more."""
        return list(self._under_way.values())

    def wish(self, sequences: Iterable[Sequence], target: int | None = None) -> None:
        """Freezes running sequences of one replica, to move them; those that cannot move run on."""
        frozen = [sequence for sequence in sequences if is_movable(self._replicas, sequence)]
        if not frozen or self._trials.is_under_way(frozen[0].replica):
            return
        replica = self._replicas[frozen[0].replica]
        for sequence in frozen:
            replica.frozen[sequence.slot] = sequence
            replica.starved.pop(sequence.slot, None)
        self._wishes.append(Wish(replica.index, frozen, target))

    def has_others(self, source: int) -> bool:
        """Whether there is a replica that could take what another one has."""
        others = (each for each in self._replicas if each.index != source and each.index not in self._closed)
        return any(each.accepts for each in others)

    def stay(self, source: int) -> None:
        """The replica does not go after all."""
        self._replicas[source].accepts = True

    def evacuate(self, source: int) -> None:
        """The replica is about to go: it takes no new requests, and what it has moves away, a few at a time."""
        replica = self._replicas[source]
        replica.accepts = False
        waiting = [each for each in replica.followers if each.status is Status.WAITING and each.beam is None]
        replica.followers = [each for each in replica.followers if each not in waiting]
        self._requeue(waiting)

    def is_evacuated(self, source: int) -> bool:
        """Whether nothing is left that could move. Beams and prompts that become vectors do not: they begin anew."""
        replica = self._replicas[source]
        left = [*replica.residents.values(), *replica.parked]
        stays = all(each.beam is not None or each.request.pooling is not None for each in left)
        return stays and not replica.lent

    def look(self, source: int) -> None:
        """To be called when a step of `source` is answered: moves some of its sequences if others are better off."""
        if not self._is_busy(source) and source not in self._closed and self._replicas[source].accepts:
            target, sequences = self._rebalancer.look(source, has_queue=len(self._queue) > 0)
            if sequences:
                self.wish(sequences, target)

    def ready(self, figures: MoveFigures) -> list[Move]:
        """Moves whose copies can be made from now on. To be called after `wish` and `look`, and when a step is answered
        or a move has ended while `is_active`."""
        for replica in self._replicas:
            if not replica.accepts and replica.index not in self._closed and not self._is_busy(replica.index):
                self.wish(self._next_to_leave(replica))
        moves: list[Move] = []
        for wish in list(self._wishes):
            replica = self._replicas[wish.source]
            wish.sequences = [each for each in wish.sequences if replica.frozen.get(each.slot) is each]
            if not any(map(replica.is_in_flight, wish.sequences)):
                self._wishes.remove(wish)
                moves += self._begin(wish, figures)
        return moves

    @property
    def is_active(self) -> bool:
        """Whether `ready` may find something when more steps are answered."""
        return bool(self._wishes) or not all(replica.accepts for replica in self._replicas)

    def end(self, id: int, *, is_copied: bool) -> None:
        """Nobody writes to the blocks of the move any more. Moves that are not known have ended with their epoch."""
        move = self._under_way.pop(id, None)
        if move is None:
            return
        source, target = self._replicas[move.source], self._replicas[move.target]
        source.pool.release(source.lent.pop(id, []), source.last_in_flight)
        del target.reserved[id]
        target.num_expected -= len(move.sequences)
        failed = []
        for part in move.parts:
            if part.sequence is not None and is_copied and target.accepts:
                self._arrive(target, part.sequence, part)
                continue
            target.pool.release(part.blocks, target.last_in_flight)
            if part.sequence is not None:
                failed.append(part.sequence)
        self._counters.num_moves_failed += len(failed)
        self._requeue(failed)

    def lose(self, index: int) -> list[Sequence]:
        """The replica's epoch is over. Returns the sequences that were on their way from or to it; they wait now."""
        lost: list[Sequence] = []
        self._wishes = [wish for wish in self._wishes if wish.source != index]
        for move in self.under_way:
            if index not in (move.source, move.target):
                continue
            for part in move.parts:
                if part.sequence is not None:
                    lost.append(part.sequence)
                    self._forget(move, part)
            if index == move.target:  # the source may have lost them before
                source = self._replicas[move.source]
                source.pool.release(source.lent.pop(move.id, []), source.last_in_flight)
                del self._under_way[move.id]
        for sequence in lost:
            sequence.status = Status.WAITING
        self._counters.num_moves_failed += len(lost)
        return lost

    def drop(self, sequence: Sequence) -> None:
        """A sequence that is under way ends."""
        for move in self.under_way:
            for part in move.parts:
                if part.sequence is sequence:
                    self._forget(move, part)

    def _forget(self, move: Move, part: Part) -> None:
        part.sequence = None
        self._replicas[move.target].num_expected -= 1

    def _is_busy(self, source: int) -> bool:
        """Whether sequences are leaving it already."""
        return bool(self._replicas[source].lent) or any(wish.source == source for wish in self._wishes)

    def _next_to_leave(self, replica: Replica) -> list[Sequence]:
        """Members of a group go together, as their blocks are shared; whoever has no room anywhere stays for now."""
        candidates = [each for each in replica.residents.values() if is_movable(self._replicas, each)]
        candidates = [each for each in candidates if self._targets(replica, each)]
        if not candidates:
            return []
        group = candidates[0].group
        candidates.sort(key=lambda each: group is None or each.group is not group)
        return candidates[:MAX_TOGETHER]

    def _targets(self, source: Replica, sequence: Sequence) -> list[Replica]:
        """Replicas that have room for it, whatever they have cached."""
        num_blocks = blocks_for(source.num_tokens(sequence) + 1, source.capacity.block_size)
        others = (each for each in self._replicas if each is not source and self._may_take(each))
        return [each for each in others if has_room(each, num_blocks)]

    def _may_take(self, target: Replica) -> bool:
        return target.index not in self._closed and not self._trials.is_under_way(target.index)

    def _begin(self, wish: Wish, figures: MoveFigures) -> list[Move]:
        """Each goes where most of it is cached, or most is free; whoever finds no room runs on where it is."""
        source = self._replicas[wish.source]
        moves: dict[int, Move] = {}  # by target
        for sequence in wish.sequences:
            del source.frozen[sequence.slot]
            num_computed = source.num_computed(sequence)
            num_full = num_computed // source.capacity.block_size
            source.publish(sequence, num_full)  # so it knows its hashes
            found = self._choose(wish, source, sequence, num_full)
            if found is None:
                continue
            target, cached = found
            sequence.moved_at = source.num_tokens(sequence)
            num_copied = blocks_for(num_computed, source.capacity.block_size) - len(cached)
            num_missing = num_computed - len(cached) * source.capacity.block_size
            if num_missing and not is_copying_cheaper(figures, num_copied, num_missing):
                source.leave(sequence, Status.WAITING)
                target.followers.append(sequence)
                self._counters.num_moves_recomputed += 1
                continue
            if target.index not in moves:
                moves[target.index] = self._new_move(source, target)
            self._add(moves[target.index], sequence, cached)
        return list(moves.values())

    def _choose(
        self, wish: Wish, source: Replica, sequence: Sequence, num_full: int
    ) -> tuple[Replica, list[int]] | None:
        """The replica to go on in, and the blocks there that hold the sequence's first ones already."""
        best: tuple[tuple[int, int], Replica, list[int]] | None = None
        num_blocks = blocks_for(source.num_tokens(sequence) + 1, source.capacity.block_size)
        for target in self._replicas:
            if target is source or wish.target not in (None, target.index) or not self._may_take(target):
                continue
            cached = target.find_prefix(sequence)[:num_full]
            num_new = num_blocks - len(cached) + target.pool.num_unreferenced(cached)
            key = len(cached), spare_blocks(target)
            if has_room(target, num_new) and (best is None or key > best[0]):
                best = key, target, cached
        return None if best is None else best[1:]

    def _new_move(self, source: Replica, target: Replica) -> Move:
        self._num_moves += 1
        move = Move(self._num_moves, source.index, target.index, source.epoch, target.epoch)
        self._under_way[move.id] = move
        target.reserved[move.id] = []
        return move

    def _add(self, move: Move, sequence: Sequence, cached: list[int]) -> None:
        """It leaves its replica. Blocks that two of a move share at the source they share at the target."""
        source, target = self._replicas[move.source], self._replicas[move.target]
        table, num_computed = source.lend(sequence, move.id)
        target.pool.share(cached)
        blocks = list(cached)
        for block in table[len(cached) :]:
            if block in move.copies:
                target.pool.share([move.copies[block]])
            else:
                (move.copies[block],) = target.pool.take(1)
            blocks.append(move.copies[block])
        move.parts.append(Part(sequence, blocks, num_computed, len(cached)))
        target.reserved[move.id] += blocks
        target.num_expected += 1
        self._counters.num_moves_copied += 1

    def _arrive(self, target: Replica, sequence: Sequence, part: Part) -> None:
        sequence.blocks, sequence.num_published = part.blocks, part.num_cached
        sequence.num_planned = sequence.num_computed = part.num_computed
        sequence.status, sequence.replica = Status.PARKED, target.index
        sequence.rank = (sequence.rank[0], target.num_admitted)  # until it enters
        target.parked[sequence] = None
        target.followers.append(sequence)

    def _requeue(self, waiting: list[Sequence]) -> None:
        for sequence in waiting:
            sequence.status = Status.WAITING
        for sequence in reversed(leaders_of(waiting)):
            self._queue.push_front(sequence)
