"""What is printed and written, character by character where other tools read it."""

import json
import math
from pathlib import Path

import pytest

from manta.cluster.bench.answers import Record
from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.load import Run
from manta.cluster.bench.metrics import summarize
from manta.cluster.bench.plot import check_plot, draw
from manta.cluster.bench.report import result_lines, warnings
from manta.cluster.bench.results import write_result

A = Record(10, 4, 100.0, 0.0, 100.002, 102.0, [100.5, 101.0, 102.0], 6, 5, True, "length", 200)
RUN = Run([A], 100.0, 2.0, 0.02, False)

LINES = """\
============ Serving Benchmark Result ============
Successful requests:                     1         
Failed requests:                         0         
Maximum request concurrency:             4         
Request rate configured (RPS):           2.50      
Benchmark duration (s):                  2.00      
Total input tokens:                      10        
Total generated tokens:                  6         
Request throughput (req/s):              0.50      
Request goodput (req/s):                 0.50      
Output token throughput (tok/s):         3.00      
Peak output token throughput (tok/s):    2.00      
Peak concurrent requests:                1.00      
Total token throughput (tok/s):          8.00      
---------------Time to First Token----------------
Mean TTFT (ms):                          498.00    
Median TTFT (ms):                        498.00    
P99 TTFT (ms):                           498.00    
P99.9 TTFT (ms):                         498.00    
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          300.00    
Median TPOT (ms):                        300.00    
P99 TPOT (ms):                           300.00    
P99.9 TPOT (ms):                         300.00    
---------------Inter-token Latency----------------
Mean ITL (ms):                           750.00    
Median ITL (ms):                         750.00    
P99 ITL (ms):                            995.00    
P99.9 ITL (ms):                          999.50    
----------------End-to-end Latency----------------
Mean E2EL (ms):                          1998.00   
Median E2EL (ms):                        1998.00   
P99 E2EL (ms):                           1998.00   
P99.9 E2EL (ms):                         1998.00   
------------------Load generator------------------
Input tokens from the prefix cache (%):  50.00     
Output tokens per chunk:                 2.00      
Max send delay (ms):                     2.00      
Max wait for concurrency (s):            0.00      
Client CPU (% of one core):              1.00      
Client CPU per chunk (us):               6666.67   
==================================================
"""  # noqa: W291


def test_lines() -> None:
    summary = summarize(RUN, 1, [99, 99.9], {"e2el": 2000.0})
    lines = result_lines(summary, ["e2el", "ttft", "itl", "tpot"], 2.5, 4)
    assert "\n".join(lines) + "\n" == LINES
    assert warnings(summary, paces=True) == []


def test_lines_that_need_no_saying() -> None:
    text = "\n".join(result_lines(summarize(RUN, 3, [99]), ["ttft"], math.inf, None))
    for absent in ("TPOT", "E2EL", "goodput", "concurrency", "configured"):
        assert absent not in text
    assert "Unfinished requests:                     2         \n" in text


def test_warnings() -> None:
    late = Record(10, 4, 99.9, 0.0, 100.0, 102.0, [101.0], 1)
    summary = summarize(Run([late], 100.0, 2.0, 1.2, False), 1, [99])
    delay, busy, usage = warnings(summary, paces=True)
    assert "100 ms late" in delay
    assert "60% of a core" in busy
    assert "1 answers had no usage" in usage
    assert warnings(summary, paces=False) == [busy, usage], "a burst is late by nature"


def test_write_and_append(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for number in range(3):
        write_result(file, {"number": number}, append=number > 1)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"number": 1}, {"number": 2}]
    with pytest.raises(BenchError, match="cannot write"):
        write_result(tmp_path, {}, append=False)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib, of the extra 'bench'")
    failed = Record(9, 9, 100.5, 0.0, 100.5, None, [100.7], error="x")
    file = tmp_path / f"plot{suffix}"
    check_plot(file)
    draw(Run([A, failed], 100.0, 2.0, 0.02, False), "a title", file)
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    content = file.read_bytes()
    assert content.startswith(start)
    assert len(content) > 5000
    draw(Run([failed], 100.0, 2.0, 0.02, False), "nothing succeeded", file)


def test_plots_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchError, match="must end with"):
        check_plot(tmp_path / "plot.gif")
    with pytest.raises(BenchError, match="no folder"):
        check_plot(tmp_path / "missing" / "plot.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"pip install 'manta\[bench\]'"):
        check_plot(tmp_path / "plot.png")
