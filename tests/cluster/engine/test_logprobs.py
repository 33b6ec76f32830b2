"""Records of log-probabilities on their way from workers to readers: once each, in order, whatever fails on the way."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from manta.cluster.engine.client import InvalidRequestError
from manta.cluster.engine.codec import encode_sampling
from manta.cluster.engine.frontend import Frontend, SlowFrontendError
from manta.cluster.engine.streams import StreamTable
from manta.cluster.engine.types import TokenChunk
from manta.configs.sampling import SamplingParams
from manta.protos import engine_pb2 as pb
from tests.support.fake_deployment import collect, fake_config, fake_deployment, request, run
from tests.support.fake_worker_server import Transport, fake_record, fake_tokens

ASKED = [(None, None), (0, None), (3, 2), (None, 0), (20, 20)]  # logprobs, prompt_logprobs


async def collect_records(chunks: AsyncIterator[TokenChunk]) -> tuple[list[int], bytes, bytes]:
    """The tokens, their records, the prompt's."""
    tokens: list[int] = []
    records = prompt_records = b""
    async for chunk in chunks:
        assert not chunk.prompt_logprobs or not tokens, "records of the prompt behind tokens"
        tokens += chunk.token_ids
        records += chunk.logprobs
        prompt_records += chunk.prompt_logprobs
    return tokens, records, prompt_records


def expected(tokens: list[int], begin: int, num_best: int | None) -> bytes:
    if num_best is None:
        return b""
    return b"".join(fake_record(token, position, num_best) for position, token in enumerate(tokens, begin))


@pytest.mark.parametrize("transport", ["grpc", "unix"])
@pytest.mark.parametrize(("fail_at_step", "pp"), [(None, 1), (3, 1), (12, 1), (None, 2)])
def test_records_are_told_once(transport: Transport, fail_at_step: int | None, pp: int) -> None:
    async def test() -> None:
        async with fake_deployment(fake_config(pipeline_parallel_size=pp), transport=transport) as deployment:
            deployment.workers[0][-1].fail_at_step = fail_at_step
            shared = [5] * 40
            jobs = []
            for i in range(25):
                asked = ASKED[i % len(ASKED)]
                prompt = shared[: i * 7 % 41] + [(i * 7 + j * 3) % 1000 for j in range(1 + i * 13 % 60)]
                jobs.append((request(prompt, 15, seed=i, logprobs=asked[0], prompt_logprobs=asked[1]), prompt, asked))
            results = await asyncio.gather(*(collect_records(deployment.client.generate(one)) for one, _, _ in jobs))
            for i, ((_, prompt, asked), (tokens, records, prompt_records)) in enumerate(
                zip(jobs, results, strict=True)
            ):
                assert tokens == fake_tokens(prompt, 15, seed=i)
                assert records == expected(tokens, len(prompt), asked[0])
                assert prompt_records == expected(prompt[1:], 1, asked[1])
            await deployment.settled()

    run(test())


def test_what_no_worker_can_do_is_refused() -> None:
    async def test() -> None:
        async with fake_deployment() as deployment:
            for fields, words in (
                ({"logit_bias": {1000: 1.0}}, "logit_bias holds token 1000"),
                ({"allowed_token_ids": [3, 1000]}, "allowed_token_ids holds token 1000"),
                ({"allowed_token_ids": [3, 4], "stop_token_ids": [4, 3], "min_tokens": 1}, "min_tokens forbids"),
            ):
                with pytest.raises(InvalidRequestError, match=words):
                    await collect(deployment.client.generate(request([1], 3, **fields)))
            one = request([1], 3)
            too_many = one.sampling.model_copy(update={"logprobs": 257})
            with pytest.raises(InvalidRequestError, match="logprobs=257 is more than the 256"):
                await collect(deployment.client.generate(type(one)("r", [1], too_many)))
            await deployment.settled()

    run(test())


def test_steps_that_were_not_taken_come_as_one_message() -> None:
    async def test() -> None:
        frontend, table = Frontend(1), StreamTable()
        stream, other = table.open([request([1], 8)] * 2)
        for prompt, sampled in ((b"abcd", b""), (b"efgh", b"1234"), (b"", b"5678")):
            frontend.add_logprobs(pb.Logprobs(handle=stream.handle, prompt=prompt, sampled=sampled))
            if sampled:
                frontend.add_tokens(np.array([stream.handle, other.handle], np.uint64), np.array([7, 8], np.int32))
        message = await frontend.take()
        assert message is not None
        table.feed(message)
        chunk = await stream.next_chunk()
        assert (chunk.token_ids, chunk.logprobs, chunk.prompt_logprobs) == ([7, 7], b"12345678", b"abcdefgh")
        chunk = await other.next_chunk()
        assert (chunk.token_ids, chunk.logprobs, chunk.prompt_logprobs) == ([8, 8], b"", b"")

        small = Frontend(2, max_pending_bytes=100)
        for _ in range(10):
            small.add_logprobs(pb.Logprobs(handle=1, prompt=bytes(30)))
        assert len(small._logprobs) == 3
        with pytest.raises(SlowFrontendError, match="at most 100"):
            await small.take()

    run(test())


def test_constraints_are_columns() -> None:
    fields = {"seed": 0, "logit_bias": {7: -1.5, 300: 2.0}, "allowed_token_ids": [9, 7], "logprobs": 0}
    message = encode_sampling(SamplingParams.model_validate(fields), [[1, 2], [70000]])
    assert np.frombuffer(message.bias_token_ids, "<i4").tolist() == [7, 300]
    assert np.frombuffer(message.biases, "<f4").tolist() == [-1.5, 2.0]
    assert np.frombuffer(message.allowed_token_ids, "<i4").tolist() == [9, 7]
    assert [np.frombuffer(word, "<i4").tolist() for word in message.bad_words] == [[1, 2], [70000]]
    assert message.HasField("num_logprobs")
    assert not message.HasField("num_prompt_logprobs")
    plain = encode_sampling(SamplingParams.model_validate({"seed": 0}))
    assert not any((plain.bias_token_ids, plain.biases, plain.allowed_token_ids, plain.bad_words))
