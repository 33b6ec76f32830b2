"""A process for each part: a kernel that reads where it may not ends the device for the process it is in, and memory
that a part keeps is not there for the next."""

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

_MAX_S = 330.0  # of one process, before it is taken to hang


def run(args: Namespace) -> int:
    """Does what args say, part by part and, of whole models, mode by mode; returns the exit code."""
    begin_s, code = time.perf_counter(), 0
    if args.out is not None and not args.append:
        args.out.unlink(missing_ok=True)
    for part, modes in _jobs(args):
        left_s = args.time_limit_s - (time.perf_counter() - begin_s)
        name = " ".join([part, *modes])
        if left_s <= 0:
            print(f"\n== {name}: left out, the time limit is over", flush=True)
            continue
        try:
            code |= subprocess.run(_command(args, part, modes, left_s), timeout=_MAX_S, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"\n== {name}: ended after {_MAX_S:.0f} s", flush=True)
            code = 1
    return int(code != 0)


def _jobs(args: Namespace) -> Iterator[tuple[str, list[str]]]:
    for part in args.parts:
        if part == "engine":
            yield from ((part, [mode]) for mode in args.modes)
        else:
            yield part, []


def _command(args: Namespace, part: str, modes: list[str], left_s: float) -> list[str]:
    command = [sys.executable, str(Path(__file__).parent), "--processes", "one", "--device", args.device]
    command += ["--parts", part, "--shapes", *args.shapes, "--time-limit-s", str(left_s)]
    command += ["--modes", *modes] if modes else []
    command += ["--small"] if args.small else []
    return command + (["--out", str(args.out), "--append"] if args.out is not None else [])
