"""bench/gpu keeps what it found, whatever happens to the rest."""

import json
from argparse import Namespace
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from tests.support.bench_scripts import BENCH


def load(name: str) -> Any:
    """A script of bench/gpu, some of which are named as others of bench/ are."""
    spec = spec_from_file_location(f"gpu_{name}", BENCH / "gpu" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report, children = load("report"), load("children")


def test_records_are_in_the_file_as_they_come_and_others_follow_one_that_fails(tmp_path: Path) -> None:
    path, cleaned = tmp_path / "out.json", []

    def written() -> Any:
        return json.loads(path.read_text())["part"]

    def failing() -> Iterator[dict[str, Any]]:
        yield {"x": 1}
        assert written() == [{"x": 1}]
        raise ValueError("broken")

    found = report.Report(path, 100.0)
    found.run("part", [("first", failing), ("second", lambda: [{"x": 2}])], lambda: cleaned.append(1))
    assert written() == [{"x": 1}, {"unit": "first", "error": "ValueError: broken"}, {"x": 2}]
    assert found.num_failed == 1
    assert len(cleaned) == 2
    report.Report(path, 100.0, append=True).run("part", [("third", lambda: [{"x": 3}])], lambda: None)
    assert written()[-2:] == [{"x": 2}, {"x": 3}]


def test_nothing_begins_when_time_is_over(tmp_path: Path) -> None:
    found = report.Report(None, 100.0)

    def slow() -> Iterator[dict[str, Any]]:
        yield {"x": 1}
        found._ends_s = 0.0
        yield {"x": 2}
        raise AssertionError("nothing is asked for any more")

    found.run("part", [("slow", slow), ("late", lambda: [{"x": 3}])], lambda: None)
    first, second, rest, late = found.content["part"]
    assert (first, second) == ({"x": 1}, {"x": 2})
    assert rest["unit"] == "slow"
    assert late == {"unit": "late", "skipped": "the time limit"}


def test_parts_are_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that dies, as on a lost device, is not the end of the others; of whole models every mode is one."""
    commands = []

    def run(command: list[str], **_: Any) -> Namespace:
        commands.append(command)
        return Namespace(returncode=-6 if "attention" in command else 0)

    monkeypatch.setattr(children.subprocess, "run", run)
    out = tmp_path / "out.json"
    out.write_text("old")
    args = Namespace(
        parts=["attention", "engine", "tests"], modes=["plain", "fp8"], shapes=["s"], device="cuda", small=False,
        out=out, append=False, time_limit_s=100.0,
    )  # fmt: skip
    assert children.run(args) == 1
    assert not out.exists()
    assert [command[command.index("--parts") + 1] for command in commands] == ["attention", "engine", "engine", "tests"]
    assert [command[command.index("--modes") + 1] for command in commands if "--modes" in command] == ["plain", "fp8"]
    assert all(command[-3:] == ["--out", str(out), "--append"] for command in commands)
