"""Tenants beside each other on two replicas, through the engine's own streams: who waits, by order and not by time."""

import asyncio
from dataclasses import replace

from tests.support.fake_deployment import collect, fake_config, fake_deployment, request, run
from tests.support.fake_worker_server import FakeWorker, fake_tokens


def test_a_light_tenant_overtakes_the_queue_of_a_noisy_one_and_weights_count() -> None:
    async def test() -> None:
        config = fake_config(
            data_parallel_size=2, max_num_seqs=4, scheduling_policy="fair", tenant_weights="gold=2,noisy=1"
        )
        ended: list[str] = []
        async with fake_deployment(config, make_worker=lambda: FakeWorker(step_s=0.001)) as deployment:

            async def ask(tenant: str, number: int) -> None:
                tokens, _ = await collect(
                    deployment.client.generate(replace(request([number] * 20, 12), tenant=tenant))
                )
                assert tokens == fake_tokens([number] * 20, 12, seed=0)
                ended.append(tenant)

            tasks = [asyncio.create_task(ask("noisy", 1)) for _ in range(60)]
            while ended.count("noisy") < 10:
                await asyncio.sleep(0.001)
            await ask("light", 2)
            assert ended.count("noisy") < 40
            tasks += [asyncio.create_task(ask("gold", 3)) for _ in range(60)]
            while "gold" not in ended:
                await asyncio.sleep(0.001)
            begin = len(ended)
            await asyncio.gather(*tasks)
            both = ended[begin : begin + 24]  # while both have a queue
            assert both.count("gold") >= 12
            await deployment.settled()

    run(test())
