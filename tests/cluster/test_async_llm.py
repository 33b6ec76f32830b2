"""Streams of AsyncLLM with real workers on a tiny checkpoint, against LLM.generate."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manta import LLM, AsyncLLM, RequestError, RequestOutput, RequestOutputKind, SamplingParams
from tests.cluster.test_llm import FIELDS, params, worker_pids
from tests.support.checkpoints import make_checkpoint
from tests.support.server import wait_until
from tests.support.small_tokenizers import TEXTS, VOCAB_SIZE, write_model_folder

CHAT = [{"role": "user", "content": "Hello"}]
REQUESTS: dict[str, tuple[Any, SamplingParams]] = {
    "greedy": (TEXTS[0], params(max_tokens=24)),
    "token ids": ({"prompt_token_ids": [5, 6, 7]}, params()),
    "samples": (TEXTS[1], params(temperature=1.0, n=3, seed=5)),
    "best of": (TEXTS[1], params(temperature=1.0, n=2, best_of=4, seed=5)),
    "log-probabilities": (TEXTS[2], params(logprobs=2, prompt_logprobs=1, n=2, temperature=1.0, seed=3)),
    "stop string": (TEXTS[0], params(max_tokens=60, temperature=1.0, seed=1, stop=["e", "a"])),
    "stop token": (TEXTS[0], params(max_tokens=60, temperature=1.0, seed=1, stop_token_ids=list(range(100, 140)))),
    "beams": (TEXTS[2], SamplingParams(use_beam_search=True, n=2, best_of=3, max_tokens=8)),
    "bad words": (TEXTS[2], params(bad_words=["e"], truncate_prompt_tokens=4)),
    "beyond the context": ([5] * 500, params(max_tokens=100)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    return make_checkpoint(folder, "llama", vocab_size=VOCAB_SIZE, eos_token_id=1)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, RequestOutput]:
    with LLM(str(folder), **FIELDS) as llm:
        outputs = {name: llm.generate(prompt, sampling)[0] for name, (prompt, sampling) in REQUESTS.items()}
        return outputs | {"chat": llm.chat(CHAT, params())[0]}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(folder: Path, runner: asyncio.Runner) -> Iterator[AsyncLLM]:
    before = worker_pids()
    engine = AsyncLLM(str(folder), **FIELDS)
    yield engine
    runner.run(engine.shutdown())
    assert worker_pids() == before


def num_running(engine: AsyncLLM) -> float:
    gauges = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    lines = engine.metrics_text().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(gauges))


async def read(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


def endless(**fields: Any) -> SamplingParams:
    return params(max_tokens=400, **fields)


def of_kind(name: str, kind: RequestOutputKind) -> tuple[Any, SamplingParams]:
    prompt, sampling = REQUESTS[name]
    return prompt, sampling.model_copy(update={"output_kind": kind})


def comparable(output: RequestOutput) -> RequestOutput:
    """Without what differs between two runs. The cumulative log-probability is the same sum in another order."""
    assert output.metrics.finished_time is not None
    outputs = [
        replace(each, cumulative_logprob=each.logprobs and round(each.cumulative_logprob or 0.0, 4))  # type: ignore[arg-type]
        for each in output.outputs
    ]
    return replace(output, outputs=outputs, request_id="", metrics=None, num_cached_tokens=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", REQUESTS)
def test_streams_add_up_to_what_generate_gives(
    engine: AsyncLLM, runner: asyncio.Runner, expected: dict[str, RequestOutput], name: str
) -> None:
    async def all_kinds() -> list[list[RequestOutput]]:
        streams = [engine.generate(*of_kind(name, kind)) for kind in RequestOutputKind]
        return await asyncio.gather(*map(read, streams))

    cumulative, deltas, final = runner.run(all_kinds())
    whole = comparable(expected[name])
    assert [output.finished for output in cumulative] == [False] * (len(cumulative) - 1) + [True]
    assert comparable(cumulative[-1]) == whole
    for earlier, later in itertools.pairwise(cumulative):
        for first, second in zip(earlier.outputs, later.outputs, strict=True):
            assert second.text.startswith(first.text)
            assert second.token_ids[: len(first.token_ids)] == first.token_ids
    assert [output.finished for output in deltas] == [False] * (len(deltas) - 1) + [True]
    for completion in whole.outputs:
        pieces = [output.outputs[0] for output in deltas if output.outputs[0].index == completion.index]
        assert "".join(piece.text for piece in pieces) == completion.text
        assert [token for piece in pieces for token in piece.token_ids] == completion.token_ids
        assert [place for piece in pieces for place in piece.logprobs or []] == (completion.logprobs or [])
        assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == (completion.finish_reason, completion.stop_reason)
    assert [comparable(output) for output in final] == [whole]


def test_chat(engine: AsyncLLM, runner: asyncio.Runner, expected: dict[str, RequestOutput]) -> None:
    outputs = runner.run(read(engine.chat(CHAT, params())))
    assert comparable(outputs[-1]) == comparable(expected["chat"])
    with pytest.raises(RequestError, match="no tool role"):
        runner.run(read(engine.chat([{"role": "tool", "tool_call_id": "1", "content": "x"}])))


def test_more_streams_than_the_engine_keeps(engine: AsyncLLM, runner: asyncio.Runner) -> None:
    num_streams = 5 * 4 * FIELDS["max_num_seqs"]

    async def together() -> list[list[RequestOutput]]:
        return await asyncio.gather(
            *(read(engine.generate([i % 50 + 2], params(max_tokens=3))) for i in range(num_streams))
        )

    outputs = runner.run(together())
    for i in range(0, num_streams, 50):
        assert len({tuple(outputs[j][-1].outputs[0].token_ids) for j in range(i, num_streams, 50)}) == 1
    assert num_running(engine) == 0


async def started(stream: AsyncGenerator[RequestOutput, None]) -> "asyncio.Task[list[RequestOutput]]":
    """A task that reads the stream, and has its first output."""
    first = asyncio.Event()

    async def consume() -> list[RequestOutput]:
        outputs = []
        async for output in stream:
            outputs.append(output)
            first.set()
        return outputs

    task = asyncio.create_task(consume())
    await first.wait()
    return task


def test_abort_ends_the_stream(engine: AsyncLLM, runner: asyncio.Runner) -> None:
    async def aborted() -> tuple[list[RequestOutput], list[RequestOutput]]:
        task = await started(engine.generate("a", endless(), "mine"))
        other = await started(engine.generate("b", endless(), "other"))
        with pytest.raises(RequestError, match="in use"):
            await read(engine.generate("a", params(), "mine"))
        await engine.abort(["mine", "nobody"])
        return await task, await other

    outputs, others = runner.run(aborted())
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert 0 < len(outputs[-1].outputs[0].token_ids) < 400
    assert len(others[-1].outputs[0].token_ids) == 400


def test_one_that_waits_for_a_place_can_be_aborted(engine: AsyncLLM, runner: asyncio.Runner) -> None:
    async def aborted() -> RequestOutput:
        fill = [asyncio.create_task(read(engine.generate([2], endless(), f"fill-{i}"))) for i in range(40)]
        waiting = asyncio.create_task(read(engine.generate([2], endless(), "waiting")))
        while "waiting" not in engine._running:
            await asyncio.sleep(0)
        await engine.abort("waiting")
        output = (await waiting)[-1]
        assert not any(task.done() for task in fill[8:])
        for task in fill:
            task.cancel()
        await asyncio.gather(*fill, return_exceptions=True)
        return output

    output = runner.run(aborted())
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([], "abort")
    wait_until(lambda: num_running(engine) == 0, 10, "the end of cancelled requests")


@pytest.mark.parametrize("way", ["cancel", "break"])
def test_a_reader_that_leaves_aborts_its_request(engine: AsyncLLM, runner: asyncio.Runner, way: str) -> None:
    async def leave() -> None:
        stream = engine.generate("a", endless(n=2, temperature=1.0))
        if way == "cancel":
            task = await started(stream)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return
        async for _ in stream:
            break
        del stream

    runner.run(leave())
    wait_until(lambda: num_running(engine) == 0, 10, "the end of the abandoned request")


@pytest.mark.parametrize(
    ("prompt", "fields", "param", "message"),
    [
        ([], {}, "prompt", "empty"),
        (["a", "b"], {}, "prompt", "one prompt"),
        ({}, {}, "prompt", "required"),
        ([VOCAB_SIZE], {}, "prompt", "vocabulary"),
        ([1] * 512, {}, "prompt", "512 tokens"),
        ("a" * 10**5, {}, "prompt", "context length"),
        ("a", {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "vocabulary"),
        ("a", {"truncate_prompt_tokens": 513}, "truncate_prompt_tokens", "1 to 512"),
    ],
)
def test_an_error_is_of_one_request(
    engine: AsyncLLM, runner: asyncio.Runner, prompt: Any, fields: dict[str, Any], param: str, message: str
) -> None:
    async def beside_another() -> list[RequestOutput]:
        other = asyncio.create_task(read(engine.generate("a", params())))
        with pytest.raises(RequestError, match=message) as error:
            await read(engine.generate(prompt, params(**fields)))
        assert error.value.param == param
        return await other

    assert len(runner.run(beside_another())[-1].outputs[0].token_ids) == 12


def test_one_event_loop_at_a_time(engine: AsyncLLM, runner: asyncio.Runner) -> None:
    assert len(asyncio.run(read(engine.generate("a", params(output_kind=RequestOutputKind.DELTA))))) > 1

    def elsewhere() -> None:
        asyncio.run(read(engine.generate("a", params())))

    async def both() -> None:
        task = await started(engine.generate("a", endless()))
        with pytest.raises(RuntimeError, match="one loop uses it at a time"):
            await asyncio.to_thread(elsewhere)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    runner.run(both())


def test_shutdown_aborts_what_runs_and_ends_the_workers(folder: Path) -> None:
    before = worker_pids()

    async def leave_early() -> list[list[RequestOutput]]:
        async with AsyncLLM(str(folder), skip_tokenizer_init=True, **FIELDS) as engine:
            assert len(worker_pids() - before) == 1
            with pytest.raises(RequestError, match="skip_tokenizer_init"):
                await read(engine.generate("text"))
            with pytest.raises(RequestError, match="stop strings"):
                await read(engine.generate([1], params(stop="a")))
            (final,) = await read(engine.generate([3], params(output_kind=RequestOutputKind.FINAL_ONLY, logprobs=0)))
            assert (len(final.outputs[0].token_ids), final.outputs[0].text) == (12, "")
            first = await started(engine.generate([4], endless()))
            others = [asyncio.create_task(read(engine.generate([2], endless()))) for _ in range(40)]
            while len(engine._running) < 41:  # most of them wait for a place
                await asyncio.sleep(0)
        with pytest.raises(RequestError, match="closed"):
            await read(engine.generate([1]))
        await engine.shutdown()
        return await asyncio.gather(first, *others)

    for outputs in asyncio.run(leave_early()):
        assert outputs[-1].outputs[0].finish_reason == "abort"
    assert worker_pids() == before
