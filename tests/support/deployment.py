"""A scheduler with a FakeWorker per replica: sends plans, delivers answers when told, keeps what clients would see."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np

from manta.scheduler.beam_search import BeamParams, BeamSearch, Hypothesis, Row
from manta.scheduler.move_cost import MoveFigures
from manta.scheduler.scheduler import Scheduler
from manta.scheduler.sequence import Sequence
from manta.scheduler.types import Capacity, Events, Finished, Pooling, Request, Started, StepPlan
from tests.support.fake_worker import (
    Asking,
    FakeWorker,
    generate_alone,
    kv_alone,
    record,
    search_record,
    vector,
)

VOCAB_SIZE = 20
ALWAYS_COPY = MoveFigures(block_bytes=1, copy_bytes_per_s=1e9, copy_overhead_s=0.0, prefill_tokens_per_s=1.0)
NEVER_COPY = MoveFigures(block_bytes=1, copy_bytes_per_s=1.0, copy_overhead_s=9.0, prefill_tokens_per_s=1e9)


@dataclass(slots=True)
class Copying:
    """Blocks on their way from one worker to another. A worker that was replaced meanwhile is nobody's any more."""

    source: FakeWorker
    target: FakeWorker
    epoch: int  # of the target
    left: list[tuple[int, int]]

    def advance(self, num_blocks: int) -> None:
        for source, target in self.left[:num_blocks]:
            self.target.take_block(self.epoch, target, self.source.kv[source])
        del self.left[:num_blocks]


def capacity(**overrides: int) -> Capacity:
    """A small replica; what a test is about is given by keyword."""
    fields = {
        "num_blocks": 32,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "num_lanes": 1,
    }
    return Capacity(**(fields | overrides))


def request(id: int, prompt: int | Many[int], max_tokens: int = 4, **fields: Any) -> Request:
    """`prompt` is the tokens, or how many: then they differ from every other request's."""
    tokens = np.random.default_rng(id).integers(0, VOCAB_SIZE, prompt) if isinstance(prompt, int) else prompt
    return Request(id, np.array(tokens, np.int32), max_tokens, **fields)


def pooled(id: int, prompt: int | Many[int], kind: str = "mean", **fields: Any) -> Request:
    """A prompt to be made into a vector, of "mean" or of "last"."""
    return request(id, prompt, 0, pooling=Pooling(8, kind == "mean", kind), **fields)


