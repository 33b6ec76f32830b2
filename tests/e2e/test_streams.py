"""Many streams at once against the real server: all finish, all equal their lone runs, and nothing is left behind."""

import asyncio
import random

import httpx

from tests.support.server import ServerProcess, wait_until

NUM_STREAMS = 64


def _bodies(seed: int) -> list[dict[str, object]]:
    """Mixed prompts and lengths; greedy, seeded and penalised; some share a prefix."""
    draw = random.Random(seed)
    shared = [draw.randrange(4, 500) for _ in range(64)]
    bodies = []
    for index in range(NUM_STREAMS):
        own = [draw.randrange(4, 500) for _ in range(draw.randrange(1, 300))]
        body: dict[str, object] = {
            "model": "text2sql",
            "prompt": (shared if index % 3 == 0 else []) + own,
            "max_tokens": draw.randrange(1, 120),
            "ignore_eos": index % 4 != 0,
            "temperature": 0 if index % 2 else 1.0,
            "seed": index,
            "return_token_ids": True,
        }
        if index % 5 == 0:
            body |= {
                "top_k": 20,
                "top_p": 0.9,
                "repetition_penalty": 1.2,
                "presence_penalty": 0.5,
                "frequency_penalty": 0.1,
            }
        bodies.append(body)
    return bodies


async def _stream(client: httpx.AsyncClient, body: dict[str, object]) -> tuple[str, str]:
    """(text, finish reason) of one streamed completion."""
    text, reason = "", ""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        last = ""
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choice = httpx.Response(200, text=line[6:]).json()["choices"][0]
                text += choice["text"]
                reason = choice["finish_reason"] or reason
            last = line or last
        assert last == "data: [DONE]"
    return text, reason


def _pool(server: ServerProcess) -> dict[str, int]:
    tables: dict[str, int] = httpx.get(f"{server.url}/block_tables").json()
    return tables


def _is_whole(server: ServerProcess) -> bool:
    tables = _pool(server)
    return tables["num_free_blocks"] == tables["num_blocks"] and not tables["sequences"]


def test_streams_equal_their_lone_runs(server: ServerProcess) -> None:
    bodies = _bodies(seed=1)

    async def run() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        limits = httpx.Limits(max_connections=NUM_STREAMS)
        async with httpx.AsyncClient(base_url=server.url, timeout=240, limits=limits) as client:
            together = await asyncio.gather(*(_stream(client, body) for body in bodies))
            alone = [await _stream(client, body) for body in bodies]
        return list(together), alone

    together, alone = asyncio.run(run())
    different = [i for i in range(NUM_STREAMS) if together[i] != alone[i]]
    assert not different
    assert {reason for _, reason in together} <= {"stop", "length"}
    wait_until(lambda: _is_whole(server), 10, "the return of every block")


def test_disconnects_free_their_blocks(server: ServerProcess) -> None:
    body = {"model": "text2sql", "prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    for _ in range(3):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()  # held: an iterator that is dropped closes the connection
            next(lines)
            assert not _is_whole(server)
        wait_until(lambda: _is_whole(server), 10, "the abort of a request whose client has gone")


def test_block_tables_show_who_holds_what(server: ServerProcess) -> None:
    prompt = list(range(4, 70))
    body = {"model": "text2sql", "prompt": prompt, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    headers = ({"X-Request-Id": "first"}, {"X-Request-Id": "second"})
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers[0]) as one:
        lines = one.iter_lines()
        next(lines)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers[1]) as two:
            more_lines = two.iter_lines()
            next(more_lines)
            tables = httpx.get(f"{server.url}/block_tables").json()["sequences"]
            picture = httpx.get(f"{server.url}/block_tables", params={"format": "text"}).text
    held = [set(sequence["blocks"]) for sequence in tables]
    assert len(held) == 2
    assert len(held[0] & held[1]) == 4, "66 shared tokens fill four blocks of 16"
    for sequence in tables:
        shared = held[0] & held[1]
        counts = dict(zip(sequence["blocks"], sequence["ref_counts"], strict=True))
        assert all((counts[block] == 2) == (block in shared) for block in counts)
    assert "first" in picture
    assert "second" in picture
    wait_until(lambda: _is_whole(server), 10, "the return of every block")
