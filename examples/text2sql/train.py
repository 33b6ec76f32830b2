"""Trains the text-to-SQL model from nothing and writes it as a Hugging Face folder.

    python train.py --out model            # the shipped model
    python train.py --out /tmp/pilot --tokens 1000000

Everything random comes from `--seed`. The loss is on the SQL, with a little on the prompt: its questions repeat names
from the schema, and predicting those repeats is what teaches copying first.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from generate import HELD_OUT_SPLITS, examples, make_conversation
from tokenizer import save_tokenizer, train_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 1536
TOKENIZER_CONVERSATIONS = 10_000
BATCH_TOKENS = 4096
SORT_WINDOW = 1024  # conversations sorted by length together, so that a batch has little padding
LENGTH_STEP = 16
PROMPT_WEIGHT = 0.1
WARMUP_STEPS = 100
PROBES_PER_SPLIT = 106
Encoded = tuple[list[int], list[float]]


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 5 million parameters, 10 MB in bf16."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # On a CPU, at these lengths, the backward pass of fused attention is slower than plain matrix products.
    model.set_attn_implementation("eager")
    return model


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> Encoded:
    """Token ids of a chat, as the chat template writes them, and the loss weight of each."""
    ids, weights = [tokenizer.bos_token_id], [0.0]
    for message in messages:
        is_answer = message["role"] == "assistant"
        content = tokenizer(message["content"], add_special_tokens=False).input_ids
        content += [tokenizer.eos_token_id] if is_answer else []
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *content]
        weights += [0.0] + [1.0 if is_answer else PROMPT_WEIGHT] * len(content)
    return ids, weights


def padded_length(ids: list[int]) -> int:
    """The length rounded up: matrix products of few different shapes are planned once and reused."""
    return -(-len(ids) // LENGTH_STEP) * LENGTH_STEP


def pad(batch: list[Encoded], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and weights, both [batch, length]. Causal attention never looks right, so no mask is needed."""
    length = max(padded_length(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids, _ in batch])
    weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in batch])
    return ids, weights


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of at most BATCH_TOKENS padded tokens, each of conversations of similar length."""
    rng = random.Random(f"conversations-{seed}")
    while True:
        window = [encode(tokenizer, make_conversation(rng)) for _ in range(SORT_WINDOW)]
        window.sort(key=lambda encoded: len(encoded[0]))
        groups: list[list[Encoded]] = [[]]
        for encoded in window:
            if (len(groups[-1]) + 1) * padded_length(encoded[0]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(encoded)
        rng.shuffle(groups)
        for group in groups:
            yield pad(group, tokenizer.pad_token_id)


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each next token and whether it was the likeliest one, both [batch, length - 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses, logits.argmax(-1) == ids[:, 1:]


def optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices of the layers, AdamW for the embedding and the norms.

    Muon (Jordan et al., 2024) needs about half the tokens of AdamW here; with `match_rms_adamw` (Liu et al., "Muon is
    Scalable for LLM Training", 2025, section 2.2) both use the same learning rate.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def schedule(step: int, num_steps: int) -> float:
    """The share of the peak learning rate: linear warm-up, flat, then linear to zero over the last 60 %."""
    return min((step + 1) / WARMUP_STEPS, 1.0, max(0.0, (num_steps - step) / (0.6 * num_steps)))


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, split: str, seed: int) -> float:
    """Share of a split's questions whose whole SQL is the greedy answer, word for word (a lower bound of accuracy)."""
    encoded = []
    for example in examples(split, seed, PROBES_PER_SPLIT):
        messages = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.sql}]
        encoded.append(encode(tokenizer, messages))
    ids, weights = pad(encoded, tokenizer.pad_token_id)
    _, right = token_losses(model, ids)
    return (right | (weights[:, 1:] < 1.0)).all(dim=1).float().mean().item()


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Runs the steps that `args.tokens` pays for and prints progress."""
    steppers = optimizers(model, args.learning_rate)
    num_steps, started = args.tokens // BATCH_TOKENS, time.monotonic()
    smoothed = 0.0
    for step, (ids, weights) in zip(range(num_steps), batches(tokenizer, args.seed), strict=False):
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = args.learning_rate * schedule(step, num_steps)
        losses, _ = token_losses(model, ids)
        is_answer = weights[:, 1:] == 1.0
        ((losses * weights[:, 1:]).sum() / weights[:, 1:].sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        model.zero_grad(set_to_none=True)
        smoothed += (losses[is_answer].mean().item() - smoothed) * (0.05 if step else 1.0)
        if step % 50 == 0:
            print(
                f"step {step}/{num_steps} sql_loss {smoothed:.4f} elapsed_s {time.monotonic() - started:.0f} "
                f"cpu_s {time.process_time():.0f}",
                flush=True,
            )
        if step and step % args.probe_every == 0:
            report(model, tokenizer, args.seed)


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    model.eval()
    shares = [f"{split} {exact_match(model, tokenizer, split, seed):.3f}" for split in ("train", *HELD_OUT_SPLITS)]
    print("exact match on fresh questions:", ", ".join(shares), flush=True)
    model.train()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes bf16 weights, config, generation config and tokenizer."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=128,
    )
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8_000_000, help="training tokens, padding included")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--probe-every", type=int, default=250, help="steps between exact-match probes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(f"tokenizer-{args.seed}")
    chats = (make_conversation(rng) for _ in range(TOKENIZER_CONVERSATIONS))
    tokenizer = train_tokenizer((message["content"] for chat in chats for message in chat), VOCAB_SIZE)
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    train(model, tokenizer, args)
    report(model, tokenizer, args.seed + 1)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
