"""The block pool against a brute-force model that keeps lists and searches them."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from manta.scheduler.block_pool import BlockPool
from manta.scheduler.integrity import check_pool

NUM_BLOCKS = 7


class Model(RuleBasedStateMachine):
    """`content` is what a worker would have in memory: a block that is found must have what it was published with."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.tables: list[list[int]] = []
        self.content = [""] * NUM_BLOCKS
        self.published: list[tuple[str, int]] = []
        self.planned = self.confirmed = 0
        self.waiting: list[tuple[int, int]] = []  # (step, block), in order of release
        self.free = list(range(NUM_BLOCKS))  # in order of release
        self.num_written = 0

    def references(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    def is_published(self, block: int) -> bool:
        return any(other == block for _, other in self.published)

    def overwrite(self, block: int) -> None:
        """The pool gave the block out: it had to be free, and no published one while a blank one was there."""
        assert block in self.free
        if self.is_published(block):
            assert all(self.is_published(other) for other in self.free)
            assert block == self.free[0]
        self.free.remove(block)
        self.published = [(name, other) for name, other in self.published if other != block]
        self.num_written += 1
        self.content[block] = f"content {self.num_written}"

    def give_back(self, blocks: list[int], until: int | None) -> None:
        for block in blocks:
            if self.references(block) == 0:
                if until is None:
                    self.free.append(block)
                else:
                    self.waiting.append((until, block))

    @property
    def until(self) -> int | None:
        return self.planned if self.planned > self.confirmed else None

    @rule(count=st.integers(0, 4))
    def take(self, count: int) -> None:
        count = min(count, len(self.free))
        blocks = self.pool.take(count)
        assert len(set(blocks)) == count
        for block in blocks:
            self.overwrite(block)
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table, self.until)
        self.give_back(table[::-1], self.until)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.tables.append(self.pool.fork(table))
        assert self.tables[-1] == table

    @precondition(lambda self: self.free and any(self.tables))
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        index = data.draw(st.integers(0, len(table) - 1))
        old = table[index]
        alone = self.references(old) == 1 and not self.is_published(old)
        new = self.pool.writable(old, self.until)
        assert (new == old) == alone
        if new != old:
            self.overwrite(new)
            table[index] = new
            self.give_back([old], self.until)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), twin=st.booleans())
    def publish(self, data: st.DataObject, twin: bool) -> None:
        block = data.draw(st.sampled_from([block for table in self.tables for block in table]))
        if self.is_published(block):
            return
        if twin and self.published:  # the same tokens were computed twice
            self.content[block] = data.draw(st.sampled_from(self.published))[0]
        name = self.content[block]
        self.pool.publish([block], [name.encode()])
        if all(other != name for other, _ in self.published):
            self.published.append((name, block))

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        name, block = data.draw(st.sampled_from(self.published))
        assert self.pool.find([name.encode()]) == [block]
        taken = block in self.free
        assert self.pool.num_unreferenced([block]) == taken
        self.pool.share([block])
        if taken:
            self.free.remove(block)
        self.waiting = [(step, other) for step, other in self.waiting if other != block]
        self.tables.append([block])

    @rule()
    def plan(self) -> None:
        self.planned += 1

    @precondition(lambda self: self.confirmed < self.planned)
    @rule()
    def confirm(self) -> None:
        self.confirmed += 1
        self.pool.confirm(self.confirmed)
        self.free += [block for step, block in self.waiting if step <= self.confirmed]
        self.waiting = [(step, block) for step, block in self.waiting if step > self.confirmed]

    @invariant()
    def agrees(self) -> None:
        check_pool(self.pool, Counter(block for table in self.tables for block in table))
        assert sorted([*self.pool.blank, *self.pool.cached]) == sorted(self.free)
        assert list(self.pool.cached) == [block for block in self.free if self.is_published(block)]
        assert sorted(self.pool.limbo) == sorted(block for _, block in self.waiting)
        assert self.pool.num_free == len(self.free)
        assert {name.encode(): block for name, block in self.published} == self.pool.by_hash
        for name, block in self.published:
            assert self.content[block] == name


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_evicts_the_longest_unused_and_of_a_table_the_tail_first() -> None:
    pool = BlockPool(4)
    first, second = pool.take(2), pool.take(2)
    for block in first + second:
        pool.publish([block], [bytes([block])])
    pool.release(second, None)
    pool.release(first, None)
    assert [pool.take(1)[0] for _ in range(4)] == [second[1], second[0], first[1], first[0]]
    assert pool.by_hash == {}


def test_blank_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(3)
    published, blank = pool.take(1), pool.take(1)
    pool.publish([published[0]], [b"hash"])
    pool.release(published, None)
    pool.release(blank, None)
    assert published[0] not in pool.take(2)
    assert pool.find([b"hash"]) == [published[0]]


def test_a_block_in_limbo_is_found_and_not_given_out() -> None:
    pool = BlockPool(1)
    (block,) = pool.take(1)
    pool.publish([block], [b"hash"])
    pool.release([block], until=5)
    assert (pool.num_free, pool.num_limbo) == (0, 1)
    pool.share([block])
    pool.confirm(5)
    assert (pool.num_free, pool.refs[block]) == (0, 1)


@pytest.mark.parametrize("shared", ["by a fork", "by the index"])
def test_a_write_to_what_others_can_read_goes_to_a_copy(shared: str) -> None:
    pool = BlockPool(3)
    table = pool.take(1)
    if shared == "by a fork":
        pool.fork(table)
    else:
        pool.publish([table[0]], [b"hash"])
    copy = pool.writable(table[0], None)
    assert copy != table[0]
    assert pool.writable(copy, None) == copy


def test_a_block_found_in_limbo_and_released_again_waits_for_the_later_step() -> None:
    pool = BlockPool(1)
    (block,) = pool.take(1)
    pool.publish([block], [b"hash"])
    pool.release([block], until=5)
    pool.share([block])
    pool.release([block], until=6)
    pool.confirm(5)
    assert pool.num_free == 0
    pool.confirm(6)
    assert pool.num_free == 1


def test_a_block_found_in_limbo_and_released_again_is_as_young_as_its_last_release() -> None:
    pool = BlockPool(2)
    first, second = pool.take(1), pool.take(1)
    for block, name in ((first, b"first"), (second, b"second")):
        pool.publish(block, [name])
        pool.release(block, until=5)
    pool.share(first)
    pool.release(first, until=5)
    pool.confirm(5)
    assert pool.take(2) == [*second, *first]
