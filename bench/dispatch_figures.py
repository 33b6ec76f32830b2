"""What the traces of `dispatch.py` say of one stretch of steps."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fake_device import TRACE
from numpy.typing import NDArray
from traced_engine import PLAN, RESULT

Columns = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Window:
    """A stretch of pure decode steps, and the CPU seconds of the processes in it."""

    step_ms: float
    begin_ns: int
    end_ns: int
    scheduler_cpu_s: float
    worker_cpu_s: float


@dataclass(frozen=True)
class ReplicaTraces:
    plans: Columns
    results: Columns
    ranks: list[Columns]  # the first answers


@dataclass(frozen=True)
class Figures:
    """Pairs are p50 and p99; CPU times are per step of any replica."""

    idle: float  # share of the time, mean over the ranks that answer
    idle_worst: float  # of all ranks
    plan_device_ms: NDArray[np.float64]
    result_plan_ms: NDArray[np.float64]
    cpu_us: float
    worker_cpu_us: float
    plan_bytes: float
    steps_per_s: float
    clock_late_us: NDArray[np.float64]  # how late the clock's threads woke: what the machine itself costs


def read_traces(folder: Path, ranks: int, replicas: int) -> list[ReplicaTraces]:
    """Of every replica, from engine.npz and the workers' files."""
    engine = np.load(folder / "engine.npz")
    plans, results = _columns(engine["plans"], PLAN), _columns(engine["results"], RESULT)
    workers = [_columns(np.load(folder / f"worker{i}.npy"), TRACE) for i in range(ranks * replicas)]
    return [
        ReplicaTraces(
            _select(plans, plans["replica"] == i),
            _select(results, results["replica"] == i),
            workers[i * ranks : (i + 1) * ranks],
        )
        for i in range(replicas)
    ]


def figures(window: Window, replicas: list[ReplicaTraces]) -> Figures:
    """Sums up what began within the window."""
    idle = [[_idle_share(_within(rank, "start_ns", window)) for rank in replica.ranks] for replica in replicas]
    to_device = np.concatenate([_plan_to_device(window, replica) for replica in replicas])
    to_plan = np.concatenate([_result_to_plan(window, replica) for replica in replicas])
    answering = [_within(replica.ranks[0], "start_ns", window) for replica in replicas]
    late = np.concatenate([steps["answered_ns"] - steps["end_ns"] for steps in answering])
    num_steps = sum(len(_within(replica.results, "received_ns", window)["step"]) for replica in replicas)
    plan_bytes = np.concatenate([_within(replica.plans, "began_ns", window)["bytes"] for replica in replicas])
    return Figures(
        idle=float(np.mean([shares[0] for shares in idle])),
        idle_worst=max(max(shares) for shares in idle),
        plan_device_ms=np.percentile(to_device, [50, 99]) / 1e6,
        result_plan_ms=np.percentile(to_plan, [50, 99]) / 1e6,
        cpu_us=window.scheduler_cpu_s * 1e6 / num_steps,
        worker_cpu_us=window.worker_cpu_s * 1e6 / num_steps,
        plan_bytes=float(plan_bytes.mean()),
        steps_per_s=num_steps / (window.end_ns - window.begin_ns) * 1e9,
        clock_late_us=np.percentile(late, [50, 99]) / 1e3,
    )


HEADER = (
    f"{'replicas x ranks':>16} {'D ms':>5} | {'idle':>6} {'worst':>6} | {'plan-device p50':>15} {'p99':>6} | "
    f"{'result-plan p50':>15} {'p99':>6} | {'cpu':>5} {'worker cpu':>10} | {'bytes':>5} {'steps/s':>8} "
    f"{'clock late p99':>14}"
)


def row(name: str, window: Window, result: Figures) -> str:
    """One line under HEADER."""
    device, plan = result.plan_device_ms, result.result_plan_ms
    return (
        f"{name:>16} {window.step_ms:>5g} | {result.idle:>6.2%} {result.idle_worst:>6.2%} | "
        f"{device[0]:>15.3f} {device[1]:>6.2f} | {plan[0]:>15.3f} {plan[1]:>6.2f} | {result.cpu_us:>5.0f} "
        f"{result.worker_cpu_us:>10.0f} | {result.plan_bytes:>5.0f} {result.steps_per_s:>8.1f} "
        f"{result.clock_late_us[1]:>14.0f}"
    )


def _idle_share(steps: Columns) -> float:
    gaps_ns = (steps["start_ns"][1:] - steps["end_ns"][:-1]).sum()
    return float(gaps_ns / (steps["end_ns"][-1] - steps["start_ns"][0]))


def _plan_to_device(window: Window, replica: ReplicaTraces) -> NDArray[np.int64]:
    """ns from the beginning of the scheduler's work until the last rank's device has the plan."""
    taken: dict[int, int] = {}
    for rank in replica.ranks:
        for step, taken_ns in zip(rank["step"].tolist(), rank["taken_ns"].tolist(), strict=True):
            taken[step] = max(taken.get(step, 0), taken_ns)
    plans = _within(replica.plans, "began_ns", window)
    pairs = zip(plans["step"].tolist(), plans["began_ns"].tolist(), strict=True)
    return np.array([taken[step] - began_ns for step, began_ns in pairs if step in taken], np.int64)


def _result_to_plan(window: Window, replica: ReplicaTraces) -> NDArray[np.int64]:
    """ns from a result's arrival until the next plan is written to all ranks."""
    received = _within(replica.results, "received_ns", window)["received_ns"]
    sent = replica.plans["sent_ns"]
    later = np.searchsorted(sent, received)
    answered = later < len(sent)
    return np.asarray(sent[later[answered]] - received[answered], np.int64)


def _columns(table: NDArray[np.int64], names: tuple[str, ...]) -> Columns:
    return dict(zip(names, table.T, strict=True))


def _select(table: Columns, rows: NDArray[np.bool_]) -> Columns:
    return {name: values[rows] for name, values in table.items()}


def _within(table: Columns, column: str, window: Window) -> Columns:
    return _select(table, (table[column] >= window.begin_ns) & (table[column] < window.end_ns))
