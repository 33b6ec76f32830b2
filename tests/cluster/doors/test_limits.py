"""Thousands of random requests, in and out of range, through both doors of one server, beside a neighbour."""

import threading
from collections import Counter, defaultdict
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
from tests.support.rpc_requests import chat_request, error_of, generate_request

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
    "stop": st.sampled_from([["a"], ["the", " "], ["s" * 1024] * 16]),
    "stop_token_ids": st.sampled_from([[0], [VOCAB_SIZE - 1, 300], [*range(9, 9 + 128)]]),
    "logprobs": st.integers(0, 20),
    "prompt_logprobs": st.integers(0, 20),
    "logit_bias": st.sampled_from([{0: -100.0}, {VOCAB_SIZE - 1: 100.0, 9: 0.5}, dict.fromkeys(range(300), 0.5)]),
    "allowed_token_ids": st.sampled_from([[0], [VOCAB_SIZE - 1, 300], [*range(VOCAB_SIZE)] * 2]),
    "bad_words": st.sampled_from([["a"], [" b", "c" * 256], ["c" * 256] * 128]),
    "truncate_prompt_tokens": st.sampled_from([-1, 1, 17, MAX_MODEL_LEN]),
    "n": st.sampled_from([1, 2, 3]),
    "best_of": st.sampled_from([1, 3, 4]),
    "use_beam_search": st.just(True),
    "length_penalty": st.sampled_from([-1.5, 0.0, 1.0, 2.0]),
}


def values(names: list[str], allowed: bool) -> st.SearchStrategy[dict[str, Any]]:
    table = SAMPLING | ALLOWED if allowed else SAMPLING
    return st.fixed_dictionaries({name: table[name] for name in names})


