"""/v1/files as the openai package uses it, and what clients send that is wrong."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from manta.cluster.batches import database
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient

LIMIT = 3 * 2**20
QUOTA = 4 * LIMIT
KEYS = "a:sk-a\nb:sk-b\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batches")


@pytest.fixture(scope="module")
def keeping(model_folder: Path, folder: Path) -> Iterator[DoorThread]:
    (folder / "keys").write_text(KEYS)
    words: dict[str, Any] = {
        "batch_dir": str(folder / "deep" / "er"),
        "max_batch_file_bytes": LIMIT,
        "max_batch_bytes": QUOTA,
    }
    with DoorThread(FakeClient(), model_folder, api_key_file=str(folder / "keys"), **words) as doors:
        yield doors


@pytest.fixture(scope="module")
def plain(keeping: DoorThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=keeping.base_url, headers={"authorization": "Bearer sk-a"}) as client:
        yield client


@pytest.fixture
def clients(keeping: DoorThread) -> dict[str, openai.OpenAI]:
    return {
        tenant: openai.OpenAI(base_url=f"{keeping.base_url}/v1", api_key=f"sk-{tenant}", max_retries=0)
        for tenant in "ab"
    }


def test_a_file_is_what_was_sent(clients: dict[str, openai.OpenAI], folder: Path) -> None:
    client = clients["a"]
    data = bytes(range(256)) * 9000 + b"\r\n--\r\n"
    file = client.files.create(
        file=("naïve.jsonl", data), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    assert (file.bytes, file.filename, file.purpose, file.status) == (len(data), "naïve.jsonl", "batch", "processed")
    assert file.expires_at == file.created_at + 7200
    assert client.files.retrieve(file.id) == file
    answer = client.files.with_raw_response.content(file.id)
    assert answer.content == data
    assert client.files.delete(file.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=file.id):
            call(file.id)
    assert list((folder / "deep" / "er" / "files").iterdir()) == []


def test_pages(clients: dict[str, openai.OpenAI]) -> None:
    client = clients["a"]
    ids = [client.files.create(file=(f"{n}", b"x"), purpose="batch").id for n in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]  # the client asks for page after page
    first = client.files.list(limit=2, order="asc")
    assert ([file.id for file in first.data], first.has_more) == (ids[:2], True)
    last = client.files.list(after=ids[3], order="asc", purpose="batch")
    assert ([file.id for file in last.data], last.has_more) == (ids[4:], False)
    assert client.files.list(purpose="fine-tune").data == []
    for words in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError, match=next(iter(words))):
            client.files.list(**words)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.files.list(extra_query={"limit": "x"})
    with pytest.raises(openai.NotFoundError, match="file-none"):
        client.files.list(after="file-none")
    for each in ids:
        client.files.delete(each)


def test_a_tenant_fills_its_own_part_of_the_disk_only(clients: dict[str, openai.OpenAI], folder: Path) -> None:
    client, data = clients["a"], b"x" * LIMIT
    ids = [client.files.create(file=("x", data), purpose="batch").id for _ in range(4)]
    for rest in (data, b"x"):  # refused by its announced length, or when the room is full
        with pytest.raises(openai.APIStatusError, match="--max-batch-bytes") as caught:
            client.files.create(file=("x", rest), purpose="batch")
        assert (caught.value.status_code, caught.value.code) == (413, "quota_exceeded")
    other = clients["b"].files.create(file=("x", data), purpose="batch")
    assert clients["b"].files.delete(other.id).deleted
    assert client.files.delete(ids.pop()).deleted
    ids.append(client.files.create(file=("x", data), purpose="batch").id)
    for each in ids:
        client.files.delete(each)
    assert list((folder / "deep" / "er" / "files").iterdir()) == []


def test_tenants_do_not_see_each_other(clients: dict[str, openai.OpenAI]) -> None:
    file = clients["a"].files.create(file=("x", b"secret"), purpose="batch")
    other = clients["b"]
    for call in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    assert other.files.list().data == []
    with pytest.raises(openai.NotFoundError):
        other.files.list(after=file.id)
    with pytest.raises(openai.NotFoundError, match="file"):
        other.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    assert clients["a"].files.content(file.id).content == b"secret"
    clients["a"].files.delete(file.id)
    with httpx.Client(base_url=str(clients["a"].base_url)) as nobody:
        assert nobody.get("files").status_code == nobody.post("batches", json={}).status_code == 401


def form(*parts: tuple[str, str], end: str = "--") -> bytes:
    body = "".join(f'--edge\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in parts)
    return f"{body}--edge{end}".encode()


EDGE = "multipart/form-data; boundary=edge"
WRONG = [
    (b"{}", "application/json", 400, "multipart/form-data"),
    (b"", "multipart/form-data", 400, "boundary"),
    (b"", EDGE, 400, "last boundary"),
    (b"no form" * 2000, EDGE, 400, "boundary"),
    (form(("file", "x")), EDGE, 400, "purpose is required"),
    (form(("purpose", "batch")), EDGE, 400, "file is required"),
    (form(("purpose", "batch"), ("file", "")), EDGE, 400, "empty"),
    (form(("purpose", "fine-tune"), ("file", "x")), EDGE, 400, "fine-tune"),
    (form(("purpose", "batch"), ("file", "x"), ("file", "y")), EDGE, 400, "twice"),
    (form(("purpose", "batch"), ("files", "x")), EDGE, 400, "did you mean 'file'"),
    (form(("purpose", "b" * 2000), ("file", "x")), EDGE, 400, "purpose"),
    (form(("purpose", "batch"), ("file", "x"), end=""), EDGE, 400, "last boundary"),
    (form(("purpose", "batch"), ("file", "x"), ("expires_after[seconds]", "9000")), EDGE, 400, "anchor"),
    (form(("purpose", "batch"), ("file", "x"), ("expires_after[anchor]", "created_at")), EDGE, 400, "seconds"),
    (form(("purpose", "batch"), ("file", "x" * (LIMIT + 1))), EDGE, 413, "larger"),
    (form(("purpose", "batch"), ("file", "x" * 2 * LIMIT)), EDGE, 413, "larger"),
]


@pytest.mark.parametrize(("body", "kind", "status", "named"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_named_and_leaves_nothing(
    plain: httpx.Client, folder: Path, body: bytes, kind: str, status: int, named: str
) -> None:
    for content in (body, iter([body[:9], body[9:]])):  # of a known length, and in chunks
        answer = plain.post("/v1/files", content=content, headers={"content-type": kind})
        assert (answer.status_code, named in answer.json()["error"]["message"]) == (status, True), answer.text
    assert list((folder / "deep" / "er" / "files").iterdir()) == []
    assert plain.get("/v1/files").json()["data"] == []


def test_a_client_that_leaves_leaves_nothing(keeping: DoorThread, folder: Path) -> None:
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-a\r\nContent-Type: {EDGE}\r\n"
    files = folder / "deep" / "er" / "files"
    with socket.create_connection(("127.0.0.1", keeping.http_port)) as connection:
        connection.sendall(f"{head}Content-Length: 10000\r\n\r\n".encode() + form(("file", "x"))[:60])
        while not list(files.iterdir()):
            pass
    while list(files.iterdir()):
        pass


def test_a_full_disk_is_told(clients: dict[str, openai.OpenAI], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("manta.cluster.batches.files.NewFile.write", full)
    with pytest.raises(openai.APIStatusError, match=r"batch-dir.*No space left on device") as error:
        clients["a"].files.create(file=("x", b"x"), purpose="batch")
    assert error.value.status_code == 507
    monkeypatch.undo()
    monkeypatch.setattr("manta.cluster.doors.uploads.insert_upload", lambda *_: full())
    with pytest.raises(openai.APIStatusError, match="No space left"):
        clients["a"].files.create(file=("x", b"x"), purpose="batch")
    assert list((folder / "deep" / "er" / "files").iterdir()) == []


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(database.StorageError, match=r"--batch-dir, .*file/below, cannot be used: Not a directory"):
        database.open_folder(tmp_path / "file" / "below")


def test_without_a_folder_the_flag_is_named(http: httpx.Client) -> None:
    calls = [("GET", "/v1/files"), ("POST", "/v1/files"), ("GET", "/v1/files/x"), ("DELETE", "/v1/files/x"),
             ("GET", "/v1/files/x/content"), ("GET", "/v1/batches"), ("POST", "/v1/batches"),
             ("GET", "/v1/batches/x"), ("POST", "/v1/batches/x/cancel")]  # fmt: skip
    for method, path in calls:
        answer = http.request(method, path)
        assert (answer.status_code, "--batch-dir" in json.dumps(answer.json())) == (404, True), path
    assert http.put("/v1/files").status_code == 405
