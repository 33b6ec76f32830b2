"""The comparison's own machinery: settings of engines, engine processes, figures, medians and the table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.bench_scripts import BENCH, load

engine_process, measure, process_tree = load("engine_process"), load("measure"), load("process_tree")
plot, summary, workloads = load("plot"), load("summary"), load("workloads")

# Answers with made-up tokens and starts a child, as real engines do; "wrong" gives one token too few, "die" ends.
FAKE_ENGINE = """
import subprocess, sys
sys.path.insert(0, {folder!r})
import engine_loop

class Fake:
    def __init__(self, model, options):
        print("a library that prints on stdout")
        self.versions = {{"fake": model}}
        self.options = options
        self.child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        self.is_first = True

    def generate(self, prompts, output_lens):
        first, self.is_first = self.is_first, False
        if not first and self.options.get("die"):
            raise RuntimeError("out of luck")
        missing = 0 if first else self.options.get("wrong", 0)
        return [[7] * (length - missing) for length in output_lens]

    def close(self):
        self.child.communicate()

if __name__ == "__main__":
    engine_loop.serve(Fake)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts fake engines, as Spec.parse names them."""
    (tmp_path / "engine_vllm.py").write_text(FAKE_ENGINE.format(folder=str(BENCH / "compare")))
    monkeypatch.setattr(engine_process, "FOLDER", tmp_path)
    engines = []

    def start(text):
        spec = engine_process.Spec.parse(text)
        engines.append(engine_process.EngineProcess(spec, sys.executable, "some model", spec.options, {}))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def state(pid: int) -> str:
    """One letter, as in ps: R and S go on, T is stopped, Z has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def wait_for_states(pids, letters: str) -> None:
    """Signals take effect a moment after they are sent."""
    deadline_s = time.monotonic() + 10
    for pid in pids:
        while state(pid) not in letters:
            assert time.monotonic() < deadline_s, f"process {pid} is in state {state(pid)}"
            time.sleep(0.01)


def test_spec_of_an_engine():
    spec = engine_process.Spec.parse("vllm:dtype=float32,enforce_eager=true,max_num_seqs=8,only=mixed+prefix,limit=4")
    assert (spec.kind, spec.limit, spec.only) == ("vllm", 4, ("mixed", "prefix"))
    assert spec.options == {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8}
    assert [name for name in workloads.NAMES if spec.runs(name)] == ["mixed", "prefix"]
    assert engine_process.Spec.parse("manta").runs("single")


@pytest.mark.parametrize(("text", "message"), [("llama", "no engine 'llama'"), ("manta:dtype", "NAME=VALUE")])
def test_wrong_spec(text, message):
    with pytest.raises(ValueError, match=message):
        engine_process.Spec.parse(text)


def test_an_engine_and_what_it_started_are_stopped_unless_told_to_run(start):
    engine = start("vllm")
    pids = engine.pids
    assert len(pids) == 2
    wait_for_states(pids, "T")
    workload = workloads.make_workload("mixed", vocab_size=5000)
    sample = measure.measure(engine, workload, 2)
    wait_for_states(pids, "T")
    assert (sample.engine, sample.workload, sample.turn) == ("vllm", "mixed", 2)
    assert sample.figures == {"mixed output": workload.num_output_tokens / sample.total_s}
    assert 0 < process_tree.pss_bytes(pids) <= process_tree.peak_rss_bytes(pids)
    engine.close()
    wait_for_states(pids, "Z")


def test_single_gives_first_token_and_the_tokens_after_it(start):
    sample = measure.measure(start("vllm"), workloads.make_workload("single", vocab_size=5000), 0)
    assert sample.figures.keys() == {"single first token", "single per token"}


def test_outputs_of_a_wrong_length_are_an_error(start):
    engine = start("vllm:wrong=1")
    engine.resume()
    with pytest.raises(engine_process.EngineError, match=r"other lengths than asked for: \[1, 2\]"):
        engine.ask([[1], [2]], [2, 3])


def test_an_engine_that_ends_shows_the_end_of_its_log(start):
    engine = start("vllm:die=1")
    engine.resume()
    with pytest.raises(engine_process.EngineError, match=r"vllm:die=1 has ended:\n(?s:.*)out of luck"):
        engine.ask([[1]], [2])


def test_cpu_time_of_a_tree(start):
    engine = start("vllm")
    assert 0 < process_tree.cpu_s(engine.pids) <= process_tree.busy_s()
    assert process_tree.tree(os.getpid())[0] == os.getpid()
    assert set(engine.pids) < set(process_tree.tree(os.getpid()))


