"""Metrics: the names dashboards ask for, and numbers that agree with what was served."""

import asyncio
from dataclasses import replace

import numpy as np
import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from manta.cluster.engine.client import EngineClient
from manta.cluster.engine.histogram import Histogram
from tests.support.fake_deployment import collect, fake_config, fake_deployment, request, run, until
from tests.support.fake_worker_server import FakeWorker

NAMES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_sum",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "manta:step_time_seconds_bucket",
    "manta:device_idle_share",
    "manta:dispatch_latency_seconds_bucket",
    "manta:plan_bytes_bucket",
    "manta:scheduler_cpu_seconds_bucket",
    "manta:failovers_total",
    "manta:device_busy_seconds_total",
    "manta:recoveries_total",
    "manta:replica_state",
    "manta:sequence_moves_total",
    "manta:tenant_requests_running",
    "manta:tenant_requests_waiting",
    "manta:tenant_prompt_tokens_total",
    "manta:tenant_generation_tokens_total",
    "manta:tenant_queue_time_seconds_bucket",
]


def samples(text: bytes) -> dict[str, float]:
    """name (with the finish reason, where there is one) -> value, summed over the replicas; buckets left out."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            reason = sample.labels.get("finished_reason")
            key = f"{sample.name}/{reason}" if reason else sample.name
            values[key] = values.get(key, 0.0) + sample.value
    return values


def test_names_and_counts() -> None:
    async def test() -> None:
        config = fake_config(data_parallel_size=2, served_model_name="m")
        async with fake_deployment(config, make_worker=lambda: FakeWorker(step_s=0.002)) as deployment:
            client = deployment.client
            await asyncio.gather(*(collect(client.generate(request([i] * 20, 5))) for i in range(10)))
            abandoned = client.generate(request([1], 400))
            await anext(abandoned)
            await abandoned.aclose()  # type: ignore[attr-defined]
            await deployment.client.drain(10.0)
            await deployment.settled()
            text = await client.metrics()
            values = samples(text)
            assert [name for name in NAMES if name not in values and f"{name}/stop" not in values] == []
            assert values["vllm:request_success_total/length"] == 10
            assert values["vllm:request_success_total/abort"] == 1
            assert values["vllm:prompt_tokens_total"] == 10 * 20 + 1
            assert values["vllm:generation_tokens_total"] >= 10 * 5 + 1
            first = values["vllm:time_to_first_token_seconds_count"]
            between = values["vllm:inter_token_latency_seconds_count"]
            assert first == 11
            assert first + between == values["vllm:generation_tokens_total"]
            assert values["vllm:e2e_request_latency_seconds_count"] == 11
            assert values["vllm:request_queue_time_seconds_count"] == 11
            assert values["vllm:num_requests_running"] == values["vllm:kv_cache_usage_perc"] == 0
            steps = sum(replica[0].num_steps for replica in deployment.workers)
            assert values["manta:step_time_seconds_count"] == values["manta:plan_bytes_count"] == steps
            assert 0.002 * steps <= values["manta:device_busy_seconds_total"]
            assert b'model_name="m"' in text

    run(test())


def labelled(text: bytes, name: str, *labels: str) -> dict[str, float]:
    """By the values of the labels, with a dash between."""
    families = text_string_to_metric_families(text.decode())
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return {"-".join(sample.labels[label] for label in labels): sample.value for sample in found}


def test_each_replica_and_each_tenant_has_its_own() -> None:
    """While they run, and from whichever frontend one asks."""

    async def test() -> None:
        config = fake_config(data_parallel_size=2, max_num_seqs=2, scheduling_policy="fair")
        async with fake_deployment(config, make_worker=lambda: FakeWorker(step_s=0.005)) as deployment:
            other = await EngineClient.connect(deployment.address)
            asks = [replace(request([i] * 9, 40), tenant="ab"[i % 2]) for i in range(7)]
            clients = deployment.client, other
            tasks = [asyncio.create_task(collect(clients[i % 2].generate(one))) for i, one in enumerate(asks)]
            scheduler = deployment.engine.scheduler
            await until(lambda: scheduler.num_running == 4 and scheduler.num_waiting == 3, "four run, three wait")
            text = deployment.engine.metrics_text()
            assert labelled(text, "vllm:num_requests_running", "engine") == {"0": 2, "1": 2}
            assert labelled(text, "vllm:num_requests_waiting", "engine") == {"0": 2, "1": 1}
            usage = labelled(text, "vllm:kv_cache_usage_perc", "engine")
            assert min(usage["0"], usage["1"]) > 0
            running = labelled(text, "manta:tenant_requests_running", "tenant")
            waiting = labelled(text, "manta:tenant_requests_waiting", "tenant")
            assert sum(running.values()) == 4
            assert {tenant: running[tenant] + waiting[tenant] for tenant in "ab"} == {"a": 4, "b": 3}
            assert labelled(text, "manta:replica_state", "engine", "state")["1-serving"] == 1
            await asyncio.gather(*tasks)
            await deployment.settled()
            for text in (await other.metrics(), await deployment.client.metrics()):
                assert labelled(text, "manta:tenant_prompt_tokens_total", "tenant") == {"a": 4 * 9, "b": 3 * 9}
                assert labelled(text, "manta:tenant_generation_tokens_total", "tenant") == {"a": 4 * 40, "b": 3 * 40}
                assert labelled(text, "manta:tenant_queue_time_seconds_count", "tenant") == {"a": 4, "b": 3}
                assert set(labelled(text, "manta:tenant_requests_running", "tenant").values()) == {0}
                assert sum(labelled(text, "vllm:generation_tokens_total", "engine").values()) == 7 * 40
            await other.close()

    run(test())


@pytest.mark.parametrize("num_values", [0, 1, 7, 1000])
def test_histogram_counts_like_prometheus_client(num_values: int) -> None:
    bounds = (0.1, 0.25, 0.5, 1.0)
    values = np.random.default_rng(num_values).choice([0.05, 0.1, 0.2, 0.25, 0.7, 1.0, 3.0], num_values)
    ours = Histogram("ours", "", bounds)
    ours.observe_many(values[1:])
    for value in values[:1]:
        ours.observe(float(value))
    theirs = prometheus_client.Histogram("theirs", "", buckets=bounds, registry=None)
    for value in values:
        theirs.observe(float(value))
    expected = [sample.value for sample in next(iter(theirs.collect())).samples if sample.name.endswith("_bucket")]
    assert [count for _, count in ours.cumulative()] == expected
    assert ours.sum == pytest.approx(float(values.sum()))