NAMES = st.lists(st.sampled_from(sorted(SAMPLING)), max_size=3, unique=True)
BEAMS = st.sampled_from(["n", "best_of", "length_penalty", "early_stopping", "max_tokens"])
BEAM_NAMES = st.lists(BEAMS, max_size=4, unique=True).map(lambda names: [*names, "use_beam_search"])
FIELDS = st.sampled_from([NAMES, NAMES, NAMES, BEAM_NAMES]).flatmap(
    lambda names: st.tuples(names, st.sampled_from([True, True, False])).flatmap(lambda drawn: values(*drawn))
)
COMMON = {
    "sampling": FIELDS,
    "stream": st.booleans(),
    "model": st.sampled_from(["tiny"] * 6 + ["", "other"]),
    "priority": st.sampled_from([0] * 6 + [-(2**31), 2**31 - 1]),
    "cache_salt": st.sampled_from([""] * 6 + ["s" * 1024, "s" * 1025]),
    "request_id": st.sampled_from([""] * 6 + ["r" * 128, "r" * 129, "two words"]),
    "add_special_tokens": st.booleans(),
}
COMPLETIONS = st.fixed_dictionaries(
    COMMON
    | {
        "prompt": st.just([9, 10]) | PROMPT,
        "echo": st.sampled_from([False, False, True]),
    }
)
CONTENT = st.text(max_size=30) | st.lists(st.fixed_dictionaries({"text": st.text(max_size=9)}), max_size=2)
FUNCTION = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g", "", "f" * 129])},
    optional={
        "description": st.just("d"),
        "parameters": st.sampled_from([{}, {"type": "object"}, [], {"type": "strange"}, {"properties": {"a": 1}}]),
    },
)
CALL = st.fixed_dictionaries(
    {},
    optional={
        "id": st.just("1"),
        "function": st.fixed_dictionaries(
            {"name": st.just("f"), "arguments": st.sampled_from(["{}", '{"a": 1}', "[]", "{", ""])}
        ),
    },
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "user", "system", "assistant", "tool", ""])},
    optional={
        "content": CONTENT,
        "name": st.just("Eva"),
        "reasoning": st.just("Hm."),
        "tool_call_id": st.just("1"),
        "tool_calls": st.lists(CALL, min_size=1, max_size=2),
    },
)
# The tiny model's template refuses tools and their results, which is a verdict too.
CHATS = st.fixed_dictionaries(
    COMMON
    | {
        "messages": st.lists(st.just({"role": "user", "content": "Hello"}), min_size=1, max_size=1)
        | st.lists(MESSAGE, max_size=3)
    },
    optional={
        "tools": st.lists(
            st.fixed_dictionaries({"type": st.just("function")}, optional={"function": FUNCTION}), max_size=2
        ),
        "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "function", "function": {"name": "f"}}]),
        "parallel_tool_calls": st.booleans(),
        "include_reasoning": st.booleans(),
        "add_generation_prompt": st.booleans(),
        "continue_final_message": st.booleans(),
        "chat_template_kwargs": st.sampled_from([{}, {"mood": "glad"}, {"tokenize": 1}, [1], None, "x"]),
        "response_format": st.sampled_from(
            [
                {"type": "text"},
                {"type": "json_object"},
                {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
                {"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}},
                {"type": "json_schema", "json_schema": {"schema": {}}},
                {"type": "json_schema"},
                {"type": ""},
            ]
        ),
    },
)
Verdict = tuple[str, Any, str]  # status, the field at fault, and the message; of an accepted one: reasons and texts


@pytest.fixture(scope="module")
def own_doors(model_folder: Path) -> Iterator[DoorThread]:
    with DoorThread(FakeClient(), model_folder) as doors:
        yield doors


def body_of(request: dict[str, Any]) -> dict[str, Any]:
    body = {name: value for name, value in request.items() if name not in ("sampling", "stream")}
    sampling = dict(request["sampling"])
    if "messages" in body and "logprobs" in sampling:  # chat has two fields for it
        sampling |= {"logprobs": True, "top_logprobs": sampling["logprobs"] % 21}
    return {name: value for name, value in (body | {"seed": 7} | sampling).items() if name != "request_id" or value}


def over_http(http: httpx.Client, body: dict[str, Any]) -> Verdict:
    answer = http.post("/v1/chat/completions" if "messages" in body else "/v1/completions", json=body)
    if answer.status_code == 200:
        choices = answer.json()["choices"]
        texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]
        return "OK", [choice["finish_reason"] for choice in choices], "|".join(texts)
    error = answer.json()["error"]
    return CODES[answer.status_code], error["param"], error["message"]


def over_grpc(stub: pb_grpc.InferenceStub, body: dict[str, Any], stream: bool) -> Verdict:
    texts: defaultdict[int, str] = defaultdict(str)
    reasons = {}
    try:
        if "messages" in body:
            for piece in stub.Chat(chat_request(body, stream=stream), timeout=30):
                texts[piece.index] += piece.content
                reasons[piece.index] = piece.finish_reason
        else:
            for response in stub.Generate(generate_request(body, stream=stream), timeout=30):
                texts[response.index] += response.text
                reasons[response.index] = response.finish_reason
    except grpc.RpcError as error:
        return error_of(error)
    return "OK", [reasons[index] for index in sorted(reasons)], "|".join(texts[index] for index in sorted(reasons))


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
        @given(st.sampled_from([COMPLETIONS, COMPLETIONS, CHATS]).flatmap(lambda kind: kind))
        def agree(request: dict[str, Any]) -> None:
            body = body_of(request)
            verdict = over_http(http, body)
            assert over_grpc(stub, body, request["stream"]) == verdict
            verdicts[verdict[0]] += 1
            if verdict[0] != "OK":
                refused.add(verdict[1])
                assert verdict[1]

        agree()
        assert http.get("/ready").status_code == 200
        assert stub.GetLoad(pb.GetLoadRequest()).num_blocks
    assert verdicts.total() >= NUM_REQUESTS
    assert min(verdicts["OK"], verdicts["INVALID_ARGUMENT"], 10 * verdicts["NOT_FOUND"]) > NUM_REQUESTS / 5, verdicts
    assert refused >= {"prompt", "messages", "model", "cache_salt", "request_id"}
    assert len(refused & SAMPLING.keys()) > 12
    assert any(str(param).startswith("tools[") for param in refused)
    assert neighbour.answers
    assert all(answer == neighbour.alone for answer in neighbour.answers)
    assert not len(own_doors.service.running)
