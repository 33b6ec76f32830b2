"""One engine, one workload, one round: what is measured and how it becomes figures."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import process_tree
from engine_process import EngineProcess
from workloads import Workload

MIB = 2**20
DISTURBED_CORES = 0.1  # CPU seconds per second of other processes that a measurement does not bear


@dataclass(frozen=True)
class Figure:
    """A number that a workload gives; `ratio` compares it so that more than 1 means the first is better."""

    workload: str
    name: str
    unit: str
    higher_is_better: bool = False

    @property
    def key(self) -> str:
        return f"{self.workload} {self.name}"

    def ratio(self, ours: float, theirs: float) -> float:
        return ours / theirs if self.higher_is_better else theirs / ours


FIGURES = (
    Figure("mixed", "output", "tok/s", higher_is_better=True),
    Figure("single", "first token", "ms"),
    Figure("single", "per token", "ms"),
    Figure("prefill", "first token", "ms"),
    Figure("prefix", "output", "tok/s", higher_is_better=True),
    Figure("start", "to first token", "s"),
    Figure("memory", "highest seen", "MiB"),
)


@dataclass(frozen=True)
class Sample:
    """One measurement. `cores` is the CPU time of the engine's processes per second, `other_cores` everybody else's, of
    which `busiest_other` took most."""

    engine: str
    workload: str
    turn: int
    total_s: float
    num_output_tokens: int
    cores: float
    other_cores: float
    busiest_other: str
    pss_bytes: int
    peak_rss_bytes: int
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def is_disturbed(self) -> bool:
        return self.other_cores > DISTURBED_CORES

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(engine: EngineProcess, workload: Workload, turn: int) -> Sample:
    """Runs the workload on an engine that is paused before and after.

    `single` runs twice, for one token and for all, so that first token and tokens after it are told apart the same way
    for every engine: from outside.
    """
    workload = workload.head(engine.spec.limit)
    engine.resume()
    pids = engine.pids
    others_s = process_tree.cpu_s_by_pid()
    begin_s, cpu_s, busy_s = time.perf_counter(), process_tree.cpu_s(pids), process_tree.busy_s()
    first_s = engine.run(workload.shortened(1)) if workload.name == "single" else None
    if first_s is not None:  # other tokens, or the prefix cache would know the prompt
        workload = Workload(
            workload.name, [list(reversed(prompt)) for prompt in workload.prompts], workload.output_lens
        )
    total_s = engine.run(workload)
    wall_s = time.perf_counter() - begin_s
    cpu_s, busy_s = process_tree.cpu_s(pids) - cpu_s, process_tree.busy_s() - busy_s
    others_s = {
        pid: now_s - others_s.get(pid, 0.0) for pid, now_s in process_tree.cpu_s_by_pid().items() if pid not in pids
    }
    pss_bytes, peak_rss_bytes = process_tree.pss_bytes(pids), process_tree.peak_rss_bytes(pids)
    engine.pause()
    return Sample(
        engine.spec.text,
        workload.name,
        turn,
        total_s,
        workload.num_output_tokens,
        cpu_s / wall_s,
        max(0.0, busy_s - cpu_s) / wall_s,
        process_tree.command(max(others_s, key=others_s.__getitem__)),
        pss_bytes,
        peak_rss_bytes,
        _figures(workload, total_s, first_s),
    )


def _figures(workload: Workload, total_s: float, first_s: float | None) -> dict[str, float]:
    if first_s is not None:
        per_token_s = (total_s - first_s) / (workload.num_output_tokens - 1)
        return {"single first token": 1e3 * first_s, "single per token": 1e3 * per_token_s}
    if workload.name == "prefill":
        return {"prefill first token": 1e3 * total_s}
    return {f"{workload.name} output": workload.num_output_tokens / total_s}
