"""Responses that are kept: in the background, cancelled, followed later, deleted; and whose they are."""

import asyncio
import os
import random
import socket
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from manta.cluster.doors.caller import Caller, set_caller
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.peers import PeerError, Peers
from manta.cluster.doors.responses.store import ResponseStore, Stored, Turn, packed
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient

HELLO = "hello"


@pytest.fixture
def sdk(doors: DoorThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{doors.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def eventually(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_in_the_background(sdk: openai.OpenAI, engine: FakeClient) -> None:
    engine.hang_after = 3
    first = sdk.responses.create(model="tiny", input=HELLO, background=True)
    assert first.background
    assert first.status in ("queued", "in_progress")
    eventually(lambda: bool(sdk.responses.retrieve(first.id).output_text))
    with pytest.raises(openai.BadRequestError, match="has not ended"):
        sdk.responses.create(model="tiny", input=HELLO, previous_response_id=first.id)
    cancelled = sdk.responses.cancel(first.id)
    assert cancelled.status == "cancelled"
    assert cancelled.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert cancelled.usage is not None
    assert cancelled.usage.output_tokens == 3
    assert sdk.responses.cancel(first.id) == cancelled == sdk.responses.retrieve(first.id)
    assert engine.aborted == [first.id]
    engine.hang_after = None
    second = sdk.responses.create(model="tiny", input=HELLO, background=True, max_output_tokens=4)
    eventually(lambda: sdk.responses.retrieve(second.id).status == "incomplete")
    assert sdk.responses.cancel(second.id).status == "incomplete"  # too late


def test_a_stream_in_the_background_is_followed_by_several(sdk: openai.OpenAI, engine: FakeClient) -> None:
    """The first reader leaves, which ends nothing; others read on from where they like."""
    engine.hang_after = 3
    with sdk.responses.create(model="tiny", input=HELLO, background=True, stream=True) as stream:
        kinds, response_id = [], ""
        for event in stream:
            kinds.append(event.type)
            if event.type == "response.created":
                response_id = event.response.id
            if event.type == "response.output_text.delta":
                break
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
    assert engine.aborted == []
    followed: dict[int, list[Any]] = {}

    def follow(after: int) -> None:
        with openai.OpenAI(base_url=sdk.base_url, api_key="none") as own:
            followed[after] = list(own.responses.retrieve(response_id, stream=True, starting_after=after))

    threads = [threading.Thread(target=follow, args=(after,)) for after in (0, 4, 1000)]
    for thread in threads:
        thread.start()
    assert sdk.responses.cancel(response_id).status == "cancelled"
    for thread in threads:
        thread.join(20)
    whole = list(sdk.responses.retrieve(response_id, stream=True))
    assert [event.sequence_number for event in whole] == list(range(len(whole)))
    assert (whole[-1].type, whole[-1].response.status) == ("response.incomplete", "cancelled")  # type: ignore[union-attr]
    assert followed[0] == whole[1:]
    assert followed[4] == whole[5:]
    assert followed[1000] == []


def test_what_cannot_be_followed_or_cancelled(sdk: openai.OpenAI, doors: DoorThread) -> None:
    plain = sdk.responses.create(model="tiny", input=HELLO, max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="background=true and stream=true"):
        sdk.responses.retrieve(plain.id, stream=True)
    with pytest.raises(openai.BadRequestError, match="background=true"):
        sdk.responses.cancel(plain.id)
    one = f"{doors.base_url}/v1/responses/{plain.id}"
    for query in ("stream=2", "starting_after=x", "starting_after=-7", f"starting_after={'0' * 5000}", "strem=true"):
        assert httpx.get(f"{one}?{query}").status_code == 400, query
    for query in ("limit=0", "limit=101", "order=up", "after=x"):
        assert httpx.get(f"{one}/input_items?{query}").status_code == 400, query
    assert httpx.put(one, json={}).status_code == 405


def test_deleted_and_unknown_responses(sdk: openai.OpenAI, engine: FakeClient) -> None:
    kept = sdk.responses.create(model="tiny", input=HELLO, max_output_tokens=2)
    child = sdk.responses.create(model="tiny", input="more", max_output_tokens=2, previous_response_id=kept.id)
    sdk.responses.delete(kept.id)
    unstored = sdk.responses.create(model="tiny", input=HELLO, max_output_tokens=2, store=False)
    engine.hang_after = 2
    running = sdk.responses.create(model="tiny", input=HELLO, background=True)
    sdk.responses.delete(running.id)
    eventually(lambda: engine.aborted == [running.id])
    for gone in (kept.id, unstored.id, running.id, "resp_", "x", "resp_../../etc/passwd", "resp_" + "0" * 400):
        for act in (sdk.responses.retrieve, sdk.responses.delete, sdk.responses.cancel, sdk.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                act(gone)  # type: ignore[operator]
    engine.hang_after = None
    sdk.responses.create(model="tiny", input="on", max_output_tokens=2, previous_response_id=child.id)
    lengths = [len(request.prompt_token_ids) for request in engine.submitted]
    assert lengths[-1] > lengths[1] > lengths[0]  # a conversation keeps what was said in it


@pytest.mark.parametrize("streams", [True, False])
def test_a_disconnect_aborts(sdk: openai.OpenAI, doors: DoorThread, engine: FakeClient, streams: bool) -> None:
    engine.hang_after = 2
    body = orjson.dumps({"input": HELLO, "stream": streams})
    head = f"POST /v1/responses HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", doors.http_port)) as client:
        client.sendall(head.encode() + body)
        if streams:
            received = b""
            while b"output_text.delta" not in received:
                received += client.recv(4096)
        eventually(lambda: len(engine.submitted) == 1)
    eventually(lambda: len(engine.aborted) == 1)
    if streams:  # the client knows its id
        eventually(lambda: sdk.responses.retrieve(engine.aborted[0]).status == "cancelled")


def test_deleting_a_stream_ends_it(sdk: openai.OpenAI, engine: FakeClient) -> None:
    engine.hang_after = 2
    for event in sdk.responses.create(model="tiny", input=HELLO, stream=True):
        if event.type == "response.created":
            created = event.response.id
        if event.type == "response.output_text.delta" and len(engine.submitted) == 1:
            sdk.responses.delete(created)
            engine.submitted.clear()
    assert (event.type, event.response.status) == ("response.incomplete", "cancelled")
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(created)


def test_other_tenants_find_nothing(model_folder: Path) -> None:
    with ExitStack() as stack:
        doors = stack.enter_context(DoorThread(FakeClient(), model_folder, api_key=["sk-a", "sk-b"]))
        alice, bob = (
            stack.enter_context(openai.OpenAI(base_url=f"{doors.base_url}/v1", api_key=key, max_retries=0))
            for key in ("sk-a", "sk-b")
        )
        doors.client.hang_after = 2
        running = alice.responses.create(model="tiny", input=HELLO, background=True, stream=True)
        response_id = next(iter(running)).response.id  # type: ignore[union-attr]
        for act in (bob.responses.retrieve, bob.responses.delete, bob.responses.cancel, bob.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                act(response_id)  # type: ignore[operator]
        with pytest.raises(openai.NotFoundError):
            bob.responses.create(model="tiny", input=HELLO, previous_response_id=response_id)
        assert alice.responses.cancel(response_id).status == "cancelled"
        running.close()


def test_a_server_that_keeps_nothing(model_folder: Path) -> None:
    with (
        DoorThread(FakeClient(), model_folder, max_stored_responses=0) as doors,
        openai.OpenAI(base_url=f"{doors.base_url}/v1", api_key="none", max_retries=0) as sdk,
    ):
        answer = sdk.responses.create(model="tiny", input=HELLO, max_output_tokens=2)
        assert answer.store is False  # type: ignore[attr-defined]
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(answer.id)
        with pytest.raises(openai.BadRequestError, match="max-stored-responses"):
            sdk.responses.create(model="tiny", input=HELLO, background=True)


def test_frontends_pass_on_what_another_one_has(model_folder: Path) -> None:
    with ExitStack() as stack:
        shared = {"api_server_count": 2, "api_key": ["sk-a", "sk-b"]}
        first = stack.enter_context(DoorThread(FakeClient(), model_folder, **shared))
        ports = {"port": first.http_port, "grpc_port": first.grpc_port}
        second = stack.enter_context(DoorThread(FakeClient(), model_folder, **shared, **ports))
        frontends = [first, second]
        sdk = stack.enter_context(openai.OpenAI(base_url=f"{first.base_url}/v1", api_key="sk-a", max_retries=0))

        def from_each(ask: Callable[[Any], Any]) -> None:
            """Asks over new connections, which the kernel spreads, until both frontends have been asked."""
            asked = [0, 0]
            for index, doors in enumerate(frontends):
                count(doors, asked, index)
            for _ in range(200):
                with openai.OpenAI(base_url=sdk.base_url, api_key="sk-a", max_retries=0) as own:
                    ask(own)
                if all(asked):
                    return
            raise AssertionError("the kernel sent everything to one frontend")

        def count(doors: DoorThread, asked: list[int], index: int) -> None:
            caller = type(doors.service.keys).caller

            def counted(authorization: str | None) -> Caller:
                asked[index] += 1
                return caller(doors.service.keys, authorization)

            doors.service.keys.caller = counted  # type: ignore[method-assign]

        begun = sdk.responses.create(model="tiny", input=HELLO, max_output_tokens=3)
        from_each(lambda own: _check(own.responses.retrieve(begun.id) == begun))
        from_each(lambda own: _check(own.responses.input_items.list(begun.id).data[0].content[0].text == HELLO))
        owner = next(doors for doors in frontends if doors.client.submitted)
        other = next(doors for doors in frontends if doors is not owner)
        before = len(owner.client.submitted)
        from_each(
            lambda own: own.responses.create(
                model="tiny", input="more", max_output_tokens=3, previous_response_id=begun.id
            )
        )
        assert len(owner.client.submitted) > before
        assert other.client.submitted == []  # the conversation stays where it was begun
        events = list(sdk.responses.create(model="tiny", input=HELLO, background=True, stream=True))
        created: Any = events[0]
        from_each(lambda own: _check(list(own.responses.retrieve(created.response.id, stream=True)) == events))
        with openai.OpenAI(base_url=sdk.base_url, api_key="sk-b", max_retries=0) as bob:
            for _ in range(20):
                with pytest.raises(openai.NotFoundError):
                    bob.responses.retrieve(begun.id)
        name = begun.id.removeprefix("resp_")[:8]
        assert {name} < {path.name for path in _folder(first).iterdir()}
        from_each(lambda own: _check_unknown(own, begun.id.replace(name, "0" * 8)))
    assert not _folder(first).exists()


def test_sockets_of_processes_that_were_killed_are_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # names of sockets are short
        monkeypatch.setattr(tempfile, "tempdir", folder)
        killed = Peers()
        killed.listen(8000).close()
        path = Path(folder) / f"manta-{os.getuid()}" / "8000" / killed.name
        alive, new = Peers(), Peers()
        with alive.listen(8000), new.listen(8001):
            assert not path.exists()
            assert path.with_name(alive.name).exists()
            assert new.socket_of(alive.name) is None  # of another port
            new.close()
            alive.close()
        assert list((Path(folder) / f"manta-{os.getuid()}").iterdir()) == []
        (Path(folder) / f"manta-{os.getuid()}").chmod(0o755)
        with pytest.raises(PeerError, match="only this user can enter"):
            Peers().listen(8000)


def _folder(doors: DoorThread) -> Path:
    folder = doors.server._peers._folder
    assert folder is not None
    return folder


def _check(is_true: bool) -> None:
    assert is_true


def _check_unknown(sdk: openai.OpenAI, response_id: str) -> None:
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(response_id)


class FakeRun:
    """As much of a run as the store looks at."""

    def __init__(self, number: int, num_bytes: int) -> None:
        self.id = f"resp_{number}"
        self._body = {"id": self.id, "output": [{"text": "x" * num_bytes}]}

    def body(self) -> dict[str, Any]:
        return dict(self._body)


def add(store: ResponseStore, number: int, tenant: str, num_bytes: int = 0, parent: Turn | None = None) -> Stored:
    set_caller(Caller(tenant))
    run: Any = FakeRun(number, num_bytes)
    stored = store.open(run, Turn(packed([{"n": number}]), parent))
    store.close(stored)
    return stored


def ids(store: ResponseStore, tenant: str, numbers: range) -> list[int]:
    """Those of the numbers that a tenant still finds."""
    set_caller(Caller(tenant))
    found = []
    for number in numbers:
        try:
            found.append(int(store.get(f"resp_{number}").id.removeprefix("resp_")))
        except RequestError:
            continue
    return found


def reachable_bytes(store: ResponseStore) -> int:
    """Counted anew: of all responses and of every turn that can be reached from one, once."""
    stored = [one for tenant in store._tenants.values() for one in (*tenant.ended.values(), *tenant.running.values())]
    turns, todo = set(), [one.turn for one in stored]
    while todo:
        turn = todo.pop()
        if turn not in turns:
            turns.add(turn)
            todo += [turn.parent] if turn.parent else []
    return sum(one.num_bytes for one in stored) + sum(turn.num_bytes for turn in turns)


def test_the_oldest_of_the_largest_tenant_go() -> None:
    store = ResponseStore(max_responses=10, max_bytes=10**9)
    add(store, 0, "small")
    for number in range(1, 30):
        add(store, number, "large")
    assert ids(store, "small", range(30)) == [0]
    assert ids(store, "large", range(30)) == list(range(21, 30))
    store = ResponseStore(max_responses=1000, max_bytes=100_000)
    add(store, 0, "small", 1000)
    for number in range(1, 40):
        add(store, number, "large", 10_000)
    assert ids(store, "small", range(40)) == [0]
    kept = ids(store, "large", range(40))
    assert kept == list(range(kept[0], 40))
    assert 7 <= len(kept) <= 9
    add(store, 40, "huge", 200_000)  # goes by itself
    assert ids(store, "huge", range(41)) == []
    assert ids(store, "large", range(40)) == kept


def test_bytes_are_counted_as_long_as_a_conversation_needs_them() -> None:
    draws = random.Random(7)
    store = ResponseStore(max_responses=40, max_bytes=300_000)
    known: list[Stored] = []
    for number in range(1500):
        tenant = draws.choice("abc")
        own = [one for one in known if one.tenant == tenant and one.run is None]
        parent = draws.choice(own).turn if own and draws.random() < 0.6 else None
        known.append(add(store, number, tenant, draws.randrange(8000), parent))
        if draws.random() < 0.2:
            store.remove(draws.choice(known))
        known = [one for one in known if number - int(one.id.removeprefix("resp_")) < 60]
        known = [one for one in known if ids(store, one.tenant, range(int(one.id[5:]), int(one.id[5:]) + 1))]
        assert store.num_bytes == reachable_bytes(store) == sum(one.num_bytes for one in store._tenants.values())
        assert len(store) <= 40
        assert store.num_bytes <= 300_000 or not len(store)
    for one in known:
        store.remove(one)
    assert (store.num_bytes, len(store), store._tenants) == (0, 0, {})


def test_a_turn_that_is_let_go_of_while_it_is_continued_is_counted_again() -> None:
    store = ResponseStore(max_responses=10, max_bytes=10**6)
    first = add(store, 0, "a", 500)
    second = add(store, 1, "a", 500, first.turn)
    store.remove(first)
    store.remove(second)
    assert store.num_bytes == 0
    third = add(store, 2, "a", 500, second.turn)  # a call that was under way meanwhile
    assert store.num_bytes == reachable_bytes(store) > first.turn.num_bytes + second.turn.num_bytes
    store.remove(third)
    assert store.num_bytes == 0


def test_stored_responses_take_the_memory_that_is_counted() -> None:
    store = ResponseStore(max_responses=10**6, max_bytes=10**9)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(300):
            add(store, number, "a", 5000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert store.num_bytes / 2 < after - before < store.num_bytes


def test_cancelling_and_finishing_at_once(doors: DoorThread, engine: FakeClient) -> None:
    """Whoever is first: the response ends once, and everybody is told the same."""

    async def race() -> set[str]:
        url = f"{doors.base_url}/v1/responses"
        async with httpx.AsyncClient(timeout=20) as client:

            async def one(length: int) -> str:
                body = {"input": HELLO, "background": True, "max_output_tokens": length}
                created = (await client.post(url, json=body)).json()
                cancels = [client.post(f"{url}/{created['id']}/cancel") for _ in range(3)]
                told = [answer.json() for answer in await asyncio.gather(*cancels)]
                told.append((await client.get(f"{url}/{created['id']}")).json())
                assert all(each == told[0] for each in told)
                return str(told[0]["status"])

            return set(await asyncio.gather(*(one(length) for length in range(1, 30))))

    assert asyncio.run(race()) <= {"cancelled", "incomplete", "completed"}
    eventually(lambda: len(engine.finished) + len(engine.aborted) == 29)
