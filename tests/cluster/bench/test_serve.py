"""`manta bench serve` as a user runs it, against servers that behave in every way a server can."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from manta.cluster.cli.main import main
from tests.support.fake_openai import FakeServer, Reply, Request, answer_well, completion_events
from tests.support.server import ROOT
from tests.support.small_tokenizers import write_model_folder

LOAD = ["--random-input-len", "9", "--random-output-len", "3", "--num-prompts", "6"]
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00.0,30,4\n2024-01-01 00:00:00.05,3000,6\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


def bench(server: FakeServer | str, *words: str) -> int:
    """The exit code of `manta bench serve` with a small random load, unless the words say otherwise."""
    url = server if isinstance(server, str) else server.url
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", "--base-url", url, "--disable-tqdm", *LOAD, *words])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_token_ids_of_a_known_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(answer_well) as server:
        assert bench(server, "--tokenizer", str(folder)) == 0
    out = capsys.readouterr().out
    assert "Prompts: token ids, " in out
    for line in ("Successful requests:                     6", "Total input tokens:                      54",
                 "Total generated tokens:                  18", "Traffic request rate: inf"):  # fmt: skip
        assert line in out
    first, *bodies = server.posts()
    assert (len(first["prompt"]), first["max_tokens"]) == (2, 1), "one short request to try"
    for body in bodies:
        assert len(body["prompt"]) == 9
        assert all(6 <= token < 512 for token in body["prompt"])
        assert body["stream_options"] == {"include_usage": True}
        assert (body["model"], body["max_tokens"], body["stream"]) == ("fake", 3, True)
        assert (body["temperature"], body["ignore_eos"]) == (0, True)
    assert len({tuple(body["prompt"]) for body in bodies}) == 6


def test_token_ids_without_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    """The largest size whose ids the server takes is found out."""

    async def small_vocabulary(request: Request, reply: Reply) -> None:
        if request.method == "POST" and max(request.body["prompt"]) >= 1500:
            return await reply.json({"error": {"message": "token id out of range"}}, 400)
        await answer_well(request, reply)

    with FakeServer(small_vocabulary) as server:
        assert bench(server, "--num-prompts", "40") == 0
    assert "token ids below 1024" in capsys.readouterr().out
    tokens = {token for body in server.posts()[3:] for token in body["prompt"]}
    assert min(tokens) >= 256
    assert max(tokens) < 1024


def test_text_where_token_ids_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def only_text(request: Request, reply: Reply) -> None:
        if request.method == "POST" and not isinstance(request.body["prompt"], str):
            return await reply.json({"error": {"message": "prompt must be a string"}}, 422)
        await answer_well(request, reply)

    with FakeServer(only_text) as server:
        assert bench(server, "--tokenizer", str(folder)) == 0
        assert "Prompts: text" in capsys.readouterr().out
        assert all(isinstance(body["prompt"], str) for body in server.posts()[1:])
        assert bench(server) == 2
    assert "name the model's tokenizer with --tokenizer" in capsys.readouterr().err


def test_chat(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(answer_well) as server:
        words = ["--backend", "openai-chat", "--no-ignore-eos", "--top-k", "5", "--extra-body", '{"seed": 7}']
        assert bench(server, *words) == 2
        assert "--tokenizer" in capsys.readouterr().err
        assert bench(server, *words, "--tokenizer", str(folder), "--percentile-metrics", "e2el") == 0
    out = capsys.readouterr().out
    assert "Mean E2EL (ms):" in out
    assert "Mean TTFT (ms):" not in out
    for body in server.posts("/v1/chat/completions")[1:]:
        assert [message["role"] for message in body["messages"]] == ["user"]
        assert (body["max_completion_tokens"], body["top_k"], body["seed"]) == (3, 5, 7)
        assert "ignore_eos" not in body


def test_trace_is_cut_to_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE)
    with FakeServer(answer_well) as server:
        assert bench(server, "--dataset-name", "trace", "--dataset-path", str(file)) == 0
        out = capsys.readouterr().out
        assert "1 of 2 requests are cut to the model's 2048 tokens" in out
        assert "Traffic: as recorded, 0.1 s for 2 requests" in out
        assert {(len(body["prompt"]), body["max_tokens"]) for body in server.posts()[1:]} == {(30, 4), (2042, 6)}
        words = ["--trace-length-scale", "0.1", "--request-rate", "500"]
        assert bench(server, "--dataset-name", "trace", "--dataset-path", str(file), *words) == 0
        assert "Request rate configured (RPS):           500.00" in capsys.readouterr().out


def test_sharegpt_sends_its_text(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "sharegpt.json"
    turns = [{"value": "Hello world, how are you today?"}, {"value": "The quick brown fox jumps."}]
    file.write_text(json.dumps([{"conversations": turns}]))
    with FakeServer(answer_well) as server:
        words = ["--dataset-name", "sharegpt", "--dataset-path", str(file), "--sharegpt-output-len", "8"]
        assert bench(server, *words, "--tokenizer", str(folder)) == 0
    bodies = server.posts()[1:]
    assert {body["prompt"] for body in bodies} == {turns[0]["value"]}
    assert {body["max_tokens"] for body in bodies} == {8}
    assert all("ignore_eos" not in body for body in bodies)


def test_warm_ups_are_other_prompts(folder: Path) -> None:
    with FakeServer(answer_well) as server:
        assert bench(server, "--num-warmups", "3", "--tokenizer", str(folder)) == 0
    prompts = [tuple(body["prompt"]) for body in server.posts()[1:]]
    assert len(prompts) == len(set(prompts)) == 9
    assert {len(prompt) for prompt in prompts} == {9}


def test_same_seed_same_requests(folder: Path) -> None:
    def prompts(seed: str) -> list[Any]:
        with FakeServer(answer_well) as server:
            assert bench(server, "--seed", seed, "--tokenizer", str(folder), "--max-concurrency", "1") == 0
        return [body["prompt"] for body in server.posts()]

    assert prompts("3") == prompts("3") != prompts("4")


def test_headers_and_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def needs_key(request: Request, reply: Reply) -> None:
        if request.headers.get("authorization") != "Bearer sk-1":
            return await reply.json({"error": {"message": "wrong key"}}, 401)
        await answer_well(request, reply)

    with FakeServer(needs_key) as server:
        assert bench(server) == 2
        assert "401: wrong key" in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
        assert bench(f"{server.url}/v1", "--header", "x-tenant=a=b", "c=d", "--request-id-prefix", "run-") == 0
        last = server.requests[-6:]
        assert {request.headers["x-request-id"] for request in last} == {f"run-{i}" for i in range(6)}
        assert {(request.headers["x-tenant"], request.headers["c"]) for request in last} == {("a=b", "d")}


def test_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(answer_well) as server:
        words = ["--tokenizer", str(folder), "--result-dir", str(tmp_path / "new"), "--metadata", "gpu=none"]
        assert bench(server, *words, "--save-result", "--request-rate", "900", "--metric-percentiles", "50,99") == 0
        (file,) = (tmp_path / "new").iterdir()
        assert file.name.startswith("openai-900.0qps-fake-")
        saved = json.loads(file.read_text())
        assert (saved["completed"], saved["total_input_tokens"], saved["total_output_tokens"]) == (6, 54, 18)
        assert {"p50_ttft_ms", "p99_itl_ms", "median_tpot_ms", "std_ttft_ms"} <= saved.keys()
        assert (saved["gpu"], saved["request_rate"], saved["model_id"]) == ("none", 900.0, "fake")
        assert "ttfts" not in saved
        words += ["--result-filename", "all.json", "--append-result", "--save-detailed"]
        assert bench(server, *words) == bench(server, *words) == 0
        lines = (tmp_path / "new" / "all.json").read_text().splitlines()
        detailed = json.loads(lines[1])
        assert len(lines) == 2
        assert (detailed["request_rate"], detailed["output_lens"], detailed["input_lens"]) == ("inf", [3] * 6, [9] * 6)
        assert detailed["generated_texts"] == ["aaa"] * 6
        assert [len(gaps) for gaps in detailed["itls"]] == [2] * 6
        pytest.importorskip("matplotlib", reason="the plot needs matplotlib, of the extra 'bench'")
        assert bench(server, "--plot", str(tmp_path / "run.svg")) == 0
        assert "fake: random, 6 requests" in (tmp_path / "run.svg").read_text()
    assert f"Plot written to {tmp_path / 'run.svg'}" in capsys.readouterr().out


def test_some_requests_fail(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail_each_second(request: Request, reply: Reply) -> None:
        is_measured = request.method == "POST" and request.body["max_tokens"] == 3
        if is_measured and int(request.headers["x-request-id"].rpartition("-")[2]) % 2:
            return await reply.json({"error": {"message": "out of luck"}}, 500)
        await answer_well(request, reply)

    with FakeServer(fail_each_second) as server:
        assert bench(server) == 0
    out = capsys.readouterr().out
    assert "\nError of 3 requests: HTTP 500: out of luck\n=====" in out
    assert "Successful requests:                     3         \nFailed requests:                         3" in out


def test_none_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    async def break_off(request: Request, reply: Reply) -> None:
        if request.method == "GET" or request.body["max_tokens"] == 1:
            return await answer_well(request, reply)
        await reply.start()
        await reply.send(completion_events(["a", "b"])[0])
        await reply.cut()

    with FakeServer(break_off) as server:
        assert bench(server) == 1
    assert "Failed requests:                         6" in capsys.readouterr().out


def test_a_server_without_usage(capsys: pytest.CaptureFixture[str]) -> None:
    async def no_usage(request: Request, reply: Reply) -> None:
        if request.method == "GET":
            return await reply.json({}, 404)
        await reply.stream(completion_events(["a"] * request.body["max_tokens"]))

    with FakeServer(no_usage) as server:
        assert bench(server) == 2
        assert "name the model with --model" in capsys.readouterr().err
        assert bench(server, "--model", "any") == 0
    out = capsys.readouterr().out
    assert "Total generated tokens:                  18" in out
    assert "warning: 6 answers had no usage: their output tokens are counted as one per chunk" in out
    assert server.posts()[-1]["model"] == "any"


def test_waiting_for_the_server() -> None:
    """The server answers 503 until it has been asked three times."""

    async def start_slowly(request: Request, reply: Reply) -> None:
        if len(server.requests) <= 3:
            return await reply.json({"error": {"message": "starting"}}, 503)
        await answer_well(request, reply)

    with FakeServer(start_slowly) as server:
        assert bench(server, "--ready-check-timeout-sec", "30") == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--porte", "1"], ["unknown flag --porte", "did you mean --port?"]),
        (["--num-prompts", "none"], ["--num-prompts", "'none'"]),
        (["--num-prompts", "0"], ["--num-prompts", "at least 1"]),
        (["--request-rate", "0"], ["--request-rate", "above 0"]),
        (["--request-rate", "nan"], ["--request-rate"]),
        (["--burstiness", "-1"], ["--burstiness", "above 0"]),
        (["--dataset-name", "poems"], ["--dataset-name", "'poems'", "'sharegpt'"]),
        (["--dataset-name", "trace"], ["--dataset-path FILE"]),
        (["--dataset-name", "trace", "--dataset-path", "/no/such/file"], ["/no/such/file"]),
        (["--dataset-path", "/etc/hosts"], ["random", "takes no --dataset-path"]),
        (["--goodput", "speed:3"], ["--goodput", "ttft, tpot, e2el", "'speed:3'"]),
        (["--goodput", "ttft:soon"], ["as ttft:200", "'ttft:soon'"]),
        (["--percentile-metrics", "ttft,luck"], ["--percentile-metrics", "'luck'"]),
        (["--metric-percentiles", "50,101"], ["--metric-percentiles", "0 to 100"]),
        (["--extra-body", "{"], ["--extra-body", "JSON"]),
        (["--extra-body", "[]"], ["--extra-body", "JSON object"]),
        (["--header", "alone"], ["--header", "KEY=VALUE"]),
        (["--plot", "a.doc"], ["--plot", ".png, .svg"]),
        (["--base-url", "localhost:8000"], ["--base-url", "http://"]),
        (["--tokenizer", "/no/such/folder"], ["/no/such/folder"]),
        (["--random-input-len", "2000", "--random-output-len", "50"], ["2000 input and 50 output", "2048"]),
        (["--endpoint", "/v2"], ["/v2", "HTTP 404"]),
        (["--result-dir", "/proc/no", "--save-result"], ["--result-dir"]),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    async def one_path(request: Request, reply: Reply) -> None:
        if request.path == "/v2":
            return await reply.json({"error": {"message": "nothing here"}}, 404)
        await answer_well(request, reply)

    with FakeServer(one_path) as server:
        assert bench(server, *words) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    for part in parts:
        assert part in err


def test_dead_server(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(answer_well) as server:
        url = server.url
    assert bench(url) == 2
    assert capsys.readouterr().err == f"manta: error: no answer from {url}: no connection: Connection refused\n"


def test_interrupt_prints_what_was_measured() -> None:
    """Five requests hang. The last of them can only be sent, one of five at once, when the other four are answered."""
    hanging = threading.Semaphore(0)

    async def hang(request: Request, reply: Reply) -> None:
        is_measured = request.method == "POST" and request.body["max_tokens"] == 3
        if is_measured and int(request.headers["x-request-id"].rpartition("-")[2]) in (1, 3, 5, 7, 8):
            hanging.release()
            await reply.start()
            return await reply.writer.wait_closed()
        await answer_well(request, reply)

    command = [sys.executable, "-m", "manta.cluster.cli.main", "bench", "serve", *LOAD]
    with FakeServer(hang) as server:
        words = ["--base-url", server.url, "--num-prompts", "9", "--max-concurrency", "5"]
        process = subprocess.Popen(
            [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        try:
            for _ in range(5):
                assert hanging.acquire(timeout=30)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130, err
    assert "Interrupted: 5 requests were not answered" in out
    assert "Successful requests:                     4" in out
    assert "Traceback" not in err
