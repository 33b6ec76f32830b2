"""The flags of `manta bench serve`: vLLM's names, defaults and meanings where it has them."""

import argparse
import json
from typing import Any

from manta.cluster.bench.dataset_flags import COUNT, LENGTH, add_dataset_flags, add_flag, number
from manta.cluster.bench.metrics import GOODPUT_METRICS, METRICS
from manta.cluster.cli.flags import Parser

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions", "vllm": "/v1/completions"}
SAMPLING_FLAGS = ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


def serve_parser() -> argparse.ArgumentParser:
    """The parser; its errors are UsageErrors of one sentence."""
    parser = Parser(
        prog="manta bench serve",
        usage="manta bench serve [flags]",
        description="Send requests to a running OpenAI-compatible server and measure its answers.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_server_flags(parser)
    add_dataset_flags(parser)
    _add_traffic_flags(parser)
    _add_sampling_flags(parser)
    _add_report_flags(parser)
    return parser


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Server")
    backend = "openai (or vllm): completions; openai-chat: chat completions"
    add_flag(group, "--backend", backend, "openai", choices=list(ENDPOINTS))
    add_flag(group, "--base-url", "instead of --host and --port, as http://host:port", metavar="URL")
    add_flag(group, "--host", "", "127.0.0.1")
    add_flag(group, "--port", "", 8000, type=COUNT, metavar="N")
    add_flag(group, "--endpoint", "path of the API; that of the backend if unset", metavar="PATH")
    add_flag(group, "--model", "the first one the server lists if unset", metavar="NAME")
    add_flag(group, "--served-model-name", "name for requests, where it is not --model", metavar="NAME")
    add_flag(group, "--tokenizer", "folder or hub id; the model's if its folder is here", metavar="FOLDER")
    add_flag(group, "--trust-remote-code", "let the tokenizer run code from its folder", action="store_true")
    add_flag(group, "--api-key", "sent as a bearer token; that of OPENAI_API_KEY if unset", metavar="KEY")
    add_flag(group, "--header", "with every request", [], nargs="*", type=_pair, metavar="KEY=VALUE")
    add_flag(group, "--insecure", "do not check the server's certificate", action="store_true")
    ready = "wait so long for the server to answer"
    add_flag(group, "--ready-check-timeout-sec", ready, 0.0, type=number(float, 0), metavar="S")


def _add_traffic_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Traffic")
    rate = "requests per second, or inf: all at once (default: inf; a trace: as recorded)"
    add_flag(group, "--request-rate", rate, type=number(float, 0, above=True), metavar="X")
    burstiness = "1: Poisson arrivals; less: bursts; more: even; gamma distributed gaps"
    add_flag(group, "--burstiness", burstiness, 1.0, type=number(float, 0, above=True), metavar="X")
    add_flag(group, "--max-concurrency", "requests under way at most", type=COUNT, metavar="N")
    warmups = "requests of other random tokens before the measured ones"
    add_flag(group, "--num-warmups", warmups, 0, type=LENGTH, metavar="N")
    add_flag(group, "--request-id-prefix", "start of every request's X-Request-Id; random if unset", metavar="TEXT")


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Sampling")
    add_flag(group, "--temperature", "0 is greedy", 0.0, type=float, metavar="X")
    for name in SAMPLING_FLAGS:
        kind = int if name == "top_k" else float
        add_flag(group, f"--{name.replace('_', '-')}", "not sent if unset", type=kind, metavar="X")
    ignore = "generate the whole output length (default: on, but for sharegpt)"
    add_flag(group, "--ignore-eos", ignore, action=argparse.BooleanOptionalAction)
    add_flag(group, "--extra-body", "more fields of each request", {}, type=_json_object, metavar="JSON")


def _add_report_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Report")
    goodput = f"count requests that keep all these limits; of {', '.join(GOODPUT_METRICS)}"
    add_flag(group, "--goodput", goodput, [], nargs="+", type=_limit, metavar="METRIC:MS")
    metrics = f"of {','.join(METRICS)}"
    add_flag(group, "--percentile-metrics", metrics, "ttft,tpot,itl", type=_metrics, metavar="LIST")
    add_flag(group, "--metric-percentiles", "as 50,90,99", "99", type=_percentiles, metavar="LIST")
    add_flag(group, "--save-result", "write the figures to a JSON file", action="store_true")
    add_flag(group, "--save-detailed", "add what is known of each request to that file", action="store_true")
    add_flag(group, "--append-result", "add a line to that file instead of a new file", action="store_true")
    add_flag(group, "--result-dir", "where to write it; here if unset", metavar="DIR")
    add_flag(group, "--result-filename", "made of backend, rate, model and time if unset", metavar="NAME")
    add_flag(group, "--label", "start of the file name, and in the file; the backend if unset", metavar="TEXT")
    add_flag(group, "--metadata", "added to the file", [], nargs="*", type=_pair, metavar="KEY=VALUE")
    add_flag(group, "--plot", "draw TTFT, ITL and throughput over time (.png, .svg or .pdf)", metavar="FILE")
    add_flag(group, "--disable-tqdm", "no progress bar", action="store_true")


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, not {text!r}")
    return key.strip(), value.strip()


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text!r}")
    return value


def _limit(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in GOODPUT_METRICS:
        raise argparse.ArgumentTypeError(f"must be METRIC:MS with one of {', '.join(GOODPUT_METRICS)}, not {text!r}")
    try:
        limit_ms = float(limit)
    except ValueError:
        limit_ms = -1.0
    if not limit_ms >= 0:
        raise argparse.ArgumentTypeError(f"must give a limit in ms, as {name}:200, not {text!r}")
    return name, limit_ms


def _metrics(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"must be of {','.join(METRICS)}, not {name!r}")
    return names


def _percentiles(text: str) -> list[float]:
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"must be numbers from 0 to 100, as 50,90,99, not {text!r}")
    return values