def test_whoever_disturbs_a_measurement_is_named(start):
    engine = start("vllm")
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass  # busy beside it"])
    try:
        wait_for_states([busy.pid], "R")
        workload = workloads.make_workload("mixed", vocab_size=5000)
        deadline_s = time.monotonic() + 20
        while "busy beside it" not in measure.measure(engine, workload, 0).busiest_other:
            assert time.monotonic() < deadline_s
    finally:
        busy.kill()
        busy.wait()


def sample(engine, workload, pss_mib=100, other_cores=0.0, **figures):
    figures = {f"{workload} {name.replace('_', ' ')}": value for name, value in figures.items()}
    return measure.Sample(engine, workload, 0, 1.0, 1, 2.0, other_cores, "", pss_mib * measure.MIB, 0, figures)


SAMPLES = [
    *(sample("ours", "mixed", output=value) for value in (200, 300, 250)),
    *(sample("theirs", "mixed", output=value, pss_mib=400) for value in (100, 90, 500)),
    *(sample("ours", "single", first_token=20.0, per_token=2.0) for _ in range(2)),
    sample("theirs", "single", first_token=50.0, per_token=1.0, pss_mib=300),
]


def test_medians_and_spreads():
    found = summary.summarize(SAMPLES, {"ours": 3.0, "theirs": 60.0})
    assert found["mixed output"]["ours"] == summary.Spread(250, 200, 300, 3)
    assert found["mixed output"]["theirs"] == summary.Spread(100, 90, 500, 3)
    assert found["memory highest seen"]["theirs"].median == 400
    assert found["start to first token"]["theirs"].median == 60.0


def test_disturbed_samples_count_only_where_there_are_no_others():
    samples = [sample("a", "mixed", output=9, other_cores=0.5), sample("b", "mixed", output=8, other_cores=0.5)]
    samples.append(sample("a", "mixed", output=20, other_cores=0.05))
    found = summary.summarize(samples, {})["mixed output"]
    assert found == {"a": summary.Spread(20, 20, 20, 1), "b": summary.Spread(8, 8, 8, 1)}


def test_table_says_how_many_times_as_good_the_first_engine_is():
    rows = summary.table(summary.summarize(SAMPLES, {"ours": 3.0, "theirs": 60.0}), ["ours", "theirs"]).splitlines()
    assert rows[0] == "| figure | ours | theirs |"
    assert rows[2] == "| mixed: output, tok/s | 250 (200-300) | 100 (90.0-500), x2.50 |"
    assert rows[3] == "| single: first token, ms | 20.0 (20.0-20.0) | 50.0, x2.50 |"
    assert rows[4] == "| single: per token, ms | 2.00 (2.00-2.00) | 1.00, x0.50 |"
    assert rows[5] == "| start: to first token, s | 3.00 | 60.0, x20.00 |"
    assert rows[6] == "| memory: highest seen, MiB | 100 | 400, x4.00 |"
    assert len(rows) == 7


def test_plot_shows_every_figure_and_engine(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra 'bench'")
    found = summary.summarize(SAMPLES, {"ours": 3.0, "theirs": 60.0})
    plot.plot(tmp_path / "plot.svg", found, ["ours", "theirs"], "a title")
    drawn = (tmp_path / "plot.svg").read_text()
    texts = [
        "a title",
        "ours",
        "theirs",
        "mixed: output, tok/s (more is better)",
        "single: per token, ms (less is better)",
    ]
    assert [text for text in texts if f"<!-- {text} -->" not in drawn] == []


def test_every_figure_that_a_workload_gives_is_in_the_table(start):
    engine = start("vllm")
    given = set()
    for name in workloads.NAMES:
        given |= measure.measure(engine, workloads.make_workload(name, vocab_size=5000), 0).figures.keys()
    listed = {figure.key for figure in measure.FIGURES if figure.workload in workloads.NAMES}
    assert given == listed


KILLED_PARENT = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import engine_process
engine_process.FOLDER = Path({scripts!r})
engine = engine_process.EngineProcess(engine_process.Spec.parse("vllm"), sys.executable, "model", {{}}, {{}})
print(json.dumps(engine.pids), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_stopped_engine_ends_with_a_killed_comparison(tmp_path):
    """Which had no time to wake it: the kernel does, when a stopped group has lost its parent."""
    folder = str(BENCH / "compare")
    (tmp_path / "engine_vllm.py").write_text(FAKE_ENGINE.format(folder=folder))
    script = KILLED_PARENT.format(folder=folder, scripts=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    wait_for_states(json.loads(done.stdout), "Z")
