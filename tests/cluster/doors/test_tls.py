"""TLS at both doors, with certificates made by the openssl command."""

import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
import pytest

from manta.cluster.cli.flags import UsageError, parse_serve_config
from manta.cluster.doors.startup import check_doors
from manta.cluster.doors.tls import CertificateError, Certificates
from manta.cluster.preflight import PreflightError
from manta.configs.schema import ServeConfig
from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with the openssl command")


Make = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(name) gives the files of a self-signed certificate of 127.0.0.1 and of its key."""
    folder = tmp_path_factory.mktemp("certificates")

    def make(name: str, *more: str) -> tuple[Path, Path]:
        certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
        words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
        words += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", *(more or ("-nodes",))]
        subprocess.run([*words, "-out", certificate, "-keyout", key], check=True, capture_output=True)
        return certificate, key

    return make


def ask_http(doors: DoorThread, trusted: Path, client: tuple[Path, Path] | None = None) -> int:
    context = ssl.create_default_context(cafile=str(trusted))
    if client is not None:
        context.load_cert_chain(*client)
    url = doors.base_url.replace("http:", "https:")
    with httpx.Client(base_url=url, verify=context) as http:
        answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3})
    return int(answer.json()["usage"]["completion_tokens"])


def ask_grpc(doors: DoorThread, trusted: Path, client: tuple[Path, Path] | None = None) -> int:
    pair = [client[1].read_bytes(), client[0].read_bytes()] if client else [None, None]
    credentials = grpc.ssl_channel_credentials(trusted.read_bytes(), *pair)
    with grpc.secure_channel(doors.grpc_address, credentials, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=3))
        return int(list(pb_grpc.InferenceStub(channel).Generate(request, timeout=10))[-1].usage.completion_tokens)


ASK = pytest.mark.parametrize("ask", [ask_http, ask_grpc])
Ask = Callable[..., int]


@ASK
def test_both_doors_speak_tls_only(make: Make, model_folder: Path, ask: Ask) -> None:
    certificate, key = make("server")
    stranger, _ = make("stranger")
    with DoorThread(FakeClient(), model_folder, ssl_certfile=str(certificate), ssl_keyfile=str(key)) as doors:
        assert ask(doors, certificate) == 3
        with pytest.raises((httpx.ConnectError, grpc.RpcError)):
            ask(doors, stranger)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{doors.base_url}/health")
        with grpc.insecure_channel(doors.grpc_address) as channel, pytest.raises(grpc.RpcError):
            pb_grpc.InferenceStub(channel).GetLoad(pb.GetLoadRequest(), timeout=10)
        assert ask(doors, certificate) == 3


@ASK
def test_clients_need_a_certificate_where_asked(make: Make, model_folder: Path, ask: Ask) -> None:
    certificate, key = make("server")
    client, stranger = make("client"), make("stranger")
    fields = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key), "ssl_ca_certs": str(client[0])}
    with DoorThread(FakeClient(), model_folder, **fields, ssl_cert_reqs=2) as doors:
        assert ask(doors, certificate, client) == 3
        for wrong in (None, stranger):
            with pytest.raises((httpx.HTTPError, grpc.RpcError)):
                ask(doors, certificate, wrong)


@ASK
def test_a_certificate_is_replaced_without_a_restart(
    make: Make,
    model_folder: Path,
    tmp_path: Path,
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("manta.cluster.doors.tls.RELOAD_INTERVAL_S", 0.0)
    old, new = make("old"), make("new")
    files = tmp_path / "tls.crt", tmp_path / "tls.key"
    for source, file in zip(old, files, strict=True):
        shutil.copy(source, file)
    with DoorThread(FakeClient(), model_folder, ssl_certfile=str(files[0]), ssl_keyfile=str(files[1])) as doors:
        assert ask(doors, old[0]) == 3
        shutil.copy(new[0], files[0])
        assert ask(doors, old[0]) == 3  # the key does not fit yet
        shutil.copy(new[1], files[1])
        assert ask(doors, new[0]) == 3
        with pytest.raises((httpx.ConnectError, grpc.RpcError)):
            ask(doors, old[0])


def test_files_that_cannot_be_used_are_found_before_anything_starts(make: Make, tmp_path: Path) -> None:
    (certificate, key), (_, other_key) = make("server"), make("other")
    _, locked_key = locked = make("locked", "-passout", "pass:secret")
    text = tmp_path / "text"
    text.write_text("hello")
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    cases = [
        ({"ssl_certfile": tmp_path / "none", "ssl_keyfile": key}, "none cannot be read: No such file"),
        ({"ssl_certfile": certificate, "ssl_keyfile": tmp_path / "none"}, "none cannot be read: No such file"),
        ({"ssl_certfile": certificate, "ssl_keyfile": other_key}, f"{other_key} is not the key of .*{certificate}"),
        ({"ssl_certfile": certificate}, f"--ssl-keyfile {certificate} holds no private key"),
        ({"ssl_certfile": text, "ssl_keyfile": key}, f"--ssl-certfile {text} holds no certificate"),
        ({"ssl_certfile": certificate, "ssl_keyfile": text}, f"--ssl-keyfile {text} holds no private key"),
        ({"ssl_certfile": locked[0], "ssl_keyfile": locked_key}, f"{locked_key} has a password"),
        ({"ssl_certfile": both, "ssl_ca_certs": text, "ssl_cert_reqs": 2}, f"--ssl-ca-certs {text} holds no cert"),
        ({"ssl_certfile": both, "ssl_ca_certs": tmp_path / "no", "ssl_cert_reqs": 2}, "--ssl-ca-certs .*No such file"),
    ]
    for fields, message in cases:
        config = ServeConfig(model="m", **{k: str(v) if isinstance(v, Path) else v for k, v in fields.items()})  # type: ignore[arg-type]
        with pytest.raises(PreflightError, match=message):
            check_doors(config)
        with pytest.raises(CertificateError):
            Certificates.of(config)
    check_doors(ServeConfig(model="m", ssl_certfile=str(both)))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--ssl-keyfile k", "needs ssl_certfile"),
        ("--ssl-certfile c --ssl-cert-reqs 2", "need each other"),
        ("--ssl-certfile c --ssl-ca-certs a", "need each other"),
        ("--ssl-certfile c --ssl-ca-certs a --ssl-cert-reqs 1", "use 0 or 2"),
    ],
)
def test_flags_that_do_not_go_together(words: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        parse_serve_config(["m", *words.split()])
