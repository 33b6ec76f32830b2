"""Whole stages: against a float64 decoder, and equal to the bit whatever shares the step and however many threads."""

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from manta.kernels.cpu_decoder import program
from manta.kernels.cpu_decoder.shape import LayerWeights, Linear
from manta.kernels.cpu_decoder.stage import CpuStage
from manta.kernels.cpu_decoder.team import Team, team_of
from tests.support.decoder_kernels import NAN, VARIANTS, Variant
from tests.support.paging import PagedSequences
from tests.support.plain_decoder import PlainDecoder, Sizes
from tests.support.stage_runs import MAX_POSITION, Run, inputs, make_cache, make_stage, same_bits
from tests.support.tolerances import KERNEL, relative_error

DEADLINE_S = 60.0
SIZES = {
    "llama": Sizes(),
    "biases": Sizes(has_biases=True, num_heads=4, num_kv_heads=4, head_dim=20, hidden=64),
    "qk-norm": Sizes(has_qk_norm=True, head_dim=64, num_heads=3, num_kv_heads=1, windows=(None, 20, 5)),
    "odd": Sizes(hidden=45, intermediate=67, vocab=131, num_heads=8, num_kv_heads=1, windows=(33,), has_biases=True),
}
# Steps of (sequence, new tokens): whole prompts, chunks across blocks, decodes, and all of them mixed
STEPS = [
    [(0, 37)],
    [(0, 1), (1, 19)],
    [(0, 1), (1, 18), (2, 5)],
    [(0, 1), (1, 1), (2, 30), (3, 1)],
    [(0, 1), (1, 1), (2, 1), (3, 70)],
    [(3, 1), (1, 1), (0, 1)],
]
LONG_STEPS = [[(0, 700), (1, 530), (2, 3)], [(0, 1), (1, 1), (2, 1)]]


def plain(decoder: PlainDecoder, sequences: dict[int, Tensor]) -> dict[int, Tensor]:
    return {sequence: decoder.hidden(x).to(decoder.dtype) for sequence, x in sequences.items()}


def close(run: Run, expected: dict[int, Tensor], variant: Variant) -> bool:
    return all(relative_error(run.hidden[s], hidden) < tolerance(variant) for s, hidden in expected.items())


def tolerance(variant: Variant) -> float:
    """One rounding of what leaves the stage; with dot products also one of what enters each product."""
    return KERNEL[variant.dtype] * (2 if variant.uses_dot else 1)


@pytest.mark.parametrize("block_size", [8, 16, 64])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_stage_against_a_plain_decoder(variant: Variant, name: str, block_size: int) -> None:
    decoder = PlainDecoder(SIZES[name], variant.dtype)
    sequences = inputs(decoder, STEPS)
    run = Run(make_stage(decoder, variant), decoder, sequences, block_size).all(STEPS)
    assert close(run, plain(decoder, sequences), variant)
    for sequence, logits in run.logits.items():
        expected = run.hidden[sequence].double() @ decoder.head.double().T
        assert relative_error(logits, expected.float()) < KERNEL[torch.float32]


