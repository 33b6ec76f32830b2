"""The comparison of HTTP clients runs, and no client loses an event."""

import re
import subprocess
import sys

from tests.support.bench_scripts import BENCH


def test_every_client_reads_every_event() -> None:
    command = [sys.executable, str(BENCH / "client_cost.py"), "--streams", "3", "--chunks", "4", "--interval-ms", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    named = re.findall(r"^(\S.*?) +[\d.]+ us per token$", done.stdout, re.MULTILINE)
    assert named == ["manta", "asyncio streams", "aiohttp", "httpx"]
