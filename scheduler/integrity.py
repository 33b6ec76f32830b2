"""Checks the scheduler's books against each other. Raises AssertionError that names what is broken."""

from collections import Counter
from collections.abc import Iterable

from manta.scheduler.block_pool import BlockPool
from manta.scheduler.fair_queue import FairQueue
from manta.scheduler.group import Group
from manta.scheduler.lane import Lane
from manta.scheduler.moves import Moves
from manta.scheduler.placement import Placement
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.waiting import WaitingQueue


def check_replica(replica: Replica) -> None:
    residents = list(replica.residents.values())
    tables = Counter(block for sequence in [*residents, *replica.parked] for block in sequence.blocks)
    for blocks in (*replica.lent.values(), *replica.reserved.values()):
        tables.update(blocks)
    check_pool(replica.pool, tables)
    assert bool(replica.in_flight) or not replica.pool.limbo, "blocks are in limbo with nothing in flight"
    assert all(until <= replica.step for until, _ in replica.pool.limbo.values()), "a block waits for an unplanned step"
    _check_slots(replica)
    for sequence in replica.parked:
        name = f"a parked sequence of request {sequence.request.id}"
        assert (sequence.status, sequence.replica) == (Status.PARKED, replica.index), f"{name} is elsewhere"
        expected = -(-sequence.num_computed // replica.capacity.block_size)
        assert sequence.slot == -1, f"{name} has a slot"
        assert len(sequence.blocks) == expected, f"{name} has {len(sequence.blocks)} blocks, not {expected}"
    for sequence in replica.followers:
        assert sequence.status in (Status.WAITING, Status.PARKED), f"a follower is {sequence.status.value}"
    stop_ids = (token for sequence in residents for token in sequence.request.stop_token_ids)
    assert replica.stops.agrees_with(stop_ids), "the stop table is not that of the resident sequences"
    for sequence in residents:
        if replica.meter is not None:
            number = replica.meter.number(sequence.request.tenant)
            assert replica.tenants[sequence.slot] == number, f"slot {sequence.slot} is charged to another tenant"
        _check_table(replica, sequence)
        _check_hashes(replica, sequence)
    for lane in replica.lanes:
        _check_lane(lane, [sequence for sequence in residents if sequence.lane == lane.index])
    for slot, sequence in replica.starved.items():
        assert replica.residents.get(slot) is sequence, f"slot {slot} is starved and not resident"
    for slot, sequence in replica.frozen.items():
        assert replica.residents.get(slot) is sequence, f"slot {slot} is frozen and not resident"
        assert sequence.status in (Status.PREFILLING, Status.DECODING), f"slot {slot} is frozen and ends"
        assert slot not in replica.starved, f"slot {slot} is frozen and waits for a block"
    assert len(replica.in_flight) <= replica.capacity.max_in_flight, "too many plans in flight"
    steps = [step.step for step in replica.in_flight]
    assert steps == list(range(replica.step - len(steps) + 1, replica.step + 1)), f"steps {steps} are in flight"


def check_pool(pool: BlockPool, tables: Counter[int]) -> None:
    """`tables` counts how often each block is in a block table."""
    blank = set(pool.blank)
    assert len(blank) == len(pool.blank), "a block is twice among the blank ones"
    for block in range(pool.num_blocks):
        refs = pool.refs[block]
        states = (refs > 0) + (block in pool.limbo) + (block in pool.cached) + (block in blank)
        assert refs == tables[block], f"block {block} has {refs} references and is in {tables[block]} tables"
        assert states == 1, f"block {block} is in {states} states, not in one"
        block_hash = pool.hashes[block]
        if block_hash is None:
            assert block not in pool.cached, f"block {block} is cached without a hash"
        else:
            assert block not in blank, f"block {block} is blank with a hash"
            assert pool.by_hash.get(block_hash) == block, f"the index does not lead to block {block}"
    num_hashes = sum(block_hash is not None for block_hash in pool.hashes)
    assert num_hashes == len(pool.by_hash), f"{num_hashes} blocks have a hash, the index has {len(pool.by_hash)}"


def check_groups(groups: Iterable[Group], here: list[Sequence]) -> None:
    """`here`: whoever waits, follows or is resident, each once."""
    assert len({id(sequence) for sequence in here}) == len(here), "a sequence is in two places"
    places = Counter(id(sequence.group) for sequence in here if sequence.group is not None)
    answered = 0
    for group in groups:
        answered = sum(bool(member.beam is not None and member.beam.record) for member in group.members)
        name = f"the group of request {group.members[0].request.id}"
        num_here = places.pop(id(group), 0)
        assert num_here == len(group.members) - answered, (
            f"{name} has {len(group.members)} members, {num_here} are here"
        )
        assert not group.pending or group.has_leader(), f"{name} waits for nobody"
        assert num_here, f"{name} is waited for by nobody"
    assert not places, "a group is not known"


def check_waiting(queue: WaitingQueue) -> None:
    for sequence in queue:
        name = f"waiting request {sequence.request.id}"
        assert sequence.status is Status.WAITING, f"{name} is {sequence.status.value}"
        assert sequence.slot == -1, f"{name} has a slot"
        assert not sequence.blocks, f"{name} has blocks"
    num_tokens = sum(len(sequence.tokens) for sequence in queue)
    if isinstance(queue, FairQueue):
        queue.check()
    assert queue.num_tokens == num_tokens, f"{num_tokens} tokens are waiting, the queue counts {queue.num_tokens}"


def check_placement(placement: Placement, replicas: list[Replica]) -> None:
    """Between two plans."""
    assert not placement.num_passed, "a plan has left requests that it passed over"
    for index in placement.closed:
        replica = replicas[index]
        empty = not (replica.residents or replica.parked or replica.followers or replica.in_flight)
        assert empty, f"replica {index} is closed and not empty"
    assert not placement.idle & placement.closed, "a closed replica waits for requests"


def check_moves(moves: Moves, replicas: list[Replica]) -> None:
    """Both ends of every move know of it, and a sequence is in one of them at most."""
    for index, replica in enumerate(replicas):
        coming = [move for move in moves.under_way if move.target == index]
        going = {move.id for move in moves.under_way if (move.source, move.source_epoch) == (index, replica.epoch)}
        assert set(replica.reserved) == {move.id for move in coming}, f"replica {index} awaits other moves"
        assert set(replica.lent) == going, f"replica {index} lends blocks to other moves"
        assert all(move.target_epoch == replica.epoch for move in coming), f"a move to replica {index} is late"
        num_expected = sum(len(move.sequences) for move in coming)
        assert replica.num_expected == num_expected, f"replica {index} expects {replica.num_expected} sequences"
        for move in coming:
            blocks = [block for part in move.parts for block in part.blocks]
            assert replica.reserved[move.id] == blocks, f"move {move.id} has other blocks than are reserved"
            assert len(set(move.copies.values())) == len(move.copies), f"move {move.id} writes a block twice"
    sequences = moves.sequences
    assert len(set(sequences)) == len(sequences), "a sequence moves twice"
    for sequence in sequences:
        assert sequence.status is Status.MOVING, f"request {sequence.request.id} moves and is {sequence.status.value}"
        assert (sequence.slot, sequence.replica, sequence.blocks) == (-1, -1, []), "who moves has something left behind"


def _check_slots(replica: Replica) -> None:
    slots = replica.slots
    everywhere = [*replica.residents, *slots.free, *(slot for _, slot in slots.limbo)]
    assert sorted(everywhere) == list(range(len(slots.sequences))), "a slot is lost or in two places"
    for slot, sequence in enumerate(slots.sequences):
        assert sequence is replica.residents.get(slot), f"slot {slot} holds another sequence than the residents say"
        assert sequence is None or sequence.slot == slot, f"the sequence in slot {slot} has another number"


def _check_table(replica: Replica, sequence: Sequence) -> None:
    name = f"request {sequence.request.id}"
    prefilling = sequence.status is Status.PREFILLING
    # The last planned token has no KV: its place is needed when it is computed.
    pools = sequence.request.pooling is not None
    num_covered = len(sequence.tokens) if prefilling or pools else replica.planned_length(sequence) - 1
    expected = -(-num_covered // replica.capacity.block_size)
    assert len(sequence.blocks) == expected, f"{name} has {len(sequence.blocks)} blocks for {num_covered} tokens"
    num_tokens, num_computed = replica.num_tokens(sequence), replica.num_computed(sequence)
    assert num_computed < num_tokens <= sequence.max_length, f"{name}: {num_computed}, {num_tokens} tokens"
    assert num_tokens <= replica.slots.tokens.shape[1], f"{name} has more tokens than its row holds"
    assert sequence.num_published <= len(sequence.blocks), f"{name} published more blocks than it has"


def _check_hashes(replica: Replica, sequence: Sequence) -> None:
    if not replica.enable_prefix_caching:
        return
    block_size = replica.capacity.block_size
    tokens = replica.slots.tokens[sequence.slot, : len(sequence.hashes) * block_size]
    expected: list[bytes] = []
    replica.hasher.extend(expected, sequence.root, tokens)
    assert sequence.hashes == expected, f"request {sequence.request.id} has hashes of other tokens"
    for block, block_hash in zip(sequence.blocks[: sequence.num_published], expected, strict=False):
        published = replica.pool.hashes[block]
        assert published in (None, block_hash), f"block {block} is published under another hash"
        assert block_hash in replica.pool.by_hash or published is None, f"block {block} cannot be found"


def _check_lane(lane: Lane, residents: list[Sequence]) -> None:
    name = f"lane {lane.index}"
    assert lane.num_residents == len(residents), f"{name} counts {lane.num_residents} sequences, not {len(residents)}"
    decoding = {sequence.slot: sequence for sequence in residents if sequence.status is Status.DECODING}
    prefilling = {sequence.slot: sequence for sequence in residents if sequence.status is Status.PREFILLING}
    assert lane.prefilling == prefilling, f"{name} has other prefills than its sequences"
    assert lane.num_decoding == len(decoding), f"{name} counts {lane.num_decoding} decoding, not {len(decoding)}"
    assert lane.rows().slots.tolist() == sorted(decoding), f"{name} has other decode rows than its sequences"
    for calendar, entries in (("growth", lane.growth), ("endings", lane.endings.values())):
        noted = [slot for entry in entries for slot in entry]
        assert sorted(noted) == sorted(decoding), f"{name}: the calendar of {calendar} has other slots"
    for slot, sequence in decoding.items():
        offset = int(lane.offsets[slot])
        assert slot in lane.growth[lane.growth_phase(offset)], f"{name}: slot {slot} grows at another tick"
        assert slot in lane.endings[lane.last_tick(sequence, offset)], f"{name}: slot {slot} ends at another tick"
