"""Offline generation with real workers on a tiny checkpoint, against transformers."""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from manta.cluster.doors.errors import RequestError
from manta.cluster.engine.types import EngineError, EngineLostError
from manta.cluster.llm import LLM
from manta.cluster.preflight import PreflightError
from manta.configs.sampling import SamplingParams
from tests.support.checkpoints import make_checkpoint
from tests.support.server import wait_until
from tests.support.small_tokenizers import TEXTS, VOCAB_SIZE, write_model_folder

FIELDS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "block_size": 8,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": "4MiB",
}


def params(**fields: Any) -> SamplingParams:
    return SamplingParams.model_validate({"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | fields)


def worker_pids() -> set[int]:
    """Live worker processes started by this one."""
    pids = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = b"manta.workers.main" in (path / "cmdline").read_bytes()
            state, parent = (path / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if is_worker and int(parent) == os.getpid() and state != "Z":
            pids.add(int(path.name))
    return pids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # transformers shares the cores with the workers
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    return make_checkpoint(folder, "llama", vocab_size=VOCAB_SIZE, eos_token_id=1)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **FIELDS) as llm:
        yield llm
    assert worker_pids() == set()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def greedy(reference: Any, ids: list[int], num_tokens: int) -> list[int]:
    output = reference.generate(
        torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    tokens: list[int] = output[0, len(ids) :].tolist()
    return tokens


def test_greedy_equals_transformers(llm: LLM, reference: Any) -> None:
    prompts = [*TEXTS, "a", " ".join(TEXTS)]
    outputs = llm.generate(prompts, params(max_tokens=24))
    tokenizer = llm.get_tokenizer()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt == prompt
        assert output.prompt_token_ids == tokenizer.encode(prompt)
        (completion,) = output.outputs
        assert completion.token_ids == greedy(reference, output.prompt_token_ids, 24)
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert (completion.finish_reason, output.finished) == ("length", True)
        times = output.metrics
        assert times.first_token_time is not None
        assert times.finished_time is not None
        assert times.arrival_time <= times.first_token_time <= times.finished_time


def test_every_form_of_a_prompt(llm: LLM) -> None:
    text = TEXTS[0]
    ids = llm.get_tokenizer().encode(text)
    forms: list[Any] = [text, [text], ids, [ids], {"prompt": text}, [{"prompt_token_ids": ids}]]
    completions = [llm.generate(form, params())[0].outputs[0] for form in forms]
    assert all(completion == completions[0] for completion in completions)
    mixed: list[Any] = [[1, 2], [3], text]
    assert len(llm.generate(mixed, params(max_tokens=1))) == 3
    assert llm.generate([], params()) == []


def test_more_requests_than_the_engine_keeps(llm: LLM) -> None:
    num_prompts = 3 * 4 * FIELDS["max_num_seqs"]
    prompts = [[i % VOCAB_SIZE, i * i % VOCAB_SIZE] for i in range(num_prompts)]
    together = llm.generate(prompts, params(max_tokens=3), use_tqdm=False)
    assert [output.prompt_token_ids for output in together] == prompts
    for i in range(0, num_prompts, 17):
        (alone,) = llm.generate([prompts[i]], params(max_tokens=3))
        assert alone.outputs == together[i].outputs


def num_finished(llm: LLM) -> int:
    lines = llm.metrics_text().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total{")))


def test_prompts_of_an_iterator_are_taken_as_there_is_room(llm: LLM) -> None:
    before, num_ahead = num_finished(llm), []

    def prompts() -> Iterator[Any]:
        for i in range(150):
            num_ahead.append(i - (num_finished(llm) - before))
            yield [1 + i] if i % 2 else TEXTS[i % 3]

    outputs = llm.generate(prompts(), params(max_tokens=3))
    assert len(outputs) == 150
    assert outputs[1].prompt_token_ids == [2]
    assert outputs[2].outputs == llm.generate(TEXTS[2], params(max_tokens=3))[0].outputs
    assert 0 < max(num_ahead) < 4 * FIELDS["max_num_seqs"]


def test_an_iterator_that_raises_or_ends_early_harms_nothing(llm: LLM) -> None:
    def broken() -> Iterator[Any]:
        yield [1]
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        llm.generate(broken(), params(max_tokens=400))
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        llm.generate(iter([[1], []]), params(max_tokens=400))
    with pytest.raises(ValueError, match="shorter"):
        llm.generate(iter([[1], [2]]), iter([params()]))
    outputs = llm.generate(iter([[1], [2]]), (params(max_tokens=i) for i in (2, 3)))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 3]


def test_a_wrong_prompt_of_a_list_is_found_before_any_runs(llm: LLM) -> None:
    before = num_finished(llm)
    for wrong, message in (([], "has no tokens"), ("", "has no tokens"), ({}, "neither"), ("é🙂" * 500, "at most 511")):
        with pytest.raises(ValueError, match=f"prompt 60 .*{message}"):
            llm.generate([[1]] * 60 + [wrong], params(max_tokens=1))
    assert num_finished(llm) == before
    (cut,) = llm.generate(["é🙂" * 500], params(max_tokens=1, truncate_prompt_tokens=-1))
    assert len(cut.prompt_token_ids) == 511


def test_stop_strings_and_stop_tokens(llm: LLM) -> None:
    (whole,) = llm.generate(TEXTS[0], params(max_tokens=30))
    text, ids = whole.outputs[0].text, whole.outputs[0].token_ids
    stop = text[len(text) // 2 :][:3]
    (cut,) = llm.generate(TEXTS[0], params(max_tokens=30, stop=[stop]))
    completion = cut.outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == ids[: len(completion.token_ids)]

    token = ids[5]
    (ended,) = llm.generate(TEXTS[0], params(max_tokens=30, stop_token_ids=[token]))
    assert ended.outputs[0].token_ids == ids[: ids.index(token) + 1]
    assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", token)


def test_several_completions_and_seeds(llm: LLM) -> None:
    sampled = params(temperature=1.0, n=3, seed=5)
    (first,) = llm.generate("Hello", sampled)
    (second,) = llm.generate("Hello", sampled)
    assert first.outputs == second.outputs
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in first.outputs}) == 3
    unseeded = [llm.generate("Hello", params(temperature=1.0))[0].outputs[0].token_ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_one_sampling_params_per_prompt(llm: LLM) -> None:
    outputs = llm.generate(["a", "b"], [params(max_tokens=2), params(max_tokens=4)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 4]
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [params()])


def test_chat_uses_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hello"}]
    (output,) = llm.chat(conversation, params())
    assert output.prompt == "<|user|>Hello\n<|assistant|>"
    (same,) = llm.generate({"prompt_token_ids": output.prompt_token_ids}, params())
    assert same.outputs == output.outputs
    assert len(llm.chat([conversation, conversation], params(max_tokens=1))) == 2


def test_chat_gives_tools_to_the_template(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = [{"role": "user", "content": "Hello"}]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with pytest.raises(RequestError, match="does not take tools"):
        llm.chat(conversation, params(), tools=tools)
    template = "{{ tools[0].function.name }}: {{ messages[0].content }}"
    monkeypatch.setattr(llm._tokenizer, "tool_template", template)
    (output,) = llm.chat(conversation, params(max_tokens=1), tools=tools)
    assert output.prompt == "weather: Hello"


def test_a_repeated_prompt_hits_the_prefix_cache(llm: LLM) -> None:
    prompt = [7, 3] * 20
    llm.generate([prompt], params(max_tokens=1))
    (output,) = llm.generate([prompt], params(max_tokens=1))
    assert output.num_cached_tokens > 0
    assert b"vllm:prefix_cache_hits_total" in llm.metrics_text()


def test_what_cannot_run_is_a_value_error_and_harms_nothing(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 has 512 tokens; with max_model_len=512 at most 511"):
        llm.generate([[1], [1] * 512], params())
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        llm.generate([[]], params())
    with pytest.raises(EngineError, match="vocabulary"):
        llm.generate([[VOCAB_SIZE], [1], [2]], params(max_tokens=100))
    (output,) = llm.generate([[1]], params())
    assert len(output.outputs[0].token_ids) == 12


def test_an_interrupted_batch_is_given_up(llm: LLM) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[i % VOCAB_SIZE] for i in range(1000)], params(max_tokens=400))
    finally:
        signal.signal(signal.SIGALRM, previous)
    (output,) = llm.generate([[1]], params())
    assert len(output.outputs[0].token_ids) == 12
    gauge = next(line for line in llm.metrics_text().splitlines() if line.startswith(b"vllm:num_requests_running{"))
    assert gauge.endswith(b" 0.0")


def test_generation_stops_at_the_context(llm: LLM) -> None:
    (output,) = llm.generate([[5] * 500], params(max_tokens=100))
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (12, "length")


def test_the_facade_offers_it() -> None:
    assert importlib.import_module("manta").LLM is LLM


def test_a_missing_model_is_one_sentence() -> None:
    before = worker_pids()
    with pytest.raises(PreflightError, match="model folder '/nowhere' does not exist"):
        LLM("/nowhere")
    assert worker_pids() == before


def test_ray_is_not_for_offline_use() -> None:
    with pytest.raises(ValueError, match="distributed_executor_backend must be 'local'"):
        LLM("/nowhere", distributed_executor_backend="ray")


def test_two_ranks_a_lost_worker_and_no_tokenizer(folder: Path, llm: LLM) -> None:
    before = worker_pids()
    with LLM(str(folder), skip_tokenizer_init=True, tensor_parallel_size=2, **FIELDS) as split:
        (output,) = split.generate([[4, 5, 6]], params())
        (alone,) = llm.generate([[4, 5, 6]], params())
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids
        assert output.outputs[0].text == ""
        with pytest.raises(ValueError, match="skip_tokenizer_init"):
            split.generate("text", params())

        victims = worker_pids() - before
        assert len(victims) == 2
        os.kill(max(victims), 9)
        with pytest.raises(EngineError, match=r"worker rank \d at"):
            split.generate([[1, 2]], params(max_tokens=400))
    assert worker_pids() == before
    with pytest.raises(EngineLostError):
        split.generate([[1]], params())


SCRIPT = """
import os, sys
from manta import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, device="cpu", kv_cache_memory_bytes="1MiB")
    children = open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
    print(len(llm.generate([[1, 2, 3]])), *children, flush=True)
    if sys.argv[2] == "endless":
        llm.generate(([1 + i % 100] for i in range(10**9)), SamplingParams(ignore_eos=True), use_tqdm=False)
"""


def test_workers_end_with_the_interpreter_and_with_ctrl_c(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    programs = {
        how: subprocess.Popen([sys.executable, str(script), str(folder), how], **pipes) for how in ("ends", "endless")
    }
    try:
        for how, program in programs.items():
            assert program.stdout is not None
            num_outputs, *children = program.stdout.readline().split()
            assert num_outputs == "1"
            assert children
            if how == "endless":
                os.killpg(program.pid, signal.SIGINT)  # to all processes, as a terminal sends it
            _, stderr = program.communicate(timeout=60)
            assert (program.returncode == 0) == (how == "ends"), stderr
            assert ("Traceback" in stderr) == ("KeyboardInterrupt" in stderr) == (how == "endless"), stderr
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 10.0, "the workers' end")  # noqa: B023
    finally:
        for program in programs.values():
            if program.poll() is None:
                program.kill()
