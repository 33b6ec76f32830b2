"""The scripts of bench/, which are no package and import each other by name."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

BENCH = Path(__file__).parents[2] / "bench"


def load(name: str) -> ModuleType:
    """A script of bench/ or bench/compare/."""
    for folder in (BENCH, BENCH / "compare"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module(name)
