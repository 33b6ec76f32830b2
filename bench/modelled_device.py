"""The worker of `fake_device` with a clock that knows what is in a step: `--device-us STEP ROW TOKEN` are the
microseconds of a step, and those of each row that decodes and each token of a prompt in it."""

import sys

import fake_device
import numpy as np

from manta.protos import worker_pb2 as pb


class ModelledRunner(fake_device.FakeRunner):
    def _apply(self, plan: pb.StepPlan) -> int:
        num_sampled = super()._apply(plan)
        num_prompt_tokens = int(np.frombuffer(plan.prefill_lengths, "<u4").sum())
        step_us, row_us, token_us = _costs_us
        self._step_us[:] = step_us + row_us * num_sampled + token_us * num_prompt_tokens
        return num_sampled


place = sys.argv.index("--device-us")
_costs_us = [int(word) for word in sys.argv[place + 1 : place + 4]]
del sys.argv[place : place + 4]
fake_device.FakeRunner = ModelledRunner  # type: ignore[misc]
fake_device.main()
