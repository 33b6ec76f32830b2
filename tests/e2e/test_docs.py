"""The examples of the documents run as they are printed, against the shared server; docs/README.md has the rules."""

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.doc_blocks import Block, blocks_of, pages
from tests.support.server import ROOT, ServerProcess

# An HTTP error fails the block, with its body, unless it prints the status itself; pipes do not hide it.
_PRELUDE = """set -euo pipefail
curl() { case "$*" in *http_code*) command curl "$@" ;; *) command curl -sS --fail-with-body "$@" ;; esac; }
"""
_LIMIT_S = 120
_PAGES = [page for page in pages() if any(block.runs for block in blocks_of(page))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for examples/, and `manta` and `python` on the PATH."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def _adapted(block: Block, server: ServerProcess) -> str:
    http, grpc = server.url.removeprefix("http://"), server.grpc_address
    code = block.code
    for host in ("localhost", "127.0.0.1"):
        code = code.replace(f"{host}:8000", http).replace(f"{host}:50051", grpc)
    return code


def _missing(block: Block) -> list[str]:
    return [name for name in block.needs if shutil.which(name) is None and importlib.util.find_spec(name) is None]


def _run_python(code: str, block: Block, names: dict[str, Any]) -> str:
    printed = io.StringIO()
    # Tracebacks point to the line of the page.
    compiled = compile("\n" * (block.line - 1) + code, str(block.page), "exec")
    with contextlib.redirect_stdout(printed):
        exec(compiled, names)
    return printed.getvalue()


def _run_shell(code: str, block: Block, names: dict[str, Any]) -> str:
    words = ["bash", "-c", _PRELUDE + code]
    result = subprocess.run(words, capture_output=True, text=True, timeout=_LIMIT_S, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, f"{block.place} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


_RUNNERS: dict[str, Callable[[str, Block, dict[str, Any]], str]] = {"python": _run_python, "sh": _run_shell}


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path, server: ServerProcess, folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for block in blocks_of(page):
            if not block.runs:
                continue
            if missing := _missing(block):
                warnings.warn(f"{block.place} was not run: no {', '.join(missing)} here", stacklevel=1)
                continue
            printed = _RUNNERS[block.language](_adapted(block, server), block, names)
            if block.output is not None:
                assert printed == block.output, f"{block.place} printed something else"
    finally:
        for value in names.values():  # engines that a page leaves to the end of the interpreter
            if callable(close := getattr(value, "shutdown", None)) and type(value).__module__.startswith("manta."):
                close()
