"""The `manta` command."""

import sys
from collections.abc import Callable
from importlib import metadata

from manta.cluster.cli.flags import UsageError, fail

_USAGE = """\
usage: manta COMMAND [flags]

commands:
  serve MODEL    serve a model over HTTP (OpenAI-compatible) and gRPC
  plan CONFIG    what a deployment will take of its GPUs' memory, and whether it fits
  chat           talk to a running server
  complete       continue a text with a running server
  top            watch the block tables of a running server
  run-batch      answer a file of requests, as of the OpenAI batch API
  bench          measure a server, or the engine by itself: serve, throughput, latency
  collect-env    print versions and hardware, for bug reports

manta COMMAND --help lists the flags of a command; manta --version prints the version.
"""


def main(argv: list[str] | None = None) -> None:
    """Runs one command and exits with its code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        raise SystemExit(0 if words else 2)
    if words[0] in ("-V", "--version"):
        print(f"manta {metadata.version('manta')}")
        return
    command = _COMMANDS.get(words[0])
    if command is None:
        fail(f"unknown command {words[0]!r}; there are: {', '.join(_COMMANDS)}")
    try:
        code = command(words[1:])
    except UsageError as error:
        fail(str(error))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has had enough
        code = 141
    raise SystemExit(code)


def _serve(argv: list[str]) -> int:
    from manta.cluster.cli.serve import serve

    return serve(argv)


def _plan(argv: list[str]) -> int:
    from manta.cluster.cli.plan import plan

    return plan(argv)


def _chat(argv: list[str]) -> int:
    from manta.cluster.cli.talk import chat

    return chat(argv)


def _complete(argv: list[str]) -> int:
    from manta.cluster.cli.talk import complete

    return complete(argv)


def _top(argv: list[str]) -> int:
    from manta.cluster.cli.top import top

    return top(argv)


def _run_batch(argv: list[str]) -> int:
    from manta.cluster.cli.run_batch import run_batch

    return run_batch(argv)


def _bench(argv: list[str]) -> int:
    from manta.cluster.cli.bench import bench

    return bench(argv)


def _collect_env(argv: list[str]) -> int:
    from manta.cluster.cli.collect_env import collect_env

    return collect_env(argv)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "plan": _plan,
    "chat": _chat,
    "complete": _complete,
    "top": _top,
    "run-batch": _run_batch,
    "bench": _bench,
    "collect-env": _collect_env,
}

if __name__ == "__main__":
    main()
