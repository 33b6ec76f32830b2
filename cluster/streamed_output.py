"""From the deltas of a call to the RequestOutputs that AsyncLLM yields."""

import time
from collections.abc import Callable
from dataclasses import replace

from manta.cluster.doors.output import Delta
from manta.cluster.doors.validate import Resolved
from manta.cluster.engine.logprobs import Logprob
from manta.cluster.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from manta.configs.sampling import RequestOutputKind

Decode = Callable[[int], str] | None


class StreamedOutput:
    """One prompt and its completions so far. What is given out is not changed afterwards."""

    def __init__(
        self, request_id: str, prompt: str | None, resolved: Resolved, kind: RequestOutputKind, decode: Decode
    ) -> None:
        """`decode` gives the text of a token, for log-probabilities; None leaves them without."""
        (self._prompt_token_ids,) = resolved.prompts
        self._request_id, self._prompt, self._kind, self._decode = request_id, prompt, kind, decode
        self._metrics = RequestMetrics(time.time())
        self._outputs = [CompletionOutput(index) for index in range(resolved.n)]
        self._num_cached_tokens = 0
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    def push(self, index: int, delta: Delta) -> RequestOutput | None:
        """What the reader gets of a delta of completion `index`, None where that is nothing."""
        if index == 0:
            self._num_cached_tokens = max(self._num_cached_tokens, delta.num_cached_tokens)
        if delta.prompt_logprobs is not None:
            places = delta.prompt_logprobs.by_token(self._prompt_token_ids[1:], self._decode)
            self._prompt_logprobs = [None, *places]
        if delta.token_ids and self._metrics.first_token_time is None:
            self._metrics.first_token_time = time.time()
        new = self._completion(index, delta)
        self._add(self._outputs[index], new)
        is_finished = all(output.finish_reason is not None for output in self._outputs)
        if is_finished:
            self._metrics.finished_time = time.time()
        if self._kind is RequestOutputKind.DELTA:
            # It tells of its own tokens only, but the log-probability of all of them.
            new.cumulative_logprob = self._outputs[index].cumulative_logprob
            return self._request_output([new], is_finished)
        if self._kind is RequestOutputKind.CUMULATIVE or is_finished:
            return self._request_output([_copy(output) for output in self._outputs], is_finished)
        return None

    def _add(self, output: CompletionOutput, new: CompletionOutput) -> None:
        output.finish_reason, output.stop_reason = new.finish_reason, new.stop_reason
        if new.cumulative_logprob is not None:
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + new.cumulative_logprob
        if self._kind is RequestOutputKind.DELTA:
            return
        output.text += new.text
        output.token_ids += new.token_ids
        if new.logprobs is not None:
            output.logprobs = (output.logprobs or []) + new.logprobs

    def _completion(self, index: int, delta: Delta) -> CompletionOutput:
        new = CompletionOutput(index, delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason)
        if delta.logprobs is not None:
            new.logprobs = delta.logprobs.by_token(delta.token_ids, self._decode)
            new.cumulative_logprob = sum(delta.logprobs.chosen)
        return new

    def _request_output(self, outputs: list[CompletionOutput], is_finished: bool) -> RequestOutput:
        return RequestOutput(
            self._request_id,
            self._prompt,
            self._prompt_token_ids,
            outputs,
            replace(self._metrics),
            self._num_cached_tokens,
            self._prompt_logprobs,
            is_partial=not is_finished,
        )


def _copy(output: CompletionOutput) -> CompletionOutput:
    logprobs = None if output.logprobs is None else list(output.logprobs)
    return replace(output, token_ids=list(output.token_ids), logprobs=logprobs)
