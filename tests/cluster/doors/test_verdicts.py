"""HTTP and gRPC give the same verdict on the same request, and no input is an internal error."""

import json
import string
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manta.cluster.doors import fields
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.door_server import DoorThread
from tests.support.rpc_requests import error_of, generate_request

INT32 = st.sampled_from([-(2**31), -2, -1, 0, 1, 2, 17, 250, 254, 255, 256, 257, 512, 2**31 - 1]) | st.integers(0, 40)
# As a person writes them: the shortest number for what 32 bits can tell apart.
FLOAT = st.sampled_from([-3.0, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 100.0, 101.0]) | st.floats(
    width=32, allow_nan=False, allow_infinity=False
).map(lambda value: float(str(np.float32(value))))
SAMPLING = {
    "temperature": FLOAT,
    "top_k": INT32,
    "top_p": FLOAT,
    "min_p": FLOAT,
    "presence_penalty": FLOAT,
    "frequency_penalty": FLOAT,
    "repetition_penalty": FLOAT,
    "seed": st.integers(-(2**63), 2**63 - 1),
    "max_tokens": INT32,
    "min_tokens": INT32,
    "stop": st.lists(st.text(max_size=4) | st.just("s" * 1025), min_size=1, max_size=3)
    | st.sampled_from([["a"] * 16, ["a"] * 17]),
    "stop_token_ids": st.lists(st.integers(-1, 512), min_size=1, max_size=3)
    | st.sampled_from([[*range(9, 9 + 128)], [*range(9, 9 + 129)]]),
    "ignore_eos": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "logprobs": INT32,
    "prompt_logprobs": INT32,
    "logit_bias": st.dictionaries(st.integers(-1, 512), FLOAT, min_size=1, max_size=3),
    "allowed_token_ids": st.lists(st.integers(-1, 512), min_size=1, max_size=4),
    "bad_words": st.lists(st.sampled_from(["a", " b", "", " ", "c" * 257]), min_size=1, max_size=3),
    "truncate_prompt_tokens": INT32,
    "n": st.sampled_from([-1, 0, 1, 2, 3, 129, 2**31 - 1]),
    "best_of": st.sampled_from([-1, 0, 1, 2, 3, 4, 129]),
    "use_beam_search": st.booleans(),
    "length_penalty": FLOAT,
    "early_stopping": st.sampled_from([False, True, "never"]),
}
PROMPT = (
    st.text(max_size=30)
    | st.sampled_from(["x" * 300, "größer 🙂 " * 30, "a\0b " * 60])
    | st.lists(st.integers(-1, 513), max_size=4)
    | st.just([9] * 255)
    | st.just([9] * 256)
)
REQUEST = st.fixed_dictionaries(
    {"prompt": PROMPT},
    optional={
        "model": st.sampled_from(["tiny", "other"]),
        "priority": INT32,
        "cache_salt": st.sampled_from(["s", "s" * 1025]),
        "sampling": st.dictionaries(st.sampled_from(sorted(SAMPLING)), st.none(), max_size=3).flatmap(
            lambda names: st.fixed_dictionaries({name: SAMPLING[name] for name in names})
        ),
    },
)
CODES = {200: "OK", 400: "INVALID_ARGUMENT", 404: "NOT_FOUND"}


@pytest.fixture(scope="module")
def http(shared_doors: DoorThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_doors.base_url, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def stub(shared_doors: DoorThread) -> Iterator[pb_grpc.InferenceStub]:
    with grpc.insecure_channel(shared_doors.grpc_address) as channel:
        yield pb_grpc.InferenceStub(channel)


def over_http(http: httpx.Client, request: dict[str, Any]) -> tuple[str, str | None, str]:
    body = {name: value for name, value in request.items() if name != "sampling"} | request.get("sampling", {})
    response = http.post("/v1/completions", json=body)
    if response.status_code == 200:
        return "OK", None, ""
    error = response.json()["error"]
    return CODES[response.status_code], error["param"], error["message"]


def over_grpc(stub: pb_grpc.InferenceStub, request: dict[str, Any]) -> tuple[str, str | None, str]:
    body = {name: value for name, value in request.items() if name != "sampling"} | request.get("sampling", {})
    try:
        list(stub.Generate(generate_request(body)))
    except grpc.RpcError as error:
        return error_of(error)
    return "OK", None, ""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(REQUEST)
def test_both_doors_give_the_same_verdict(
    http: httpx.Client, stub: pb_grpc.InferenceStub, sent: dict[str, Any]
) -> None:
    assert over_http(http, sent) == over_grpc(stub, sent)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
NAMES = st.sampled_from(sorted(fields.COMPLETION | fields.CHAT | fields.IGNORED | fields.NOT_SUPPORTED.keys()))
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [9]},
}


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(ENDPOINTS)), st.dictionaries(NAMES, JSON, max_size=3))
def test_no_json_is_an_internal_error(http: httpx.Client, path: str, extra: dict[str, Any]) -> None:
    response = http.post(path, content=json.dumps(ENDPOINTS[path] | extra))
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"]
        assert error["code"]
