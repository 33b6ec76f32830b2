"""KV blocks of one replica: reference counts, the prefix index, and which block is given out next.

Each block is in exactly one state:

    referenced   refs > 0: in that many block tables
    limbo        refs == 0, but a plan that touches it is not answered: findable, not to be overwritten
    cached       refs == 0 and published: findable, overwritten when nothing else is left, longest unused first
    blank        refs == 0 and not findable: given out first
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import cast


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks  # of published blocks; the inverse of by_hash
        self.by_hash: dict[bytes, int] = {}
        self.blank = list(range(num_blocks - 1, -1, -1))  # a stack
        self.cached: OrderedDict[int, None] = OrderedDict()  # in eviction order
        # Block -> the step that must be answered first, and the number of the release that put it there; the queue has
        # all releases by step, also of blocks that have left since.
        self.limbo: dict[int, tuple[int, int]] = {}
        self._limbo_queue: deque[tuple[tuple[int, int], list[int]]] = deque()
        self._num_releases = 0
        self.num_freed = 0  # how often a block became free: unchanged means that what did not fit still does not

    @property
    def num_free(self) -> int:
        return len(self.blank) + len(self.cached)

    @property
    def num_cached(self) -> int:
        return len(self.cached)

    @property
    def num_limbo(self) -> int:
        return len(self.limbo)

    def take(self, count: int) -> list[int]:
        """`count` blocks with undefined content, referenced once. The caller has seen that so many are free."""
        refs, num_left = self.refs, max(len(self.blank) - count, 0)
        taken = self.blank[num_left:]
        del self.blank[num_left:]
        taken.reverse()
        if len(taken) < count:
            taken += self._evict(count - len(taken))
        for block in taken:
            refs[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each; blocks found by `find` come back from the free list or from limbo."""
        refs, limbo, cached = self.refs, self.limbo, self.cached
        for block in blocks:
            if refs[block] == 0 and limbo.pop(block, None) is None:
                del cached[block]
            refs[block] += 1

    def fork(self, table: Sequence[int]) -> list[int]:
        """A second table of the same blocks. Whoever writes to one of them asks `writable` first."""
        self.share(table)
        return list(table)

    def writable(self, block: int, until: int | None) -> int:
        """The block to write instead of `block`: itself when nobody else can read it, else a fresh one, to which the
        caller has the content copied. Gives the reference to `block` back as `release` does. Takes up to one block."""
        if self.is_own(block):
            return block
        (copy,) = self.take(1)
        self.release([block], until)
        return copy

    def is_own(self, block: int) -> bool:
        """Whether the one table it is in may write to it: nobody else can read it."""
        return self.refs[block] == 1 and self.hashes[block] is None

    def release(self, table: Sequence[int], until: int | None) -> None:
        """Gives back one reference to each block, the last of the table first, so that shared prefixes are evicted
        last. Blocks without references are free once step `until` is answered; at once if it is None."""
        refs = self.refs
        idle = []
        for block in reversed(table):
            refs[block] -= 1
            if refs[block] == 0:
                idle.append(block)
        if until is None:
            self._free(idle)
        elif idle:
            self._num_releases += 1
            release = until, self._num_releases
            self.limbo.update(dict.fromkeys(idle, release))
            self._limbo_queue.append((release, idle))

    def confirm(self, step: int) -> None:
        """`step` and all before it are answered."""
        queue, limbo = self._limbo_queue, self.limbo
        while queue and queue[0][0][0] <= step:
            release, blocks = queue.popleft()
            # A block may have been found again, and released again, since it was queued here.
            settled = [block for block in blocks if limbo.get(block) is release]
            for block in settled:
                del limbo[block]
            self._free(settled)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the first hashes, up to one that is not known."""
        found = list(map(self.by_hash.get, hashes))
        if None in found:
            del found[found.index(None) :]
        return cast(list[int], found)

    def publish(self, blocks: Iterable[int], hashes: Iterable[bytes]) -> None:
        """The full blocks' KV exists, or will before a later plan runs. Of blocks with equal content the first one
        published is the one found."""
        known, find_or_set = self.hashes, self.by_hash.setdefault
        for block, block_hash in zip(blocks, hashes, strict=True):
            if known[block] is None and find_or_set(block_hash, block) == block:
                known[block] = block_hash

    def num_unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` sharing would take from the free ones."""
        return sum(map(self.cached.__contains__, blocks))

    def _free(self, blocks: list[int]) -> None:
        hashes, blank, cached = self.hashes, self.blank, self.cached
        for block in blocks:
            if hashes[block] is None:
                blank.append(block)
            else:
                cached[block] = None
        self.num_freed += len(blocks)

    def _evict(self, count: int) -> list[int]:
        """Blocks that were cached and are not findable any more."""
        hashes, by_hash, pop = self.hashes, self.by_hash, self.cached.popitem
        evicted = [pop(last=False)[0] for _ in range(count)]
        for block in evicted:
            block_hash = hashes[block]
            assert block_hash is not None
            del by_hash[block_hash]
            hashes[block] = None
        return evicted
