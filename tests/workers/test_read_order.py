"""Tensors are read in the order they lie in, within a window, and somebody hears how far it is."""

import logging
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from manta.configs.weights import WeightError
from manta.workers import read_ahead, read_order
from manta.workers.checkpoint import Checkpoint
from manta.workers.read_ahead import Extent, ReadAhead
from manta.workers.read_order import Progress, in_disk_order

MIB = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tensors whose names are in another order than their bytes: safetensors puts wide dtypes first."""
    first = {"b": torch.zeros(4, dtype=torch.float16), "a": torch.zeros(4), "c": torch.zeros(2, dtype=torch.int8)}
    save_file({f"model.{name}": tensor for name, tensor in first.items()}, tmp_path / "model-1.safetensors")
    save_file({"model.0": torch.arange(6.0)}, tmp_path / "model-2.safetensors")
    return tmp_path


@pytest.mark.parametrize("ahead", [True, False])
def test_files_in_order_and_in_them_offsets(folder: Path, ahead: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Checkpoint(folder) as checkpoint:
        names = [f"model.{name}" for name in "abc0"]
        assert list(in_disk_order(checkpoint, names[::-1], ahead=ahead)) == names
        assert list(in_disk_order(checkpoint, ["model.c", "model.a"], ahead=ahead)) == ["model.a", "model.c"]
    assert "read 0.00 GiB of weights in" in caplog.text


def test_extents_are_where_the_bytes_are(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        extent = checkpoint.extent("model.0")
        assert checkpoint.extent("model.a").end == checkpoint.extent("model.b").begin
    stored = extent.path.read_bytes()[extent.begin : extent.end]
    assert torch.frombuffer(bytearray(stored), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_file_that_lost_its_header_is_named(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        (folder / "model-2.safetensors").write_bytes(b"\xff" * 20)
        with pytest.raises(WeightError, match=r"model-2\.safetensors cannot be read as safetensors: it has no header"):
            checkpoint.extent("model.0")


def test_reading_stays_within_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", MIB)
    touched: list[Extent] = []
    changed = threading.Condition()

    def touch(chunk: Extent, buffer: bytearray) -> None:
        with changed:
            touched.append(chunk)
            changed.notify_all()

    def wait_for(num: int) -> None:
        with changed:
            assert changed.wait_for(lambda: len(touched) >= num, timeout=30)

    monkeypatch.setattr(read_ahead, "_touch", touch)
    extents = [Extent(tmp_path / "a", 100, 100 + 5 * MIB // 2), Extent(tmp_path / "b", 0, 10 * MIB)]
    with ReadAhead(extents, window_bytes=4 * MIB) as ahead:
        wait_for(5)  # the fourth ends half a chunk before the window does
        first, second, third = sorted(chunk for chunk in touched if chunk.path == tmp_path / "a")
        assert (first.begin, second.begin, third.end) == (100, 100 + MIB, 100 + 5 * MIB // 2)
        assert sum(chunk.end - chunk.begin for chunk in touched) == 9 * MIB // 2
        ahead.advance(3 * MIB)
        wait_for(8)
        assert max(chunk.end for chunk in touched if chunk.path == tmp_path / "b") == 5 * MIB
    assert len(touched) == 8, "the end of reading does not wait for what nobody wants"


def test_files_are_read_and_missing_ones_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_is_cached", lambda *_: False)
    path = tmp_path / "weights"
    path.write_bytes(bytes(3 * MIB))
    for extents in ([Extent(path, 5, 3 * MIB)], [Extent(tmp_path / "none", 0, MIB)] * 9, []):
        with ReadAhead(extents) as ahead:
            ahead.advance(3 * MIB)


def test_nothing_is_cached_behind_the_end(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(MIB))
    with path.open("rb") as file:
        assert not read_ahead._is_cached(file.fileno(), 2 * MIB)


def test_progress_is_told_every_few_seconds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=read_order.__name__)
    clock = [100.0]
    progress = Progress(10 * 2**30, now_s=lambda: clock[0])
    for _ in range(10):
        clock[0] += 2.0
        progress.add(2**30)
    progress.finish()
    assert [record.getMessage() for record in caplog.records] == [
        "read 3.00 GiB of 10.00 GiB of weights, 0.50 GiB/s",
        "read 6.00 GiB of 10.00 GiB of weights, 0.50 GiB/s",
        "read 9.00 GiB of 10.00 GiB of weights, 0.50 GiB/s",
        "read 10.00 GiB of weights in 20.0 s, 0.50 GiB/s",
    ]
