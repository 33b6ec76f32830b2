"""Measures execution accuracy: the model's SQL must give the same rows as the gold SQL on random databases.

    python evaluate.py --base-url http://127.0.0.1:8000/v1     # through a running OpenAI-compatible server
    python evaluate.py --local model                           # in this process, with transformers

Exits with 1 when the overall accuracy is below `--min-accuracy`.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from database import same_answer
from generate import HELD_OUT_SPLITS, Example, examples

MAX_NEW_TOKENS = 128
REQUEST_TIMEOUT_S = 120.0
SPLIT_TITLES = {"schema": "held-out schemas", "wording": "held-out wordings", "both": "held-out schemas and wordings"}


def held_out_examples(seed: int, count_per_split: int) -> list[Example]:
    """The held-out questions, the same for the same seed, in equal parts of the three held-out splits."""
    return [example for split in HELD_OUT_SPLITS for example in examples(split, seed, count_per_split)]


def ask_server(prompts: list[str], base_url: str, model: str | None, concurrency: int) -> list[str]:
    """Answers from `/chat/completions` at temperature 0. Raises httpx.HTTPError if the server refuses or is away."""
    import httpx

    with httpx.Client(
        base_url=base_url.rstrip("/"), timeout=REQUEST_TIMEOUT_S, limits=httpx.Limits(max_connections=concurrency)
    ) as client:
        name = model or client.get("/models").raise_for_status().json()["data"][0]["id"]

        def ask(prompt: str) -> str:
            body = {
                "model": name,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": MAX_NEW_TOKENS,
            }
            reply = client.post("/chat/completions", json=body).raise_for_status().json()
            return reply["choices"][0]["message"]["content"] or ""

        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(ask, prompts))


def ask_local(prompts: list[str], folder: Path, batch_size: int = 64) -> list[str]:
    """Answers from transformers in this process, greedy, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    order = sorted(range(len(chats)), key=lambda index: len(chats[index]))  # little padding in a batch
    answers = [""] * len(chats)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        inputs = tokenizer([chats[i] for i in indices], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
        texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            answers[index] = text
    return answers


def score(chosen: list[Example], answers: list[str]) -> list[bool]:
    return [same_answer(example, answer) for example, answer in zip(chosen, answers, strict=True)]


def shares(chosen: list[Example], right: list[bool], key: Callable[[Example], str]) -> dict[str, tuple[int, int]]:
    """(right answers, questions) for each value of `key`."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for example, is_right in zip(chosen, right, strict=True):
        totals[key(example)][0] += is_right
        totals[key(example)][1] += 1
    return {name: (num_right, count) for name, (num_right, count) in totals.items()}


def print_report(chosen: list[Example], answers: list[str], right: list[bool], num_failures: int) -> None:
    """Accuracy by pattern (worst first), by split and overall, after some of the wrong answers."""
    wrong = [(e, a) for e, a, is_right in zip(chosen, answers, right, strict=True) if not is_right]
    for example, answer in wrong[:num_failures]:
        print(f"--- {example.split} {example.pattern}\n{example.prompt}\n  gold  {example.sql}\n  model {answer}")
    patterns = shares(chosen, right, lambda example: example.pattern)
    for name, (num_right, count) in sorted(patterns.items(), key=lambda item: item[1][0] / item[1][1]):
        print(f"  {name:<24} {num_right / count:6.1%}  ({num_right}/{count})")
    for split, (num_right, count) in shares(chosen, right, lambda example: example.split).items():
        print(f"{SPLIT_TITLES[split]:<32} {num_right / count:6.1%}  ({num_right}/{count})")
    print(f"{'overall':<32} {sum(right) / len(right):6.1%}  ({sum(right)}/{len(right)})")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="model name to ask for; the server's first one unless given")
    parser.add_argument("--local", type=Path, metavar="FOLDER", help="run this model folder with transformers instead")
    parser.add_argument("--count", type=int, default=318, help="questions of each of the three held-out splits")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--min-accuracy", type=float, default=0.9)
    parser.add_argument("--show-failures", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, help="also write every question, answer and verdict here as JSON lines")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the evaluation and returns the exit status."""
    args = parse_args(argv)
    chosen = held_out_examples(args.seed, args.count)
    prompts = [example.prompt for example in chosen]
    started = time.monotonic()
    if args.local:
        answers = ask_local(prompts, args.local)
    else:
        answers = ask_server(prompts, args.base_url, args.model, args.concurrency)
    elapsed_s = time.monotonic() - started
    right = score(chosen, answers)
    print_report(chosen, answers, right, args.show_failures)
    print(f"{len(chosen)} answers in {elapsed_s:.1f} s")
    if args.json:
        args.json.write_text(
            "".join(
                json.dumps(
                    {"split": e.split, "pattern": e.pattern, "prompt": e.prompt, "gold": e.sql, "answer": a, "right": r}
                )
                + "\n"
                for e, a, r in zip(chosen, answers, right, strict=True)
            )
        )
    if sum(right) < args.min_accuracy * len(right):
        print(f"below the required {args.min_accuracy:.1%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
