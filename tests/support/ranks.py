"""Runs a function in several processes of one thread each: the ranks of a replica."""

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable, Collection
from queue import Empty
from typing import Any

import torch

from manta.workers.mesh import open_store


def run_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = 200.0,
    silent: Collection[int] = (),
) -> list[Any]:
    """Calls function(rank, port, *arguments) in each process, `port` being a rendezvous store's on this host.

    Returns the results by rank, None for the `silent` ones, which are not waited for. Raises AssertionError with the
    traceback of the first rank that failed, and when the ranks take longer than timeout_s. No process outlives it.
    """
    context = multiprocessing.get_context("spawn")
    store, port = open_store()
    answers: Any = context.Queue()
    processes = [
        context.Process(target=_run_rank, args=(rank, port, answers, function, arguments), daemon=True)
        for rank in range(num_ranks)
    ]
    try:
        for process in processes:
            process.start()
        results = _collect(answers, set(range(num_ranks)) - set(silent), time.monotonic() + timeout_s)
        return [results.get(rank) for rank in range(num_ranks)]
    finally:
        for process in processes:
            process.kill()
            process.join()
        del store


def _collect(answers: Any, ranks: set[int], deadline_s: float) -> dict[int, Any]:
    results: dict[int, Any] = {}
    while not ranks <= results.keys():
        try:
            rank, result, error = answers.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except Empty:
            raise AssertionError(f"only ranks {sorted(results)} of {sorted(ranks)} answered in time") from None
        assert error is None, f"rank {rank} failed:\n{error}"
        results[rank] = pickle.loads(result)
    return results


def _run_rank(rank: int, port: int, answers: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        # As bytes: a tensor itself would travel as a handle that its process must stay alive for.
        answers.put((rank, pickle.dumps(function(rank, port, *arguments)), None))
    except BaseException:  # noqa: BLE001 (the parent reports it)
        answers.put((rank, None, traceback.format_exc()))
    answers.close()
    answers.join_thread()
