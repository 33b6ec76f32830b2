"""Small tokenizers and model folders, trained and written in a moment."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512
TEXTS = [
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today?",
    "Bitte schön: größere Straßen, naïve café, 你好世界, こんにちは, 🙂🚀 and 👩‍👩‍👧.",
    "SELECT name, salary FROM employees WHERE salary > 100 ORDER BY name;",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tool role') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}{% if mood is defined %}[{{ mood }}]{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen: every byte is a token, </s> is id 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return _wrap(tokenizer, pad_token="<pad>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral: words begin with U+2581, unknown characters fall back to byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzHW.,!?"))
    merges = [("▁", "h"), ("▁", "w"), ("l", "l"), ("o", "r"), ("▁", "t"), ("e", "r")]
    pieces += letters + ["".join(pair) for pair in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _wrap(tokenizer, unk_token="<unk>")


def _wrap(tokenizer: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    build: Any = PreTrainedTokenizerFast  # has no annotations
    wrapped: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **special_tokens
    )
    return wrapped


def write_model_folder(folder: Path, chat_template: str | None = CHAT_TEMPLATE, **generation_config: object) -> Path:
    """A folder with a tokenizer, a config.json and a generation_config.json, without weights."""
    tokenizer = byte_level()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **generation_config}))
    return folder
