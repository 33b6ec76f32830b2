"""An event loop whose clock jumps to the next timer, and processes that live on it and can be killed or stopped."""

import asyncio
import contextvars
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

_process: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)
NEVER_S = 100_000.0  # a run that gets here hangs


class HangError(AssertionError):
    """Nothing can happen any more, or nothing has for very long."""


class Process:
    """What belongs together and ends together: tasks, sockets, servers. Code runs in it through `spawn`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_alive = True
        self.is_stopped = False  # by SIGSTOP: neither reads nor answers
        self.has_vanished = False  # killed with its host: nobody hears of the end
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.on_kill: list[Callable[[], None]] = []

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        context = contextvars.copy_context()
        context.run(_process.set, self)
        return asyncio.get_running_loop().create_task(work, context=context)

    def kill(self) -> None:
        """Nobody hears of what its tasks do while they are cancelled."""
        self.is_alive = self.is_stopped = False
        for ends in self.on_kill:
            ends()
        self.on_kill.clear()
        for task in list(self.tasks):
            task.cancel()


OUTSIDE = Process("outside")


def current_process() -> Process:
    return _process.get() or OUTSIDE


class _Task(asyncio.Task[Any]):
    """Hashed by number, so that sets of tasks are walked in the same order in every run."""

    number = 0

    def __hash__(self) -> int:
        return self.number


class _Jump(selectors.SelectSelector):
    """Waits for nothing: moves the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or self.now_s > NEVER_S:
            raise HangError(f"nothing is left to happen after {self.now_s:.1f} s")
        self.now_s += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`errors` are what nobody else heard of: exceptions of tasks that were dropped, and the like."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)
        self.errors: list[str] = []
        self._num_tasks = 0
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._note)

    def time(self) -> float:
        return self._jump.now_s

    def _make_task(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> "asyncio.Task[Any]":
        context = options.get("context")
        process = context.get(_process) if context is not None else _process.get()
        task = _Task(work, loop=loop, **options)
        self._num_tasks += 1
        task.number = self._num_tasks
        if process is not None:
            process.tasks[task] = None
            task.add_done_callback(lambda task: process.tasks.pop(task, None))
            if not process.is_alive:
                task.cancel()
        return task

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    # Sockets of the simulated network are no files.
    def add_reader(self, sock: Any, callback: Any, *args: Any) -> Any:
        if hasattr(sock, "watch"):
            return sock.watch(callback)
        return super().add_reader(sock, callback, *args)

    def remove_reader(self, sock: Any) -> bool:
        if hasattr(sock, "watch"):
            sock.watch(None)
            return True
        return super().remove_reader(sock)

    def remove_writer(self, sock: Any) -> bool:
        return True if hasattr(sock, "watch") else super().remove_writer(sock)

    async def sock_accept(self, listener: Any) -> Any:
        return await listener.accept()

    async def sock_recv(self, sock: Any, num_bytes: int) -> bytes:
        data: bytes = await sock.receive(num_bytes)
        return data


class VirtualTime:
    """In place of the module `time`, in modules that are to live by the loop's clock."""

    @staticmethod
    def monotonic() -> float:
        return asyncio.get_running_loop().time()

    perf_counter = monotonic

    @staticmethod
    def thread_time() -> float:
        return 0.0
