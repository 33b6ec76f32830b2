"""A whole deployment of plain processes with keys and TLS: what works with a key, and where no key is to be found."""

import re
import shutil
import signal
import ssl
import subprocess
from pathlib import Path

import grpc
import httpx
import pytest

from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.server import DEMO_MODEL, ServerProcess

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with the openssl command")
KEY, NEXT_KEY = "sk-only-for-this-test", "sk-its-successor"


def make_certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "tls.crt", folder / "tls.key"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*words, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    return certificate, key


def test_a_deployment_with_keys_and_tls(tmp_path: Path) -> None:
    certificate, private_key = make_certificate(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text(f"team:{KEY}\n")
    words = f"--distributed-executor-backend local --device cpu --host 127.0.0.1 --port 0 --grpc-port 0 \
        --kv-cache-memory-bytes 16MiB --served-model-name demo --max-num-seqs 8 --max-num-batched-tokens 64 \
        --ssl-certfile {certificate} --ssl-keyfile {private_key} --api-key-file {keys}"
    with ServerProcess(str(DEMO_MODEL), *words.split()) as server:
        server.wait_ready()
        url = re.search(r"^HTTP +(https://\S+)/v1$", server.output, re.MULTILINE)
        address = re.search(r"^gRPC +(\S+) \(TLS\)$", server.output, re.MULTILINE)
        assert url is not None
        assert address is not None
        body = {"prompt": "SELECT", "max_tokens": 4, "temperature": 0}
        with httpx.Client(base_url=url[1], verify=ssl.create_default_context(cafile=certificate), timeout=60) as http:
            assert http.get("/health").status_code == 200
            assert http.post("/v1/completions", json=body).status_code == 401
            http.headers["Authorization"] = f"Bearer {KEY}"
            text = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
            credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
            with grpc.secure_channel(address[1], credentials) as channel:
                request = pb.GenerateRequest(text="SELECT", sampling=pb.SamplingParams(max_tokens=4, temperature=0))
                call = pb_grpc.InferenceStub(channel).Generate(request, metadata=(("authorization", f"Bearer {KEY}"),))
                assert "".join(response.text for response in call) == text
            keys.write_text(f"team:{NEXT_KEY}\n")
            while http.get("/version").status_code == 200:
                pass  # at most a second: the timeout of the test ends it otherwise
            http.headers["Authorization"] = f"Bearer {NEXT_KEY}"
            assert http.get("/version").status_code == 200
        processes = server.processes()
        assert len(processes) >= 4
        for pid, command in processes.items():
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
            for secret in (KEY, NEXT_KEY, "sha256:"):
                assert secret not in command
                assert secret not in environment
        server.signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert "sk-" not in server.output
