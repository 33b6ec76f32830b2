"""`manta run-batch`: answers a file of requests, with a model of its own or by a running server."""

import argparse
import os
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import uvloop
from tqdm.auto import tqdm

from manta.cluster.batches.run import Counts, SendError, run_lines
from manta.cluster.bench.http_client import Address, AnswerError, HttpClient
from manta.cluster.cli.flags import Parser, UsageError, parse_serve_config
from manta.cluster.launch.launcher import LaunchError
from manta.cluster.launch.local import LocalLauncher, local_gpus
from manta.cluster.preflight import PreflightError, check, with_absolute_paths
from manta.configs.schema import ServeConfig

_WINDOW_FACTOR = 4  # requests on their way, per sequence that can run at once
_SERVER_WINDOW = 256  # the same for a server whose limits are unknown
_EPILOG = "Every other flag is one of `manta serve`. The output has a line per request, in the order in which they end."


def run_batch(argv: list[str]) -> int:
    """Returns 0 when every line has been answered, refusals included; 1 when some got no answer. Raises UsageError."""
    parser = Parser(
        prog="manta run-batch", description="Answer a file of requests.", epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("-i", "--input-file", required=True, type=Path, help="JSON lines as of the OpenAI batch API")
    parser.add_argument("-o", "--output-file", required=True, type=Path, help="gets a JSON line per request")
    parser.add_argument("--model", help="local Hugging Face folder or hub id; started for this batch")
    parser.add_argument("--url", help="a running server to use instead, for example http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="", help="of that server; that of OPENAI_API_KEY if unset")
    args, rest = parser.parse_known_args(argv)
    if (args.model is None) == (args.url is None):
        raise UsageError("give either --model, to start it for this batch, or --url of a running server")
    if args.url and rest:
        raise UsageError(f"{rest[0]} is a flag of a model that is started; with --url the server has its own")
    with _opened(args) as (lines, num_lines, output):
        if args.url:
            key = args.api_key or os.environ.get("OPENAI_API_KEY", "")
            counts = _run(lines, num_lines, output, args.url, key, _SERVER_WINDOW)
        else:
            config = _private_config(parse_serve_config([args.model, *rest]))
            with _server(config) as url:
                window = _WINDOW_FACTOR * config.max_num_seqs * config.data_parallel_size
                counts = _run(lines, num_lines, output, url, "", min(window, config.max_num_queued_reqs))
    print(
        f"manta: {counts.answered} answered, {counts.refused} refused, {counts.failed} failed; {args.output_file}",
        file=sys.stderr,
    )
    return 1 if counts.failed else 0


@contextmanager
def _opened(args: argparse.Namespace) -> Iterator[tuple[IO[bytes], int, IO[bytes]]]:
    """The input, its number of lines, and the output. Raises UsageError before anything is started."""
    try:
        with args.input_file.open("rb") as lines:
            num_lines = sum(1 for line in lines if line.strip())
            lines.seek(0)
            if args.output_file.exists() and args.output_file.samefile(args.input_file):
                raise UsageError("--output-file is the input file")
            with args.output_file.open("ab") as output:  # what is in it stays until there are answers to come
                yield lines, num_lines, output
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None


def _private_config(config: ServeConfig) -> ServeConfig:
    """A deployment that nobody else can reach."""
    private = {"host": "127.0.0.1", "port": 0, "grpc_port": 0, "distributed_executor_backend": "local"}
    private["batch_dir"] = None  # its batches are those of another deployment
    return with_absolute_paths(config.model_copy(update=private))


@contextmanager
def _server(config: ServeConfig) -> Iterator[str]:
    """The URL of a deployment of plain processes, which ends with the block. Raises UsageError."""
    launcher = LocalLauncher()
    try:
        check(config, on_gpu=config.device != "cpu" and bool(local_gpus()), ports=False)
        workers = launcher.start_workers(config)
        launcher.prepare_frontends(config)
        address = launcher.open_frontends(config, launcher.start_scheduler(config, workers))
        yield f"http://127.0.0.1:{address.http_port}"
    except (LaunchError, PreflightError) as error:
        raise UsageError(str(error)) from None
    finally:
        launcher.stop(0.0)


def _run(lines: IO[bytes], num_lines: int, output: IO[bytes], url: str, key: str, window: int) -> Counts:
    try:
        address = Address.parse(url.removesuffix("/").removesuffix("/v1"))
    except ValueError as error:
        raise UsageError(f"--url: {error}") from None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    tls = ssl.create_default_context() if address.scheme == "https" else None

    def write(line: bytes) -> None:
        output.write(line)
        output.flush()  # what is done stays, whatever comes

    async def run() -> Counts:
        output.truncate(0)
        client = HttpClient(address, headers, tls)
        try:
            with tqdm(total=num_lines, desc="Requests", delay=1.0) as bar:
                return await run_lines(lines, _Sender(client), write, window, bar.update)
        finally:
            client.close()

    return uvloop.run(run())


class _Sender:
    """Posts requests through an HttpClient."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    async def __call__(self, url: str, body: bytes) -> tuple[int, bytes]:
        answer = _Answer()
        try:
            await self._client.request("POST", url, body, answer)
        except AnswerError as error:
            raise SendError(str(error)) from None
        return answer.status, bytes(answer.body)


class _Answer:
    """Keeps one answer."""

    def __init__(self) -> None:
        self.status = 0
        self.body = bytearray()

    def on_start(self, status: int) -> None:
        self.status = status

    def on_body(self, piece: bytes, now_s: float) -> None:
        self.body += piece
