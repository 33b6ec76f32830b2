"""/v1/batches as the openai package uses it, over a fake engine: every line gets one answer, that of a direct call."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from manta.cluster.batches import keeper, runner
from manta.cluster.engine.client import EngineError, GenerationRequest, QueueFullError, UnavailableError
from manta.cluster.engine.types import BACKGROUND
from tests.support.batch_files import create, jsonl, line, read, wait
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient, hashed_tokens

KEYS = "a:sk-a\nb:sk-b\n"


@contextmanager
def keeping(folder: Path, model_folder: Path, engine: FakeClient | None = None) -> Iterator[DoorThread]:
    (folder / "keys").write_text(KEYS)
    words: dict[str, Any] = {"batch_dir": str(folder / "batches"), "max_num_seqs": 16}
    with DoorThread(engine or FakeClient(), model_folder, api_key_file=str(folder / "keys"), **words) as doors:
        yield doors


def client_of(doors: DoorThread, tenant: str = "a") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{doors.base_url}/v1", api_key=f"sk-{tenant}", max_retries=0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[DoorThread]:
    with keeping(tmp_path_factory.mktemp("batches"), model_folder) as doors:
        yield doors


@pytest.fixture
def client(shared: DoorThread) -> openai.OpenAI:
    shared.client.reset()
    return client_of(shared)


def direct(doors: DoorThread, each: dict[str, Any]) -> tuple[int, Any]:
    """What the server answers to the request of a line itself, but for names and times."""
    with httpx.Client(headers={"authorization": "Bearer sk-a"}, verify=False) as http:
        answer = http.post(f"{doors.base_url}{each['url']}", json=each["body"])
    return answer.status_code, bare(answer.json())


def bare(body: dict[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in body.items() if name not in ("id", "created")}
    if "usage" in found:  # what a cache holds depends on who came before
        found["usage"] = found["usage"] | {"prompt_tokens_details": None}
    return found


def test_every_line_gets_the_answer_of_a_direct_call(shared: DoorThread, client: openai.OpenAI) -> None:
    lines = [line(f"{n}", prompt=f"p{n}", max_tokens=1 + n % 7, temperature=0) for n in range(30)]
    lines += [line("n", prompt=["a", "b"], n=3, seed=5), line("probable", prompt="x", logprobs=2, seed=9)]
    wrong = [line("cold", prompt="x", temperature=-1), line("other", model="gpt", prompt="x"), line("none")]
    batch = create(client, [*lines, *wrong], metadata={"who": "me"})
    assert (batch.status, batch.metadata, batch.request_counts.total) == ("validating", {"who": "me"}, 0)  # type: ignore[union-attr]
    assert batch.expires_at == batch.created_at + 86400
    done = wait(client, batch)
    counts = done.request_counts
    assert counts is not None
    assert (done.status, counts.total, counts.completed, counts.failed) == ("completed", 35, 32, 3)
    times = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert times == sorted(times)  # type: ignore[type-var]
    assert done.failed_at is done.cancelled_at is done.expired_at is done.errors is None
    assert all(request.priority == BACKGROUND for request in shared.client.submitted)
    good, bad = read(client, done.output_file_id), read(client, done.error_file_id)
    for each in lines:
        answer = good.pop(each["custom_id"])
        assert answer["error"] is None
        assert (answer["response"]["status_code"], bare(answer["response"]["body"])) == direct(shared, each)
    for each in wrong:
        answer = bad.pop(each["custom_id"])
        assert answer["error"] is None
        assert (answer["response"]["status_code"], answer["response"]["body"]) == direct(shared, each)
        assert answer["response"]["request_id"]
    assert not good
    assert not bad
    output = client.files.retrieve(done.output_file_id or "")
    assert (output.purpose, output.filename) == ("batch_output", f"{done.id}_output.jsonl")


def test_other_endpoints(shared: DoorThread, client: openai.OpenAI) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": chat,
        "/v1/messages": chat | {"model": "tiny"},
        "/v1/embeddings": {"input": ["Hello world", "a"]},
    }
    for url, asked in bodies.items():
        each = line("a", url, **asked)
        done = wait(client, create(client, [each], endpoint=url))
        (answer,) = read(client, done.output_file_id).values()
        assert (200, bare(answer["response"]["body"])) == direct(shared, each)


def test_responses_are_answered_and_not_kept(shared: DoorThread, client: openai.OpenAI) -> None:
    each = line("a", "/v1/responses", input="hi", max_output_tokens=4, temperature=0)
    done = wait(client, create(client, [each], endpoint="/v1/responses"))
    (answer,) = read(client, done.output_file_id).values()
    body = answer["response"]["body"]
    texts = [[part["text"] for item in each["output"] for part in item["content"]]
             for each in (body, direct(shared, each)[1])]  # fmt: skip
    assert texts[0] == texts[1] != [""]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(body["id"])


BAD_FILES: list[tuple[list[Any], list[tuple[str, int | None, str]]]] = [
    ([b"\n \n"], [("empty_file", None, "no request")]),
    ([b"{\n", line("a"), b"[1]\n", b"\xff\n"],
     [("invalid_json_line", 1, "not valid JSON"), ("invalid_json_line", 3, "object"), ("invalid_json_line", 4, "")]),
    ([line("a"), line("b"), line("a")], [("duplicate_custom_id", 3, "line 1")]),
    ([line("a", "/v1/chat/completions")], [("url_mismatch", 1, "/v1/chat/completions")]),
    ([line("a", "/v1/images")], [("invalid_url", 1, "/v1/images")]),
    ([line("a", "x" * 1000), line("b" * 1000), line("b" * 1000)],
     [("invalid_url", 1, "xxx"), ("duplicate_custom_id", 3, "bbb")]),
    ([{"url": "/v1/completions", "body": {}}, line("b", stream=True), {"custom_id": "c", "url": "/v1/completions"}],
     [("invalid_request", 1, "custom_id"), ("invalid_request", 2, "stream"), ("invalid_request", 3, "body")]),
    ([line("a") | {"method": "GET"}], [("invalid_request", 1, "method")]),
    ([line("a"), line("long", prompt="x" * 33 * 2**20), line("a")],
     [("line_too_long", 2, "32 MiB"), ("duplicate_custom_id", 3, "line 1")]),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "expected"), BAD_FILES, ids=[each[1][0][0] for each in BAD_FILES])
def test_a_malformed_file_fails_with_its_lines(
    shared: DoorThread, client: openai.OpenAI, lines: list[Any], expected: list[tuple[str, int | None, str]]
) -> None:
    done = wait(client, create(client, lines))
    assert (done.status, done.output_file_id, done.error_file_id) == ("failed", None, None)
    assert done.failed_at is not None
    assert done.errors is not None
    assert [(each.code, each.line) for each in done.errors.data or []] == [each[:2] for each in expected]
    assert all(len(each.message or "") < 300 for each in done.errors.data or [])
    for each, (_, _, named) in zip(done.errors.data or [], expected, strict=True):
        assert named in (each.message or "")
    assert shared.client.submitted == []


def test_too_many_requests_and_too_many_errors(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manta.cluster.batches.check.MAX_REQUESTS", 3)
    done = wait(client, create(client, [line(str(n)) for n in range(9)]))
    assert done.errors is not None
    assert [(each.code, each.line) for each in done.errors.data or []] == [("too_many_tasks", 4)]
    monkeypatch.setattr("manta.cluster.batches.check.MAX_ERRORS", 2)
    done = wait(client, create(client, [b"x\n"] * 9))
    assert done.errors is not None
    assert len(done.errors.data or []) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": None}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
        ({"extra_body": {"window": "24h"}}, "window"),
        ({"input_file_id": 7}, "input_file_id"),
    ],
)
def test_wrong_fields_of_a_batch_are_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    file = client.files.create(file=("x", jsonl([line("a")])), purpose="batch")
    given = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"} | fields
    with pytest.raises(openai.BadRequestError) as error:
        client.batches.create(**given)
    assert error.value.param == param


def test_lists_and_files_in_use(shared: DoorThread, client: openai.OpenAI) -> None:
    shared.client.hang_after = 0
    made = [create(client, [line("a", prompt="x")]) for _ in range(3)]
    listed = client.batches.list(limit=2)
    assert ([batch.id for batch in listed.data], listed.has_more) == ([made[2].id, made[1].id], True)
    assert client.batches.list(after=made[1].id).data[0].id == made[0].id
    other = client_of(shared, "b")
    assert other.batches.list().data == []
    for call in (other.batches.retrieve, other.batches.cancel):
        with pytest.raises(openai.NotFoundError, match=made[0].id):
            call(made[0].id)
    with pytest.raises(openai.ConflictError, match=made[0].id):
        client.files.delete(made[0].input_file_id)
    for batch in made:
        client.batches.cancel(batch.id)
        wait(client, batch, "cancelled")
    client.files.delete(made[0].input_file_id)


def test_each_batch_runs_for_its_tenant(shared: DoorThread, client: openai.OpenAI) -> None:
    for tenant in "ab":
        wait(client_of(shared, tenant), create(client_of(shared, tenant), [line(tenant, prompt=tenant)]))
    first, second = shared.client.submitted
    assert (first.tenant, second.tenant) == ("a", "b")
    assert (first.cache_salt[0], second.cache_salt[0]) == ("a", "b")


def test_cancelled_midway_it_keeps_what_is_done(shared: DoorThread, client: openai.OpenAI) -> None:
    shared.client.model = lambda request: _until_asked_to_hang(shared.client, request, 20)
    lines = [line(str(n), prompt=f"p{n}", max_tokens=3, temperature=0) for n in range(100)]
    batch = create(client, lines)
    while len(shared.client.finished) < 20:
        time.sleep(0.005)
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = wait(client, cancelling, "cancelled")
    assert done.cancelled_at is not None
    assert shared.client.aborted, "lines that were running"
    good, bad = read(client, done.output_file_id), read(client, done.error_file_id)
    assert 0 < len(good) <= len(shared.client.finished) < len(lines)
    assert good.keys() | bad.keys() == {each["custom_id"] for each in lines}
    assert not good.keys() & bad.keys()
    assert {each["error"]["code"] for each in bad.values()} == {"batch_cancelled"}
    with pytest.raises(openai.ConflictError, match="completed"):
        client.batches.cancel(wait(client, create(client, [line("a")])).id)


def _until_asked_to_hang(engine: FakeClient, request: GenerationRequest, num: int) -> list[int]:
    if len(engine.finished) >= num:
        engine.hang_after = 0
    return hashed_tokens(request, 512)


def test_what_does_not_run_in_its_window_expires(shared: DoorThread, client: openai.OpenAI) -> None:
    shared.client.hang_after = 1
    done = wait(client, create(client, [line("a", prompt="x"), line("b", prompt="x")], completion_window="1s"))
    assert (done.status, done.output_file_id) == ("expired", None)
    assert done.expired_at is not None
    bad = read(client, done.error_file_id)
    assert {name: each["error"]["code"] for name, each in bad.items()} == {"a": "batch_expired", "b": "batch_expired"}
    assert "window" in bad["a"]["error"]["message"]


@pytest.mark.parametrize("refusal", [QueueFullError("full"), UnavailableError("no replica")])
def test_a_busy_engine_is_asked_again(
    shared: DoorThread, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, refusal: EngineError
) -> None:
    monkeypatch.setattr(runner, "FIRST_PAUSE_S", 0.01)
    shared.client.refusal = refusal
    batch = create(client, [line("a", prompt="x")])
    wait(client, batch, "in_progress")
    threading.Timer(0.1, lambda: setattr(shared.client, "refusal", None)).start()
    done = wait(client, batch)
    assert read(client, done.output_file_id).keys() == {"a"}


def test_a_full_disk_loses_nothing(shared: DoorThread, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manta.cluster.batches.results.RETRY_S", 0.01)
    monkeypatch.setattr(keeper, "RETRY_S", 0.01)
    failures = {"add_results": 2, "forget_lines": 1, "insert_file": 1}

    def failing(module: str, name: str) -> None:
        function = getattr(__import__(module, fromlist=[name]), name)

        def fail_first(*words: Any, **more: Any) -> Any:
            if failures[name]:
                failures[name] -= 1
                raise OSError(28, "No space left on device")
            return function(*words, **more)

        monkeypatch.setattr(f"{module}.{name}", fail_first)

    failing("manta.cluster.batches.results", "add_results")
    failing("manta.cluster.batches.runner", "forget_lines")
    failing("manta.cluster.batches.output", "insert_file")
    lines = [line(str(n), prompt=f"p{n}") for n in range(5)]
    done = wait(client, create(client, lines))
    assert failures == dict.fromkeys(failures, 0)
    assert done.status == "completed"
    assert len(read(client, done.output_file_id)) == 5


def test_another_frontend_goes_on_where_one_has_ended(tmp_path: Path, model_folder: Path) -> None:
    """Both serve the files and batches, one runs the lines. Lines that have a result are not run again."""
    lines = [line(str(n), prompt=f"p{n}", max_tokens=2, temperature=0) for n in range(40)]
    engines = [FakeClient(), FakeClient()]
    engines[0].model = lambda request: _until_asked_to_hang(engines[0], request, 20)
    with keeping(tmp_path, model_folder, engines[0]) as first:
        batch = create(client_of(first), lines)
        wait(client_of(first), batch, "in_progress")
        with keeping(tmp_path, model_folder, engines[1]) as second:
            client = client_of(second)
            while (client.batches.retrieve(batch.id).request_counts or batch).completed < 15:  # type: ignore[union-attr]
                time.sleep(0.01)
            assert engines[1].submitted == []
            first.run(first.stop_batches)
            done = wait(client, batch)
            assert len(engines[0].finished) + len(engines[1].finished) <= 40 + 15  # those under way were run again
            good = read(client, done.output_file_id)
            assert good.keys() == {each["custom_id"] for each in lines}
            for each in lines:
                assert (200, bare(good[each["custom_id"]]["response"]["body"])) == direct(second, each)
