"""`manta bench serve`: measures a running OpenAI-compatible server from outside."""

import argparse
import asyncio
import contextlib
import math
import os
import resource
import signal
import ssl
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import uvloop
from tqdm import tqdm

from manta.cluster.bench.arrivals import arrival_times_s
from manta.cluster.bench.bodies import BodyMaker, common_settings
from manta.cluster.bench.dataset_flags import check_dataset_flags, make_samples
from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.http_client import Address, HttpClient
from manta.cluster.bench.load import Endpoint, Prepared, Run, run_load
from manta.cluster.bench.metrics import Summary, summarize
from manta.cluster.bench.plot import check_plot, draw
from manta.cluster.bench.prompts import Prompts, choose_prompts
from manta.cluster.bench.report import result_lines, warnings
from manta.cluster.bench.results import detailed_values, result_path, result_values, write_result
from manta.cluster.bench.samples import fit_to_model, warm_up_samples
from manta.cluster.bench.serve_flags import ENDPOINTS
from manta.cluster.bench.server_info import ServerModel, find_model

_NUM_ERRORS_SHOWN = 5
_NUM_FILES = 65_536


def bench_serve(args: argparse.Namespace) -> int:
    """Runs the benchmark. Returns 0, 1 if no request succeeded, 130 after Ctrl-C. Raises BenchError."""
    check_dataset_flags(args)
    if args.plot:
        check_plot(Path(args.plot))
    _raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Benchmark(args).run())


@dataclass(frozen=True)
class _Load:
    """All that is sent, and when."""

    requests: list[Prepared]
    arrivals_s: list[float]
    warmups: list[Prepared]
    request_rate: float  # inf: all at once, or at the times of a trace


