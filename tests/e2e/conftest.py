"""One real server on a local Ray cluster for all end-to-end tests of this folder: fp32, so that results are exact."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import DEMO_MODEL, ServerProcess

TEMPLATE = Path(__file__).parent / "chat_template.jinja"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(
        str(DEMO_MODEL), "--served-model-name", "text2sql", "--dtype", "float32", "--max-num-seqs", "32",
        "--kv-cache-memory-bytes", "64MiB", "--max-num-batched-tokens", "256", "--port", "0", "--grpc-port", "0",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--chat-template", str(TEMPLATE),
        "--batch-dir", str(tmp_path_factory.mktemp("batches")),
    )  # fmt: skip
    try:
        yield process.wait_ready()
        process.signal(signal.SIGTERM)
        assert process.wait(60) == 0  # drained; Ray's own handler of SIGTERM would have ended it with another code
    finally:
        process.close()
