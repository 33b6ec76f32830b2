"""Writes a checkpoint with random weights in the shape of a known model, so that speed can be measured without a hub.

    python bench/shapes.py smollm2-135m /tmp/models/smollm2-135m

The folder holds bf16 weights and a byte-level BPE tokenizer of the same vocabulary, trained on the sources of Python's
standard library, with a ChatML template: every engine that reads Hugging Face folders can load and serve it.
"""

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

MAX_POSITION = 8192
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# name -> model_type of transformers, and the fields that give the shape
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": (
        "llama",
        {
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            "num_hidden_layers": 28,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "vocab_size": 151936,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
    "llama-3.1-8b": (
        "llama",
        {
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
    ),
}


def make_config(shape: str, **overrides: Any) -> Any:
    """The transformers config of a shape; `overrides` are fields of it, for smaller relatives of the same kind."""
    model_type, fields = SHAPES[shape]
    common = {
        "max_position_embeddings": MAX_POSITION,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(model_type, **common | fields | overrides)


def write_weights(folder: Path, config: Any, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """config.json and model.safetensors, with the initial weights of transformers for this seed."""
    torch.manual_seed(seed)
    build: Any = AutoModelForCausalLM.from_config
    build(config, dtype=dtype).save_pretrained(folder)


def train_tokenizer(vocab_size: int, texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly `vocab_size` tokens; unused added tokens fill up what the texts do not give."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    num_missing = vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<|unused_{i}|>", normalized=False) for i in range(num_missing)])
    build: Any = PreTrainedTokenizerFast  # has no annotations
    wrapped: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITION,
    )
    return wrapped


def stdlib_texts() -> Iterator[str]:
    """The sources of the standard library: text that every machine with Python has."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts and "dist-packages" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    config = make_config(args.shape)
    write_weights(args.folder, config, args.seed)
    train_tokenizer(config.vocab_size, stdlib_texts()).save_pretrained(args.folder)
    size_bytes = sum(path.stat().st_size for path in args.folder.iterdir())
    print(f"{args.folder}: {args.shape}, {size_bytes / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
