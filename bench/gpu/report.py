"""What the parts find: printed as they go, and written to a file after each record, so that a run that is cut short
leaves what it had."""

import json
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Unit = tuple[str, Callable[[], Iterable[Record]]]  # its name, and its records, made as they are asked for


class Report:
    """Owns the records of all parts, `{part: [record, ...]}` beside what is known of the machine."""

    def __init__(self, path: Path | None, time_limit_s: float, append: bool = False) -> None:
        """Nothing begins later than time_limit_s from now on. append: to what the file has, if it is there."""
        self._path = path
        self._ends_s = time.perf_counter() + time_limit_s
        self.content: dict[str, Any] = {}
        if append and path is not None and path.is_file():
            self.content = json.loads(path.read_text())
        self.num_failed = 0

    @property
    def left_s(self) -> float:
        return self._ends_s - time.perf_counter()

    def put(self, name: str, value: object) -> None:
        self.content[name] = value
        self._write()

    def run(self, part: str, units: Iterable[Unit], clean_up: Callable[[], None]) -> None:
        """All units of a part. One that fails is a record, too, and the next goes on with a clean device."""
        records: list[Record] = self.content.setdefault(part, [])
        for name, unit in units:
            if self.left_s <= 0:
                self._add(records, {"unit": name, "skipped": "the time limit"})
                continue
            begin_s = time.perf_counter()
            try:
                self._take(name, unit, records)
            except Exception as error:  # noqa: BLE001 (the other units are worth having)
                traceback.print_exc()
                self._add(records, {"unit": name, "error": f"{type(error).__name__}: {error}"})
                self.num_failed += 1
            clean_up()
            print(f"({name}: {time.perf_counter() - begin_s:.1f} s)", flush=True)

    def _take(self, name: str, unit: Callable[[], Iterable[Record]], records: list[Record]) -> None:
        for record in unit():
            self._add(records, record)
            if self.left_s <= 0:
                self._add(records, {"unit": name, "skipped": "the time limit, before the rest of it"})
                return

    def _add(self, records: list[Record], record: Record) -> None:
        if "skipped" in record:
            print(f"{record.get('unit', '')}: skipped, {record['skipped']}", flush=True)
        records.append(record)
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            beside = self._path.with_name(f"{self._path.name}.new")
            beside.write_text(json.dumps(self.content, indent=1))
            beside.replace(self._path)  # whole at every moment
