"""A rolling restart under load: the server gets SIGUSR1 while clients of the openai package ask without a pause.

python bench/rolling.py [--clients 8] [--retries 0] [-- flags of manta serve]

Prints how many requests there were, how many failed and why, and what the longest took. `--retries` is the client's
max_retries, which is 2 where nobody sets it.
"""

import argparse
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import openai

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.server import DEMO_MODEL, ServerProcess

QUICK = ("--kv-cache-memory-bytes", "32MiB", "--port", "0", "--grpc-port", "0", "--max-num-seqs", "16")


class Load:
    """Threads that ask one request after the other: streams and whole answers, over connections that are kept and over
    new ones."""

    def __init__(self, url: str, num_clients: int, num_retries: int) -> None:
        self.latencies_s: list[float] = []
        self.failures: Counter[str] = Counter()
        self._url = url
        self._num_retries = num_retries
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        keeps = number % 2 == 0
        http = httpx.Client(limits=httpx.Limits(max_keepalive_connections=None if keeps else 0))
        options = {"base_url": f"{self._url}/v1", "api_key": "none", "timeout": 120, "http_client": http}
        client = openai.OpenAI(**options, max_retries=self._num_retries)  # type: ignore[arg-type]
        body = {"model": str(DEMO_MODEL), "temperature": 0.0, "extra_body": {"ignore_eos": True}}
        num_asked = 0
        while not self._over.is_set():
            num_asked += 1
            length = 20 + 180 * (num_asked % 3 == 0)
            began_s = time.monotonic()
            try:
                if number % 4 < 2:
                    answer = client.completions.create(prompt=f"{number}", max_tokens=length, **body)  # type: ignore[call-overload]
                    num_tokens = answer.usage.completion_tokens
                else:
                    more = {"stream": True, "stream_options": {"include_usage": True}}
                    chunks = list(client.completions.create(prompt=f"{number}", max_tokens=length, **body, **more))  # type: ignore[call-overload]
                    num_tokens = chunks[-1].usage.completion_tokens
                if num_tokens != length:
                    self.failures[f"{num_tokens} of {length} tokens"] += 1
            except (openai.OpenAIError, httpx.HTTPError) as error:
                self.failures[f"{type(error).__name__}: {error.__cause__ or error}"] += 1
            self.latencies_s.append(time.monotonic() - began_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--retries", type=int, default=0)
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    words = (str(DEMO_MODEL), "--distributed-executor-backend", "local", *QUICK, *args.flags)
    with ServerProcess(*words).wait_ready() as server:
        load = Load(server.url, args.clients, args.retries)
        time.sleep(2.0)
        num_before = len(load.latencies_s)
        server.signal(signal.SIGUSR1)
        server.wait_for("the rolling restart (is complete|ends)", 300)
        num_meanwhile = len(load.latencies_s) - num_before
        time.sleep(10.0)  # the last frontend answers those who are connected
        load.end()
        for line in server.lines:
            if line.startswith("manta: "):
                print(line, end="")
    num, num_failed = len(load.latencies_s), load.failures.total()
    print(
        f"{num} requests, {num_meanwhile} of them during the restart; {num_failed} failed\n"
        f"latency, s: median {statistics.median(load.latencies_s):.2f}, longest {max(load.latencies_s):.2f}"
    )
    for reason, count in load.failures.items():
        print(f"{count} x {reason}")
    sys.exit(1 if load.failures else 0)


if __name__ == "__main__":
    main()