class Deployment:
    def __init__(self, *capacities: Capacity, **options: Any) -> None:
        self.capacities = capacities
        self.scheduler = Scheduler(list(capacities), **options)
        chunked = options.get("enable_chunked_prefill", True)
        self.workers = [FakeWorker(each, VOCAB_SIZE, chunked) for each in capacities]
        self.requests: dict[int, Request] = {}
        self.tokens: dict[int, list[int]] = {}
        self.prompt_records: dict[int, bytes] = {}
        self.records: dict[int, bytes] = {}
        self.started: dict[int, Started] = {}
        self.finished: dict[int, Finished] = {}
        self.searches: dict[int, tuple[BeamParams, int]] = {}  # and which of the hypotheses is the request's
        self.copies: dict[int, Copying] = {}  # by move
        self.figures = ALWAYS_COPY
        self.rebalances = False

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self._note([request])

    def add_group(self, requests: list[Request]) -> None:
        self.scheduler.add_group(requests)
        self._note(requests)

    def add_search(self, requests: list[Request], params: BeamParams) -> None:
        self.scheduler.add_search(requests, params)
        self._note(requests)
        self.searches |= {request.id: (params, place) for place, request in enumerate(requests)}

    def _note(self, requests: list[Request]) -> None:
        for request in requests:
            self.requests[request.id] = request
            self.tokens[request.id] = request.output.tolist()
            self.prompt_records[request.id] = self.records[request.id] = b""
        self._hear(self.scheduler.take_events())

    def abort(self, request_id: int) -> None:
        self._hear(self.scheduler.abort(request_id))
        self.scheduler.check()

    def send(self, replica: int = 0) -> StepPlan | None:
        """Plans one step and hands it to the worker."""
        plan = self.scheduler.plan(replica)
        self.scheduler.check()
        if plan is not None:
            self.workers[replica].submit(plan)
        return plan

    def deliver(self, replica: int = 0) -> None:
        """Hands the worker's oldest answer, if there is one, to the scheduler."""
        if self.workers[replica].num_in_flight:
            self._hear(self.scheduler.apply(self.workers[replica].deliver(), replica))
            self.scheduler.check()
            if self.rebalances:
                self.scheduler.moves.look(replica)
                self.begin_moves()

    def resident(self, request_id: int) -> Sequence | None:
        """The request's sequence, if it has a slot."""
        for replica in self.scheduler._replicas:
            for sequence in replica.residents.values():
                if sequence.request.id == request_id:
                    return sequence
        return None

    def move(self, *request_ids: int, target: int | None = None) -> None:
        """Those of them that run in the replica of the first one begin to move."""
        found = [sequence for id in request_ids if (sequence := self.resident(id)) is not None]
        self.scheduler.moves.wish([each for each in found if each.replica == found[0].replica], target)
        self.begin_moves()

    def begin_moves(self) -> None:
        """What can be copied by now begins to be; the first half of the blocks is there at once."""
        for move in self.scheduler.moves.ready(self.figures):
            source, target = self.workers[move.source], self.workers[move.target]
            copying = Copying(source, target, move.target_epoch, list(move.copies.items()))
            copying.advance(len(copying.left) // 2)
            self.copies[move.id] = copying
        self.scheduler.check()

    def end_move(self, id: int, *, is_copied: bool = True) -> None:
        copying = self.copies.pop(id)
        if is_copied:
            copying.advance(len(copying.left))
        self.scheduler.moves.end(id, is_copied=is_copied)
        self.scheduler.check()

    def step(self, replica: int = 0) -> StepPlan | None:
        """One step with nothing else in flight."""
        plan = self.send(replica)
        self.deliver(replica)
        return plan

    def reset(self, replica: int = 0) -> None:
        """The replica's worker is lost, and answers late: nothing of what it says may count."""
        late = self.workers[replica]
        self.workers[replica] = FakeWorker(self.capacities[replica], VOCAB_SIZE, late.enable_chunked_prefill)
        self.scheduler.reset(replica)
        self.scheduler.check()
        while late.num_in_flight:
            self._hear(self.scheduler.apply(late.deliver(), replica))
            self.scheduler.check()

    def close(self, replica: int) -> None:
        """As `reset`, and nobody will plan the replica until it is opened."""
        self.reset(replica)
        self.scheduler.close_replica(replica)
        self.scheduler.check()

    def run(self, replicas: Many[int] | None = None) -> None:
        """Until everything has ended and every answer is in, as many plans in flight as allowed; only those `replicas`
        are planned, if they are given."""
        for _ in range(100_000):
            for replica in range(len(self.workers)) if replicas is None else replicas:
                while self.send(replica) is not None:
                    pass
                self.deliver(replica)
            if self.copies or self.scheduler.moves.is_active:
                self.begin_moves()
                for id in list(self.copies):
                    self.end_move(id)
            if not self.scheduler.num_running and not self.scheduler.num_waiting:
                break
        else:
            raise AssertionError("requests do not end")
        for replica, worker in enumerate(self.workers):
            while worker.num_in_flight:
                self.deliver(replica)

    def expected(self, request_id: int) -> tuple[list[int], str]:
        """Tokens and reason that the request has when it runs alone."""
        request = self.requests[request_id]
        max_model_len = min(each.max_model_len for each in self.capacities)
        max_tokens = min(request.max_tokens, max_model_len - len(request.prompt))
        tokens = generate_alone(request.prompt, max_tokens, request.sampling, VOCAB_SIZE)
        for count, token in enumerate(tokens, start=1):
            if token in request.stop_token_ids and count >= request.min_tokens:
                return tokens[:count], "stop"
        return tokens, "length"

    def assert_all_as_alone(self) -> None:
        """Everyone ended, with the tokens it would have got alone; who was aborted, with the first of them."""
        assert self.finished.keys() == self.requests.keys()
        for request_id, end in self.finished.items():
            if request_id in self.searches:
                self._check_search(end)
                continue
            tokens, reason = self.expected(request_id)
            got = self.tokens[request_id]
            if self.requests[request_id].pooling is not None:
                self._check_vector(end)
                continue
            self._check_records(self.requests[request_id], end.reason == "abort")
            assert end.num_output_tokens == len(got)
            if end.reason == "abort":
                assert got == tokens[: len(got)]
            else:
                assert (got, end.reason) == (tokens, reason)
                assert end.stop_token == (tokens[-1] if reason == "stop" else None)
        for replica, each in enumerate(self.capacities):
            assert self.scheduler.num_free_blocks(replica) == each.num_blocks

    def _check_vector(self, end: Finished) -> None:
        request = end.request
        assert request.pooling is not None
        assert not self.tokens[request.id]
        alone = vector(request.pooling.params, kv_alone(request.prompt, request.sampling))
        assert (end.reason, end.vector) in ((("stop", alone)), ("abort", b""))

    def _check_search(self, end: Finished) -> None:
        request = end.request
        got = self.tokens[request.id]
        if end.reason == "abort":
            assert not got
            return
        params, place = self.searches[request.id]
        max_model_len = min(each.max_model_len for each in self.capacities)
        expected = search_alone(request, params, max_model_len)[place]
        assert got == expected.tokens.tolist()
        assert end.cumulative_logprob == expected.cumulative_logprob
        assert end.stop_token == expected.end_token
        assert end.reason == ("length" if expected.end_token is None else "stop")

    def _check_records(self, request: Request, is_aborted: bool) -> None:
        """Of every token asked about there is one record, in order."""
        asked = request.sampling if isinstance(request.sampling, Asking) else Asking()
        prompt = b"".join(
            record(position, token, asked.num_prompt_logprobs)
            for position, token in enumerate(request.prompt.tolist())
            if position and not len(request.output)
        )
        told = self.prompt_records[request.id]
        assert told == (prompt[: len(told)] if is_aborted and not self.tokens[request.id] else prompt)
        assert self.records[request.id] == b"".join(
            record(position, token, asked.num_logprobs)
            for position, token in enumerate(self.tokens[request.id], len(request.prompt))
            if position >= len(request.prompt) + len(request.output)
        )

    def _hear(self, events: Events) -> None:
        for started in events.started:
            assert started.request.id not in self.started, "started twice"
            self.started[started.request.id] = started
        for request_id, token in zip(events.request_ids.tolist(), events.tokens.tolist(), strict=True):
            assert request_id in self.started, "a token before the start"
            assert request_id not in self.finished, "a token after the end"
            self.tokens[request_id].append(token)
        for told in events.logprobs:
            assert not (told.prompt and self.records[told.request_id]), "records of a prompt behind those of tokens"
            self.prompt_records[told.request_id] += told.prompt
            self.records[told.request_id] += told.sampled
        for finished in events.finished:
            assert finished.request.id not in self.finished, "finished twice"
            self.finished[finished.request.id] = finished


def search_alone(request: Request, params: BeamParams, max_model_len: int) -> list[Hypothesis]:
    """What a search finds without pages, plans or batches, best first."""
    num_prompt = len(request.prompt)
    max_length = min(num_prompt + request.max_tokens, max_model_len)
    search = BeamSearch(params, num_prompt, max_length, request.min_tokens)
    beams = [(request.prompt, 0.0)]
    while not search.is_over:
        rows = []
        for tokens, cumulative_logprob in beams:
            data = search_record(kv_alone(tokens, request.sampling), VOCAB_SIZE, params.num_candidates)
            ids, logprobs = np.frombuffer(data, "<i4")[2:].reshape(2, -1)
            rows.append(Row(tokens, cumulative_logprob, ids, logprobs.view("<f4")))
        chosen = search.advance(rows)
        beams = [
            (np.append(rows[each.parent].tokens, np.int32(each.token)), each.cumulative_logprob) for each in chosen
        ]
    return search.hypotheses
