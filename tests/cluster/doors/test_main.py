"""The frontend as a process, connected to an engine that only tells about itself."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from manta.protos import engine_pb2 as pb
from manta.protos import engine_pb2_grpc as pb_grpc


class SilentEngine(pb_grpc.EngineServicer):
    """Answers the plain calls, and takes the stream without ever sending a token."""

    def Connect(self, requests: Iterator[pb.FrontendMessage], context: Any) -> Iterator[pb.EngineMessage]:
        for _ in requests:
            yield pb.EngineMessage()

    def GetInfo(self, request: pb.InfoRequest, context: Any) -> pb.InfoResponse:
        return pb.InfoResponse(max_model_len=128, num_blocks=8, block_size=16)

    def GetLoad(self, request: pb.LoadRequest, context: Any) -> pb.LoadResponse:
        return pb.LoadResponse(healthy=True, num_blocks=8)


@pytest.fixture
def engine_address() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(8))
    pb_grpc.add_EngineServicer_to_server(SilentEngine(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def start(engine_address: str, model_folder: Path, **fields: Any) -> subprocess.Popen[str]:
    config = {"model": str(model_folder), "host": "127.0.0.1", "port": 0, "grpc_port": 0, "shutdown_timeout": 1.0}
    command = [sys.executable, "-m", "manta.cluster.doors.main", "--config-json", json.dumps(config | fields)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin is not None
    process.stdin.write(f"{engine_address} {fields.get('port', 0)} 0\n")
    process.stdin.flush()
    return process


def test_serves_until_sigterm(engine_address: str, model_folder: Path) -> None:
    process = start(engine_address, model_folder)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[0] == "MANTA_ADDRESS"
        assert httpx.get(f"http://{words[1]}/health").status_code == 200
        assert httpx.get(f"http://{words[1]}/v1/models").json()["data"][0]["max_model_len"] == 128
        with grpc.insecure_channel(words[2]) as channel:
            grpc.channel_ready_future(channel).result(10)
        # A request that never ends does not keep the process from ending after shutdown_timeout.
        with httpx.stream(
            "POST", f"http://{words[1]}/v1/completions", json={"prompt": "x", "stream": True}
        ) as response:
            process.send_signal(signal.SIGTERM)
            assert '"finish_reason":"abort"' in "".join(response.iter_text())
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_port_in_use_is_one_clear_sentence(engine_address: str, model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(engine_address, model_folder, port=port)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.startswith("MANTA_ERROR ")
    assert f"{port}" in output
    assert "in use" in output
    assert len(output.splitlines()) == 1
    assert "Traceback" not in errors


def test_a_model_without_a_tokenizer_is_one_clear_sentence(engine_address: str, tmp_path: Path) -> None:
    process = start(engine_address, tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.startswith("MANTA_ERROR no tokenizer can be loaded")