class _Benchmark:
    """One run, from looking at the server to the report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        try:
            address = Address.parse(args.base_url or f"http://{_bracketed(args.host)}:{args.port}")
        except ValueError as error:
            raise BenchError(f"--base-url: {error}") from None
        path = args.endpoint or ENDPOINTS[args.backend]
        if address.prefix.endswith("/v1"):  # as the OpenAI SDK writes its base_url
            address = Address(address.scheme, address.host, address.port, address.prefix.removesuffix("/v1"))
        self._where = str(address)
        self._client = HttpClient(address, _headers(args), _tls(args, address))
        self._endpoint = Endpoint(self._client, path, args.backend == "openai-chat", args.save_detailed)
        self._id_prefix: str = args.request_id_prefix or f"bench-{uuid.uuid4().hex[:8]}-"
        self._ignore_eos: bool = args.dataset_name != "sharegpt" if args.ignore_eos is None else args.ignore_eos

    async def run(self) -> int:
        args = self._args
        try:
            wanted = args.served_model_name or args.model
            model = await find_model(self._client, self._where, wanted, args.ready_check_timeout_sec)
            settings = common_settings(args, model.name, self._ignore_eos)
            prompts = await choose_prompts(args, self._endpoint, self._where, model, settings)
            print(f"Prompts: {prompts.told}")
            load = self._prepare(model, settings, prompts)
            path = result_path(args, model.name, load.request_rate, datetime.now()) if _saves(args) else None
            await self._warm_up(load.warmups)
            run = await self._measure(load)
        finally:
            self._client.close()
        summary = summarize(run, len(load.requests), args.metric_percentiles, dict(args.goodput))
        self._print(run, summary, load)
        tokenizer = prompts.tokenizer.name if prompts.tokenizer else None
        if path is not None:
            values = result_values(args, model.name, tokenizer, load.request_rate, datetime.now(), summary)
            write_result(path, values | (detailed_values(run) if args.save_detailed else {}), args.append_result)
            print(f"Figures written to {path}")
        if args.plot:
            draw(run, self._title(model, summary, load), Path(args.plot))
            print(f"Plot written to {args.plot}")
        if run.is_interrupted:
            return 130
        return 0 if summary.completed else 1

    def _prepare(self, model: ServerModel, settings: dict[str, Any], prompts: Prompts) -> _Load:
        args = self._args
        samples = make_samples(args, prompts.ids, prompts.tokenizer)
        if model.max_model_len:
            samples = fit_to_model(samples, model.max_model_len, cuts=args.dataset_name == "trace")
        maker = BodyMaker(settings, self._endpoint.is_chat, prompts, self._id_prefix, args.seed)
        warmups = warm_up_samples(samples, prompts.ids, args.num_warmups, args.seed)
        recorded = [sample.arrival_s for sample in samples if sample.arrival_s is not None]
        if recorded and args.request_rate is None:
            rate, arrivals_s = math.inf, recorded
        else:
            rate = math.inf if args.request_rate is None else args.request_rate
            arrivals_s = arrival_times_s(len(samples), rate, args.burstiness, args.seed).tolist()
        return _Load(maker.prepare(samples), arrivals_s, maker.prepare(warmups), rate)

    async def _warm_up(self, warmups: list[Prepared]) -> None:
        if not warmups:
            return
        print(f"Warming up with {len(warmups)} requests...")
        run = await run_load(self._endpoint, warmups, [0.0] * len(warmups), self._args.max_concurrency, asyncio.Event())
        if failed := [record.error for record in run.records if record.error]:
            raise BenchError(f"a warm-up request failed: {failed[0]}")
        print("Warmup run completed.")

    async def _measure(self, load: _Load) -> Run:
        args = self._args
        print("Starting main benchmark run...")
        if args.dataset_name == "trace" and args.request_rate is None:
            print(f"Traffic: as recorded, {load.arrivals_s[-1]:.1f} s for {len(load.requests)} requests")
        else:
            print(f"Traffic request rate: {load.request_rate}")
            process = "Poisson process" if args.burstiness == 1.0 else "Gamma distribution"
            print(f"Burstiness factor: {args.burstiness} ({process})")
        print(f"Maximum request concurrency: {args.max_concurrency}", flush=True)
        with _stop_on_interrupt() as stop, tqdm(total=len(load.requests), disable=args.disable_tqdm) as bar:
            return await run_load(
                self._endpoint, load.requests, load.arrivals_s, args.max_concurrency, stop, lambda _: bar.update()
            )

    def _print(self, run: Run, summary: Summary, load: _Load) -> None:
        args = self._args
        if run.is_interrupted:
            print(f"Interrupted: {summary.unfinished} requests were not answered and do not count")
        errors = Counter(record.error for record in run.records if record.error)
        for error, count in list(errors.items())[:_NUM_ERRORS_SHOWN]:  # in the order in which they first came
            print(f"Error of {count} requests: {error}")
        if len(errors) > _NUM_ERRORS_SHOWN:
            print(f"... and {len(errors) - _NUM_ERRORS_SHOWN} other errors")
        print("\n".join(result_lines(summary, args.percentile_metrics, load.request_rate, args.max_concurrency)))
        for warning in warnings(summary, paces=load.arrivals_s[-1] > 0):
            print(f"warning: {warning}")

    def _title(self, model: ServerModel, summary: Summary, load: _Load) -> str:
        args = self._args
        rate = "" if math.isinf(load.request_rate) else f", {load.request_rate:g} req/s"
        return (
            f"{Path(model.name).name}: {args.dataset_name}, {summary.completed} requests{rate}, "
            f"{summary.output_throughput:.0f} output tok/s"
        )


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[asyncio.Event]:
    """An event that the first Ctrl-C sets; a second one ends the program."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _headers(args: argparse.Namespace) -> dict[str, str]:
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    return ({"Authorization": f"Bearer {key}"} if key else {}) | dict(args.header)


def _tls(args: argparse.Namespace, address: Address) -> ssl.SSLContext | None:
    if address.scheme != "https":
        return None
    context = ssl.create_default_context()
    if args.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _saves(args: argparse.Namespace) -> bool:
    return bool(args.save_result or args.append_result)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _raise_file_limit() -> None:
    """Every request under way holds a socket, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _NUM_FILES if hard == resource.RLIM_INFINITY else min(hard, _NUM_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
