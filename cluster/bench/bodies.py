"""JSON bodies of requests, made before the run so that sending costs nothing but a write."""

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from manta.cluster.bench.load import Prepared
from manta.cluster.bench.prompts import Prompts
from manta.cluster.bench.samples import Sample
from manta.cluster.bench.serve_flags import SAMPLING_FLAGS
from manta.cluster.bench.vocabulary import fit_text


@dataclass(frozen=True)
class BodyMaker:
    """Turns samples into requests."""

    settings: dict[str, Any]  # what every body holds
    is_chat: bool
    prompts: Prompts
    request_id_prefix: str
    seed: int = 0

    def prepare(self, samples: list[Sample]) -> list[Prepared]:
        rng = np.random.default_rng(self.seed)
        return [self._prepare(number, sample, rng) for number, sample in enumerate(samples)]

    def _prepare(self, number: int, sample: Sample, rng: np.random.Generator) -> Prepared:
        prompt: str | np.ndarray = sample.token_ids if sample.text is None else sample.text
        num_tokens = len(sample.token_ids)
        if sample.text is None and self.prompts.as_text:
            assert self.prompts.tokenizer is not None
            prompt, num_tokens = fit_text(
                self.prompts.tokenizer, sample.token_ids, self.prompts.ids, not self.is_chat, rng
            )
        if self.is_chat:
            fields = {
                "messages": [{"role": "user", "content": prompt}],
                "max_completion_tokens": sample.output_len,
            }
        else:
            fields = {"prompt": prompt, "max_tokens": sample.output_len}
        # Settings last: --extra-body may replace anything.
        body = orjson.dumps(fields | self.settings, option=orjson.OPT_SERIALIZE_NUMPY)
        return Prepared(body, num_tokens, sample.output_len, f"{self.request_id_prefix}{number}")


def common_settings(args: argparse.Namespace, model: str, ignore_eos: bool) -> dict[str, Any]:
    """The fields of every body that flags decide."""
    settings: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": args.temperature,
    }
    settings |= {name: value for name in SAMPLING_FLAGS if (value := getattr(args, name)) is not None}
    if ignore_eos:
        settings["ignore_eos"] = True
    settings |= args.extra_body
    return settings
