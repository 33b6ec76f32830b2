"""The text-to-SQL example: its data, its tokenizer and the model that ships with it."""

import importlib
import json
import random
import sqlite3
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "text2sql"
MODEL = FOLDER / "model"
MAX_MODEL_BYTES = 12_000_000
ODD_TEXTS = (
    "",
    " ",
    "\n\n\t x  y ",
    "naïve café",
    "日本語のテーブル",
    "🙂🧑‍🚀🏳️‍🌈",
    "Ω≈ç√∫ ПРИВЕТ שלום",
    "e\u0301\u200d\ufeff\u0000\x7f",
    "SELECT COUNT(*) FROM t WHERE a <> 'O''Brien';",
    "a_b__c 12345.6789 -1e9 CamelCase XML2JSON",
    "\U0010ffff\u2028",
)


def load(name: str) -> ModuleType:
    """A module of the example, which is a folder of scripts that import each other by name."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


generate, schemas, words, heldout = load("generate"), load("schemas"), load("words"), load("heldout")
database, wordings, evaluate, train = load("database"), load("wordings"), load("evaluate"), load("train")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def condition_forms() -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Every (training, held-out) pair of phrase lists."""
    pairs = [getattr(wordings, name) for name in ("EQUALS", "COMPARES", "NOT_EQUALS", "BETWEENS", "EITHERS")]
    pairs += [wordings.NULLS, wordings.NOT_NULLS, wordings.YEARS, wordings.PLACES, *wordings.LIKES.values()]
    return pairs


def identifiers(schema) -> set[str]:
    return {name for table in schema.tables for name in (table.name, table.noun, *(c.name for c in table.columns))}


@pytest.mark.parametrize("split", generate.SPLITS)
def test_the_same_seed_gives_the_same_examples(split):
    first, second = (list(generate.examples(split, 5, 120)) for _ in range(2))
    assert first == second
    assert first != list(generate.examples(split, 6, 120))


def test_training_never_uses_a_held_out_name():
    rng = random.Random(0)
    seen = set().union(*(identifiers(schemas.random_schema(rng, rng.choice((1, 2)))) for _ in range(5000)))
    assert not {word for name in seen for word in name.split("_")} & heldout.held_out_words()
    held_out = {name for _ in range(300) for name in identifiers(schemas.held_out_schema(rng, 2))}
    assert seen & held_out <= {"id", "name"}


def test_training_never_uses_a_held_out_value_or_wording():
    assert not set(words.VALUES) & set(heldout.HELD_OUT_VALUES)
    trained = {text for pattern in generate.PATTERNS for text in pattern.wordings}
    held_out = {text for pattern in generate.PATTERNS for text in pattern.held_out}
    assert not trained & held_out
    for training_forms, held_out_forms in condition_forms():
        assert held_out_forms
        assert not set(training_forms) & set(held_out_forms)


def test_held_out_questions_use_the_held_out_wordings(monkeypatch):
    monkeypatch.setattr(generate, "style", lambda rng, schema, question: question)
    pattern = next(p for p in generate.PATTERNS if p.name == "all_rows")
    rng = random.Random(1)
    for split, texts in (("train", pattern.wordings), ("wording", pattern.held_out)):
        example = generate.make_example(rng, split, pattern)
        assert any(example.question.endswith(text.split("}")[-1]) for text in texts)


@pytest.mark.parametrize("split", generate.SPLITS)
def test_every_pattern_runs_in_sqlite(split):
    chosen = list(generate.examples(split, 11, 3 * len(generate.PATTERNS)))
    expected = {p.name for p in generate.PATTERNS} - ({"count_in_place"} if generate.SPLITS[split][0] else set())
    assert {example.pattern for example in chosen} == expected
    for example in chosen:
        assert database.same_answer(example, example.sql), example


def test_gold_queries_find_something():
    empty = 0
    chosen = list(generate.examples("both", 3, 150))
    for example in chosen:
        with closing(database.build(example, 0)) as connection:
            empty += database.run(connection, example.sql) in ([], [(0,)], [(None,)])
    assert empty < 0.05 * len(chosen)


@pytest.mark.parametrize(
    ("old", "new"),
    [(" > ", " >= "), ("AVG(", "SUM("), ("MAX(", "MIN("), (" DESC", " ASC"), (" AND ", " OR "), ("SELECT", "SELEC")],
)
def test_a_changed_query_counts_as_wrong(old, new):
    # Left out are queries where the change is none: the bounds of averages and counts are rarely met exactly.
    blind = ("BETWEEN", "HAVING", "(SELECT AVG")
    chosen = [e for e in generate.examples("both", 17, 400) if old in e.sql and not any(b in e.sql for b in blind)]
    noticed = [not database.same_answer(example, example.sql.replace(old, new)) for example in chosen]
    assert len(noticed) >= 5
    assert sum(noticed) >= 0.8 * len(noticed)


def test_an_answer_cannot_change_the_database():
    example = next(generate.examples("schema", 0, 1))
    table = example.schema.tables[0].name
    assert not database.same_answer(example, f"DROP TABLE {table}")
    with closing(database.build(example, 0)) as connection, pytest.raises(sqlite3.Error):
        database.run(connection, f"DELETE FROM {table}")


@pytest.fixture
def server():
    """An OpenAI-compatible server that knows the right answers; every tenth one is spoiled once `spoil` is set."""
    gold = {e.prompt: e.sql for e in evaluate.held_out_examples(seed=1, count_per_split=10)}

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # the default of 5 resets some of the evaluation's connections

    class Handler(BaseHTTPRequestHandler):
        spoil = False

        def do_GET(self):
            assert self.path == "/v1/models"
            self.reply({"data": [{"id": "the-model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (self.path, body["model"], body["temperature"]) == ("/v1/chat/completions", "the-model", 0)
            prompt = body["messages"][-1]["content"]
            answer = "no idea" if Handler.spoil and list(gold).index(prompt) % 10 == 0 else gold[prompt]
            self.reply({"choices": [{"message": {"role": "assistant", "content": answer}}]})

        def reply(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            """Keeps the test output quiet."""

    with Server(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/v1", Handler
        httpd.shutdown()
        thread.join()


def test_the_evaluation_asks_a_server_and_judges_it(server, capsys):
    base_url, handler = server
    argv = ["--base-url", base_url, "--count", "10", "--seed", "1", "--min-accuracy", "0.95"]
    assert evaluate.main(argv) == 0
    assert "100.0%  (30/30)" in capsys.readouterr().out
    handler.spoil = True
    assert evaluate.main(argv) == 1
    assert "90.0%  (27/30)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_the_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_training_sees_the_tokens_of_the_chat_template(tokenizer):
    rng = random.Random(2)
    for messages in (generate.make_conversation(rng) for _ in range(50)):
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert train.encode(tokenizer, messages)[0] == ids


def test_the_chat_template_opens_the_answer_and_refuses_unknown_roles(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|bos|><|system|>S<|user|>U<|assistant|>"
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_model_folder_is_small_and_complete():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= MAX_MODEL_BYTES
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert json.loads((MODEL / "tokenizer_config.json").read_text())["chat_template"]
    assert json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"] == config["eos_token_id"]


def test_the_model_answers_held_out_questions():
    chosen = evaluate.held_out_examples(seed=77, count_per_split=20)
    answers = evaluate.ask_local([example.prompt for example in chosen], MODEL)
    right = evaluate.score(chosen, answers)
    assert sum(right) >= 0.85 * len(right), f"{sum(right)} of {len(right)} right"
