"""The offline workloads: what docs/benchmarks.md says of them."""

import pytest

from tests.support.bench_scripts import load

workloads = load("workloads")
VOCAB_SIZE = 49152


@pytest.mark.parametrize("name", workloads.NAMES)
def test_same_seed_same_prompts_and_each_turn_new_tokens_of_the_same_lengths(name):
    first, again, later, other_seed = (
        workloads.make_workload(name, vocab_size=VOCAB_SIZE, seed=seed, turn=turn)
        for seed, turn in ((3, 0), (3, 0), (3, 1), (4, 0))
    )
    assert first == again
    assert [len(prompt) for prompt in first.prompts] == [len(prompt) for prompt in later.prompts]
    assert first.output_lens == later.output_lens
    # A prefix cache that kept everything of one turn, or of another seed, finds not one block of 16 in the next.
    for other in (later, other_seed):
        known = {tuple(prompt[:16]) for prompt in first.prompts}
        assert not known & {tuple(prompt[:16]) for prompt in other.prompts}


@pytest.mark.parametrize(
    ("name", "num_requests", "prompt_lens", "output_lens"),
    [
        ("mixed", 64, (32, 256), (64, 128)),
        ("single", 1, (128, 128), (128, 128)),
        ("prefill", 1, (2048, 2048), (1, 1)),
        ("prefix", 32, (544, 544), (32, 32)),
    ],
)
def test_sizes(name, num_requests, prompt_lens, output_lens):
    workload = workloads.make_workload(name, vocab_size=VOCAB_SIZE)
    assert len(workload.prompts) == len(workload.output_lens) == num_requests
    for lengths, (low, high) in (
        ([len(prompt) for prompt in workload.prompts], prompt_lens),
        (workload.output_lens, output_lens),
    ):
        assert low <= min(lengths) <= low + 0.2 * (high - low)
        assert high - 0.2 * (high - low) <= max(lengths) <= high
    assert all(0 <= token < VOCAB_SIZE for prompt in workload.prompts for token in prompt)
    assert workload.num_output_tokens == sum(workload.output_lens)


def test_prefix_prompts_share_exactly_512_tokens():
    prompts = workloads.make_workload("prefix", vocab_size=VOCAB_SIZE).prompts
    assert len({tuple(prompt[:512]) for prompt in prompts}) == 1
    assert len({tuple(prompt[512:]) for prompt in prompts}) == len(prompts)


def test_head_and_shortened():
    workload = workloads.make_workload("mixed", vocab_size=VOCAB_SIZE)
    assert workload.head(None) == workload
    head = workload.head(3).shortened(70)
    assert head.prompts == workload.prompts[:3]
    assert head.output_lens == [min(70, length) for length in workload.output_lens[:3]]


def test_an_unknown_workload_is_an_error():
    with pytest.raises(ValueError, match="no workload 'x'; there are mixed"):
        workloads.make_workload("x", vocab_size=VOCAB_SIZE)
