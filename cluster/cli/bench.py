"""`manta bench`: measures a running server, or the engine in this process."""

from collections.abc import Callable

from manta.cluster.bench.errors import BenchError
from manta.cluster.cli.flags import UsageError

_USAGE = """\
usage: manta bench COMMAND [flags]

commands:
  serve         send requests to a running OpenAI-compatible server and measure its answers
  throughput    tokens per second of a batch of requests, without a server
  latency       seconds that one batch takes, without a server

manta bench COMMAND --help lists the flags of a command.
"""


def bench(argv: list[str]) -> int:
    """Runs one benchmark and returns its exit code. Raises UsageError with one sentence."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0 if argv else 2
    command = _COMMANDS.get(argv[0])
    if command is None:
        raise UsageError(f"unknown command 'bench {argv[0]}'; there are: {', '.join(_COMMANDS)}")
    try:
        return command(argv[1:])
    except BenchError as error:
        raise UsageError(str(error)) from None


def _serve(argv: list[str]) -> int:
    from manta.cluster.bench.serve import bench_serve
    from manta.cluster.bench.serve_flags import serve_parser

    return bench_serve(serve_parser().parse_args(argv))


def _throughput(argv: list[str]) -> int:
    from manta.cluster.bench.throughput import bench_throughput, throughput_parser

    return bench_throughput(throughput_parser().parse_args(argv))


def _latency(argv: list[str]) -> int:
    from manta.cluster.bench.latency import bench_latency, latency_parser

    return bench_latency(latency_parser().parse_args(argv))


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "throughput": _throughput,
    "latency": _latency,
}
