"""Barriers and sleep of the threads that compute together, with more threads than most test machines have cores."""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import njit

from manta.kernels.cpu_decoder.threads import (
    atomic_add,
    atomic_load,
    atomic_swap,
    barrier,
    change_and_wake,
    pause,
    sleep_until_changed,
)
from manta.kernels.cpu_scalars import load_int64, store_int64

DEADLINE_S = 120.0
LINE = 8  # int64s of a cache line


@njit(nogil=True)
def _meet(thread: Any, threads: Any, counter: Any, shared: Any, first: Any, end: Any) -> Any:
    """Plain memory that every thread writes before a barrier and reads behind it; returns what was not as it must be.

    `shared` holds a line of each thread and one that they increment in turn, without atomics.
    """
    errors = 0
    for i in range(first, end):
        store_int64(shared, LINE * thread, i)
        if i % threads == thread:
            store_int64(shared, LINE * threads, load_int64(shared, LINE * threads) + 1)
        barrier(counter, threads)
        for other in range(threads):
            errors += load_int64(shared, LINE * other) != i
        errors += load_int64(shared, LINE * threads) != i
        barrier(counter, threads)
    return errors


@njit(nogil=True)
def _add_often(address: Any, times: Any) -> None:
    for _ in range(times):
        atomic_add(address, 3)


@njit(nogil=True)
def _swap(address: Any, value: Any) -> Any:
    return atomic_swap(address, value), atomic_load(address)


@njit(nogil=True)
def _sleep(address: Any, seen: Any) -> Any:
    return sleep_until_changed(address, seen)


@njit(nogil=True)
def _wake(address: Any) -> None:
    change_and_wake(address)


@njit(nogil=True)
def _throw(mine: Any, other: Any, rounds: Any, longest: Any) -> None:
    """Wakes the catcher after ever different delays, to meet it spinning, sleeping, and about to sleep."""
    for i in range(rounds):
        for _ in range(i * 37 % longest):
            pause()
        change_and_wake(other)
        sleep_until_changed(mine, i)


@njit(nogil=True)
def _catch(mine: Any, other: Any, rounds: Any) -> None:
    for i in range(rounds):
        sleep_until_changed(mine, i)
        change_and_wake(other)


class Memory:
    """Zeroed int64s at an address that begins a cache line."""

    def __init__(self, size: int) -> None:
        self._array = np.zeros(size + LINE, np.int64)
        self.address = -(-self._array.ctypes.data // 64) * 64

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self._array.size - LINE
        return ctypes.c_int64.from_address(self.address + 8 * index).value


class Thread(threading.Thread):
    """A thread with a result; a daemon, so that a lost wake-up fails a test and does not hang the run."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(daemon=True)
        self._function, self._arguments = function, arguments
        self.result: Any = None
        self.start()

    def run(self) -> None:
        self.result = self._function(*self._arguments)

    def wait(self) -> Any:
        self.join(DEADLINE_S)
        assert not self.is_alive(), "still waits"
        return self.result


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_barrier(threads: int) -> None:
    """20,000 barriers; fewer where a busy host takes a millisecond for each."""
    counter, shared = Memory(1), Memory(LINE * (threads + 1))
    first, give_up = 1, time.monotonic() + 3.0
    while first == 1 or (first < 10_000 and time.monotonic() < give_up):
        arguments = (threads, counter.address, shared.address, first, first + 250)
        team = [Thread(_meet, thread, *arguments) for thread in range(threads)]
        assert [thread.wait() for thread in team] == [0] * threads
        first += 250
    assert shared[LINE * threads] == first - 1
    assert threads == 1 or counter[0] == 2 * threads * (first - 1)


def test_atomic_add() -> None:
    memory = Memory(1)
    for thread in [Thread(_add_often, memory.address, 100_000) for _ in range(4)]:
        thread.wait()
    assert memory[0] == 1_200_000


def test_atomic_swap() -> None:
    memory = Memory(1)
    assert _swap(memory.address, 5) == (0, 5)
    assert _swap(memory.address, -(1 << 40)) == (5, -(1 << 40))


def wait_for_sleepers(memory: Memory, count: int) -> None:
    """The second int64 counts those who sleep, or are about to."""
    deadline = time.monotonic() + DEADLINE_S
    while memory[1] != count:
        assert time.monotonic() < deadline, f"{memory[1]} of {count} sleep"
        time.sleep(0.0005)


@pytest.mark.parametrize("sleepers", [1, 2, 3])
def test_all_sleepers_wake(sleepers: int) -> None:
    memory = Memory(2)
    for generation in range(30):
        team = [Thread(_sleep, memory.address, generation) for _ in range(sleepers)]
        wait_for_sleepers(memory, sleepers)
        _wake(memory.address)
        assert [thread.wait() for thread in team] == [generation + 1] * sleepers
        assert memory[1] == 0


def test_no_sleep_once_changed() -> None:
    memory = Memory(2)
    _wake(memory.address)
    assert _sleep(memory.address, 0) == 1


@pytest.mark.parametrize("seen", [(1 << 31) - 1, (1 << 32) - 1, (1 << 32) + 5, 1 << 40])
def test_generations_beyond_32_bits(seen: int) -> None:
    """A futex compares 32 bits of the 64."""
    memory = Memory(2)
    _swap(memory.address, seen)
    thread = Thread(_sleep, memory.address, seen)
    wait_for_sleepers(memory, 1)
    assert thread.is_alive()
    _wake(memory.address)
    assert thread.wait() == seen + 1


@pytest.mark.parametrize("longest", [1, 5000], ids=["at-once", "around-falling-asleep"])
def test_no_wake_up_is_lost(longest: int) -> None:
    first, second = Memory(2), Memory(2)
    rounds = 2000
    catcher = Thread(_catch, second.address, first.address, rounds)
    thrower = Thread(_throw, first.address, second.address, rounds, longest)
    thrower.wait()
    catcher.wait()
    assert (first[0], second[0]) == (rounds, rounds)
