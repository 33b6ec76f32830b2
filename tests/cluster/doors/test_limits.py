"""Thousands of random requests, in and out of range, through both doors of one server, beside a neighbour."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.cluster.doors.test_verdicts import CODES, PROMPT, SAMPLING
from tests.support.door_server import MAX_MODEL_LEN, DoorThread
from tests.support.fake_client import FakeClient

NUM_REQUESTS = 2000
VOCAB_SIZE = 512
# Values that every limit allows; beside SAMPLING, whose values mostly are at limits or beyond them.
ALLOWED: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.0, 0.5, 1.0, 100.0]),
    "top_k": st.sampled_from([-1, 0, 1, 50, 2**31 - 1]),
    "top_p": st.sampled_from([0.5, 1.0]),
    "min_p": st.sampled_from([0.0, 0.5, 1.0]),
    "presence_penalty": st.sampled_from([-2.0, 0.5, 2.0]),
    "frequency_penalty": st.sampled_from([-2.0, 0.5, 2.0]),
    "repetition_penalty": st.sampled_from([0.5, 1.5, 100.0]),
    "max_tokens": st.integers(1, 20),
    "min_tokens": st.sampled_from([0, 1]),
    "stop": st.lists(st.sampled_from(["a", "the", " ", "s" * 1024]), min_size=1, max_size=16),
    "stop_token_ids": st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=128),
    "logprobs": st.integers(0, 20),
    "prompt_logprobs": st.integers(0, 20),
    "logit_bias": st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.sampled_from([-100.0, 0.5, 100.0]), min_size=1),
    "allowed_token_ids": st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=4),
    "bad_words": st.lists(st.sampled_from(["a", " b", "c" * 256]), min_size=1, max_size=128),
    "truncate_prompt_tokens": st.sampled_from([-1, 1, 17, MAX_MODEL_LEN]),
}


def values(names: list[str], allowed: bool) -> st.SearchStrategy[dict[str, Any]]:
    table = SAMPLING | ALLOWED if allowed else SAMPLING
    return st.fixed_dictionaries({name: table[name] for name in names})


NAMES = st.lists(st.sampled_from(sorted(SAMPLING)), max_size=3, unique=True)
REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.just([9, 10]) | st.text(max_size=30) | PROMPT,
        "sampling": st.tuples(NAMES, st.sampled_from([True, True, False])).flatmap(lambda drawn: values(*drawn)),
        "stream": st.booleans(),
        "model": st.sampled_from(["tiny"] * 6 + ["", "other"]),
        "priority": st.sampled_from([0] * 6 + [-(2**31), 2**31 - 1]),
        "cache_salt": st.sampled_from([""] * 6 + ["s" * 1024, "s" * 1025]),
        "request_id": st.sampled_from([""] * 6 + ["r" * 128, "r" * 129, "two words"]),
        "add_special_tokens": st.booleans(),
    }
)
Verdict = tuple[str, str | None, str]  # status, the field at fault, and the message; of an accepted one: its text


@pytest.fixture(scope="module")
def own_doors(model_folder: Path) -> Iterator[DoorThread]:
    with DoorThread(FakeClient(), model_folder) as doors:
        yield doors


def over_http(http: httpx.Client, request: dict[str, Any]) -> Verdict:
    body = {name: value for name, value in request.items() if name not in ("sampling", "stream")}
    body = body | {"seed": 7} | request["sampling"]
    if not body["request_id"]:
        del body["request_id"]
    answer = http.post("/v1/completions", json=body)
    if answer.status_code == 200:
        (choice,) = answer.json()["choices"]
        return "OK", choice["finish_reason"], choice["text"]
    error = answer.json()["error"]
    return CODES[answer.status_code], error["param"], error["message"]


def over_grpc(stub: pb_grpc.InferenceStub, request: dict[str, Any]) -> Verdict:
    message = pb.GenerateRequest(sampling=pb.SamplingParams(**({"seed": 7} | request["sampling"])))
    for name in ("model", "priority", "cache_salt", "stream", "request_id", "add_special_tokens"):
        setattr(message, name, request[name])
    if isinstance(request["prompt"], str):
        message.text = request["prompt"]
    else:
        message.tokens.SetInParent()
        message.tokens.ids.extend(request["prompt"])
    try:
        responses = list(stub.Generate(message, timeout=30))
    except grpc.RpcError as error:
        return error.code().name, dict(error.trailing_metadata()).get("error-param"), error.details()
    return "OK", responses[-1].finish_reason, "".join(response.text for response in responses)


class Neighbour:
    """Somebody else, who asks the same again and again and must always get the same answer."""

    BODY = {"prompt": [9, 10, 11], "temperature": 0, "max_tokens": 40, "logprobs": 2}  # noqa: RUF012

    def __init__(self, base_url: str) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=30)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.alone = self._ask()
        self.answers: list[Any] = []

    def _ask(self) -> Any:
        answer = self._http.post("/v1/completions", json=self.BODY)
        return answer.json()["choices"] if answer.status_code == 200 else answer.text

    def _run(self) -> None:
        while not self._end.wait(0.05):
            self.answers.append(self._ask())

    def __enter__(self) -> "Neighbour":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()
        self._http.close()


def test_both_doors_agree_on_every_request_and_a_neighbour_notices_nothing(own_doors: DoorThread) -> None:
    verdicts: Counter[str] = Counter()
    refused: set[str | None] = set()

    with (
        httpx.Client(base_url=own_doors.base_url, timeout=30) as http,
        grpc.insecure_channel(own_doors.grpc_address) as channel,
        Neighbour(own_doors.base_url) as neighbour,
    ):
        stub = pb_grpc.InferenceStub(channel)

        @settings(
            max_examples=NUM_REQUESTS,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(REQUESTS)
        def agree(request: dict[str, Any]) -> None:
            verdict = over_http(http, request)
            assert over_grpc(stub, request) == verdict
            verdicts[verdict[0]] += 1
            if verdict[0] != "OK":
                refused.add(verdict[1])
                assert verdict[1]

        agree()
        assert http.get("/ready").status_code == 200
        assert stub.GetLoad(pb.GetLoadRequest()).num_blocks
    assert verdicts.total() >= NUM_REQUESTS
    assert min(verdicts["OK"], verdicts["INVALID_ARGUMENT"], 10 * verdicts["NOT_FOUND"]) > NUM_REQUESTS / 5, verdicts
    assert refused >= {"prompt", "model", "cache_salt", "request_id", "max_tokens", "stop", "logprobs", "temperature"}
    assert neighbour.answers
    assert all(answer == neighbour.alone for answer in neighbour.answers)
    assert not len(own_doors.service.running)