@pytest.mark.parametrize("num_threads", [2, 3, 4, 7])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_threads_change_no_bit(variant: Variant, num_threads: int) -> None:
    """Sums are taken in the same order by any number of threads."""
    for sizes in SIZES.values():
        decoder = PlainDecoder(sizes, variant.dtype)
        sequences = inputs(decoder, STEPS)
        expected = Run(make_stage(decoder, variant), decoder, sequences).all(STEPS)
        assert same_bits(Run(make_stage(decoder, variant, num_threads), decoder, sequences).all(STEPS), expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_long_sequences(variant: Variant) -> None:
    """Threads that share a long sequence join their parts: equal but for rounding."""
    decoder = PlainDecoder(replace(SIZES["qk-norm"], windows=(None, 400)), variant.dtype)
    sequences = inputs(decoder, LONG_STEPS)
    expected = plain(decoder, sequences)
    for num_threads in (1, 2, 4):
        run = Run(make_stage(decoder, variant, num_threads), decoder, sequences, 16).all(LONG_STEPS)
        assert close(run, expected, variant), num_threads


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_sequence_does_not_depend_on_the_others(variant: Variant) -> None:
    decoder = PlainDecoder(SIZES["qk-norm"], variant.dtype)
    sequences = inputs(decoder, STEPS)
    stage = make_stage(decoder, variant, 2)
    together = Run(stage, decoder, sequences).all(STEPS)
    for sequence in sequences:
        mine = [[row for row in rows if row[0] == sequence] for rows in STEPS]
        alone = Run(stage, decoder, sequences).all([rows for rows in mine if rows])
        assert same_bits(together, alone), sequence


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_kept_tokens_are_those_of_the_whole_step(variant: Variant, num_threads: int) -> None:
    """To the bit, without windows (a tile of queries begins its chunks where its first query does); also in steps
    after, which read what was written for tokens that nobody kept."""
    for sizes in SIZES.values():
        decoder = PlainDecoder(replace(sizes, windows=(None, None)), variant.dtype)
        sequences = inputs(decoder, STEPS)
        stage = make_stage(decoder, variant, num_threads)
        whole = Run(stage, decoder, sequences).all(STEPS)
        kept = Run(stage, decoder, sequences, keeps_last=True).all(STEPS)
        assert {s: len(hidden) for s, hidden in kept.hidden.items()} == {0: 1, 1: 5, 2: 3, 3: 2}
        for sequence, positions in kept.kept.items():
            assert torch.equal(kept.hidden[sequence], whole.hidden[sequence][positions])
            assert torch.equal(kept.logits[sequence], whole.logits[sequence][positions])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_kept_tokens_of_windowed_layers(variant: Variant) -> None:
    decoder = PlainDecoder(SIZES["qk-norm"], variant.dtype)
    sequences = inputs(decoder, STEPS)
    kept = Run(make_stage(decoder, variant, 2), decoder, sequences, keeps_last=True).all(STEPS)
    expected = plain(decoder, sequences)
    assert close(kept, {s: expected[s][positions] for s, positions in kept.kept.items()}, variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_bad_sequence_harms_no_other(variant: Variant) -> None:
    decoder = PlainDecoder(SIZES["llama"], variant.dtype)
    sequences = inputs(decoder, STEPS)
    stage = make_stage(decoder, variant, 2)
    expected = Run(stage, decoder, sequences).all(STEPS)
    bad = dict(sequences)
    bad[1] = torch.full_like(bad[1], NAN)
    run = Run(stage, decoder, bad).all(STEPS)
    for sequence in (0, 2, 3):
        assert torch.equal(run.logits[sequence], expected.logits[sequence])
    assert not run.logits[1].isfinite().any()


def test_models_of_different_threads_side_by_side() -> None:
    """Models keep the threads they were made with, also more than there are cores; all of a kind share a team."""
    variant = VARIANTS[1]
    decoder = PlainDecoder(SIZES["biases"], variant.dtype)
    sequences = inputs(decoder, STEPS)
    runs = [Run(make_stage(decoder, variant, n), decoder, sequences) for n in (1, 5, 2, 5)]
    for number, rows in enumerate(STEPS):
        torch.set_num_threads(1 + number % 3)
        for run in runs:
            run.step(rows)
    assert all(same_bits(runs[0], run) for run in runs)
    assert team_of(5, variant.dtype, uses_dot=False) is team_of(5, variant.dtype, uses_dot=False)
    assert team_of(5, variant.dtype, uses_dot=False) is not team_of(2, variant.dtype, uses_dot=False)


def test_stages_called_at_the_same_time() -> None:
    """One team, two callers: their steps follow each other."""
    variant = VARIANTS[0]
    decoders = [PlainDecoder(sizes, variant.dtype) for sizes in (SIZES["llama"], SIZES["odd"])]
    cases = [(make_stage(decoder, variant, 3), decoder, inputs(decoder, STEPS)) for decoder in decoders]
    expected = [Run(*case).all(STEPS) for case in cases]
    runs = [Run(*case) for case in cases for _ in range(4)]
    with ThreadPoolExecutor(2) as pool:
        # a stage has one caller at a time
        list(pool.map(lambda some: [run.all(STEPS) for run in some], (runs[:4], runs[4:])))
    assert all(same_bits(expected[0], run) for run in runs[:4])
    assert all(same_bits(expected[1], run) for run in runs[4:])


def wait_until_all_sleep(team: Team) -> None:
    sleepers = ctypes.c_int64.from_address(team._address + 8 * program.TEAM_SLEEPERS)
    deadline = time.monotonic() + DEADLINE_S
    while sleepers.value != team.num_threads - 1:
        assert time.monotonic() < deadline, f"{sleepers.value} sleep"
        time.sleep(0.0005)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_steps_after_idle_times(num_threads: int) -> None:
    variant = VARIANTS[0]
    decoder = PlainDecoder(SIZES["llama"], variant.dtype)
    sequences = inputs(decoder, STEPS)
    stage = make_stage(decoder, variant, num_threads)
    expected = Run(stage, decoder, sequences).all(STEPS)
    run = Run(stage, decoder, sequences)
    for rows in STEPS:
        wait_until_all_sleep(team_of(num_threads, variant.dtype, uses_dot=False))
        run.step(rows)
    assert same_bits(run, expected)


def test_other_caches_and_block_sizes_in_turn() -> None:
    variant = VARIANTS[1]
    decoder = PlainDecoder(SIZES["llama"], variant.dtype)
    sequences = inputs(decoder, STEPS)
    stage = make_stage(decoder, variant, 2)
    expected = {size: Run(make_stage(decoder, variant), decoder, sequences, size).all(STEPS) for size in (8, 16, 64)}
    runs = [(size, Run(stage, decoder, sequences, size)) for size in (8, 64, 16, 8)]
    for rows in STEPS:
        for _, run in runs:
            run.step(rows)
    assert all(same_bits(run, expected[size]) for size, run in runs)


def halved(layer: LayerWeights, rank: int, sizes: Sizes) -> LayerWeights:
    """Rank `rank` of two: half of the heads, half of the intermediate size; biases of sums on the first only."""

    def rows(linear: Linear, groups: list[int]) -> Linear:
        weight = [part.chunk(2)[rank] for part in linear.weight.split(groups)]
        bias = None if linear.bias is None else torch.cat([p.chunk(2)[rank] for p in linear.bias.split(groups)])
        return Linear(torch.cat(weight), bias)

    def columns(linear: Linear) -> Linear:
        return Linear(linear.weight.chunk(2, dim=1)[rank].contiguous(), linear.bias if rank == 0 else None)

    heads, kv_heads = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    return replace(
        layer,
        qkv=rows(layer.qkv, [heads, kv_heads, kv_heads]),
        o=columns(layer.o),
        gate_up=rows(layer.gate_up, [sizes.intermediate] * 2),
        down=columns(layer.down),
    )


class Pair:
    """Sums of two ranks that are threads."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=DEADLINE_S)
        self._parts: list[Tensor] = [torch.empty(0)] * 2
        self.num_sums = 0

    def all_reduce(self, rank: int, tensor: Tensor) -> Tensor:
        assert tensor.dtype == torch.float32
        self._parts[rank] = tensor.clone()
        self.num_sums += rank
        self._barrier.wait()
        tensor.copy_(self._parts[0] + self._parts[1])
        self._barrier.wait()
        return tensor


@pytest.mark.parametrize("keeps_last", [False, True], ids=["whole", "kept"])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_two_ranks_share_every_layer(variant: Variant, num_threads: int, keeps_last: bool) -> None:
    sizes = Sizes(has_biases=True, num_kv_heads=2, num_heads=4, windows=(None, 9))
    decoder = PlainDecoder(sizes, variant.dtype)
    sequences = inputs(decoder, STEPS)
    half = replace(sizes, num_heads=2, num_kv_heads=1, intermediate=sizes.intermediate // 2)
    pair = Pair()

    def rank_run(rank: int) -> Run:
        torch.set_num_threads(num_threads)
        layers = [partial(halved, layer, rank, sizes) for layer in decoder.layers]
        table, shape = decoder.rope_table(MAX_POSITION), replace(half.stage_shape, is_split=True)
        stage = CpuStage(shape, layers, decoder.norm, decoder.head, table, variant.dtype, variant.uses_dot)
        torch.set_num_threads(1)
        local = replace(decoder, sizes=half)
        return Run(stage, local, sequences, 8, partial(pair.all_reduce, rank), keeps_last)

    ranks = [rank_run(0), rank_run(1)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: run.all(STEPS), ranks))
    assert same_bits(*ranks)
    without_last = 2 if keeps_last else 0  # the first step keeps no token: no rank sums the last layer's
    assert pair.num_sums == len(STEPS) * 2 * len(sizes.windows) - without_last
    expected = plain(decoder, sequences)
    assert close(ranks[0], {s: expected[s][positions] for s, positions in ranks[0].kept.items()}, variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_stages_in_a_row(variant: Variant) -> None:
    """The first has no final norm; what goes to the second is in the model's dtype."""
    decoder = PlainDecoder(SIZES["biases"], variant.dtype)
    sequences = inputs(decoder, STEPS)
    table, shape = decoder.rope_table(MAX_POSITION), decoder.sizes.stage_shape
    first, last = (
        CpuStage(shape, [partial(replace, layer)], norm, head, table, variant.dtype, variant.uses_dot)
        for layer, norm, head in zip(decoder.layers, (None, decoder.norm), (None, decoder.head), strict=True)
    )
    paged = PagedSequences(8, 30)
    caches = [make_cache(replace(decoder.sizes, windows=(None,)), variant.dtype, 8, 30) for _ in range(2)]
    for rows in ([(0, 20), (1, 9)], [(0, 1), (1, 1)]):
        metadata = paged.step(rows)
        starts = [int(metadata.seq_lens[row]) - new for row, (_, new) in enumerate(rows)]
        x = torch.cat([sequences[s][start : start + new] for start, (s, new) in zip(starts, rows, strict=True)])
        hidden = last.run(first.run(x, metadata, caches[0]), metadata, caches[1])
        whole = plain(decoder, sequences)
        expected = [whole[s][start : start + new] for start, (s, new) in zip(starts, rows, strict=True)]
        assert relative_error(hidden, torch.cat(expected)) < 2 * tolerance(variant)  # rounded between the stages, too
