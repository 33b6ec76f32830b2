"""Random checkpoints in the shape of known models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.bench_scripts import load

shapes = load("shapes")
TEXTS = ["def f(x):\n    return x + 1  # größer, 你好, 🙂\n"] * 3


@pytest.mark.parametrize(("shape", "num_parameters"), [("smollm2-135m", 134_515_008), ("qwen3-0.6b", 596_049_920)])
def test_shape_has_as_many_parameters_as_the_model_it_is_named_after(shape, num_parameters):
    """The numbers are those that the models' pages state."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.make_config(shape))
    assert model.num_parameters() == num_parameters


def test_checkpoint_loads_with_its_tokenizer(tmp_path):
    config = shapes.make_config("smollm2-135m", num_hidden_layers=2, vocab_size=700)
    shapes.write_weights(tmp_path, config, seed=1)
    shapes.train_tokenizer(config.vocab_size, iter(TEXTS)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype is torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 700 == model.config.vocab_size
    for text in (*TEXTS, "never seen: ÿ\u0000🧑‍🚀"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.encode(prompt)[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") == 1


def test_same_seed_same_weights(tmp_path):
    config = shapes.make_config("qwen3-0.6b", num_hidden_layers=1, vocab_size=300)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        shapes.write_weights(tmp_path / name, config, seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_standard_library_is_there():
    assert sum(len(text) for text in shapes.stdlib_texts()) > 1_000_000
