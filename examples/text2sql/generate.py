"""Makes questions with their SQL. Everything is decided by the seed: the same seed gives the same examples.

Run as a program it writes examples as JSON lines: `python generate.py --split both --count 20`.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from aggregations import AGGREGATING, COUNTING, NESTED
from joins import JOIN_PATTERNS
from patterns import Pattern
from schemas import Schema, held_out_schema, random_schema
from selections import FILTERING, SELECTING
from slots import Filler, NoFit

SINGLE_TABLE_PATTERNS = SELECTING + FILTERING + COUNTING + AGGREGATING + NESTED
PATTERNS = SINGLE_TABLE_PATTERNS + JOIN_PATTERNS
# Split name -> (held-out schemas, held-out wordings). "both" is the hardest.
SPLITS = {"train": (False, False), "schema": (True, False), "wording": (False, True), "both": (True, True)}
HELD_OUT_SPLITS = ("schema", "wording", "both")
QUESTION_STARTS = ("what", "how", "which", "can", "could", "for which")
SYSTEM_MESSAGES = (
    "You translate questions to SQL.",
    "You are a helpful assistant.",
    "Answer with one SQL query.",
    "You write SQLite queries.",
    "You are a database assistant. Reply with SQL only.",
)
FIRST_TURN_SHARE = 0.4
SYSTEM_SHARE = 0.1
SYSTEM_SCHEMA_SHARE = 0.1


@dataclass(frozen=True)
class Example:
    """One question. `planted` lists (table, column, value) literals that test rows should contain."""

    split: str
    pattern: str
    schema: Schema
    schema_text: str
    question: str
    sql: str
    planted: tuple[tuple[str, str, str | int | float], ...]

    @property
    def prompt(self) -> str:
        """The user message: the schema, then the question."""
        return f"{self.schema_text}\n{self.question}"


def write_schema(rng: random.Random, schema: Schema) -> str:
    """CREATE TABLE lines in any order, now and then typed carelessly."""
    lines = [table.create_sql(rng) for table in schema.tables]
    rng.shuffle(lines)
    text = "\n".join(lines)
    draw = rng.random()
    if draw < 0.06:
        return text.lower()
    return text.replace(";", "") if draw < 0.12 else text


def style(rng: random.Random, schema: Schema, question: str) -> str:
    """Capital letter, punctuation and underscores, or the lack of them, as people type."""
    if rng.random() < 0.15:
        for column in (column for table in schema.tables for column in table.columns):
            question = question.replace(column.phrase, column.name)
    if rng.random() < 0.8:
        question = re.sub(r"\ba ([aeiou])", r"an \1", question)
    asks = question.startswith(QUESTION_STARTS)
    if rng.random() < 0.75:
        question = question[0].upper() + question[1:]
    if asks and "?" not in question:
        return question + "?" if rng.random() < 0.75 else question
    return question + "." if rng.random() < 0.3 else question


def ask(rng: random.Random, schema: Schema, pattern: Pattern, held_out_wording: bool) -> tuple[str, str, tuple]:
    """The question, the SQL and the literals to plant. Raises NoFit when the schema does not suit the pattern."""
    filler = Filler(rng, schema, pattern, held_out_wording)
    filler.fill()
    wording = rng.choice(pattern.held_out if held_out_wording else pattern.wordings)
    question = style(rng, schema, wording.format(**filler.english))
    return question, pattern.sql.format(**filler.sql), tuple(filler.planted)


def draw_schema(rng: random.Random, held_out: bool, pattern: Pattern) -> Schema:
    """A schema on which the pattern makes sense; single-table questions get a second, unused table at times."""
    num_tables = 2 if pattern.is_join or rng.random() < 0.25 else 1
    return held_out_schema(rng, num_tables) if held_out else random_schema(rng, num_tables)


def make_example(rng: random.Random, split: str, pattern: Pattern | None = None) -> Example:
    """One example of a split, on a random pattern unless one is given."""
    held_out, held_out_wording = SPLITS[split]
    while True:
        chosen = pattern or rng.choice(PATTERNS)
        if held_out and chosen.name == "count_in_place":
            # "live in X" leaves the column to common knowledge about its name, and a held-out name has none.
            if pattern is not None:
                raise ValueError("count_in_place has no held-out schemas")
            continue
        schema = draw_schema(rng, held_out, chosen)
        try:
            question, sql, planted = ask(rng, schema, chosen, held_out_wording)
        except NoFit:
            continue
        return Example(split, chosen.name, schema, write_schema(rng, schema), question, sql, planted)


def examples(split: str, seed: int, count: int) -> Iterator[Example]:
    """`count` examples of a split, taking all patterns in turn, each round in a new order."""
    held_out = SPLITS[split][0]
    usable = [pattern for pattern in PATTERNS if not (held_out and pattern.name == "count_in_place")]
    rng = random.Random(f"{split}-{seed}")
    for index in range(count):
        if index % len(usable) == 0:
            rng.shuffle(usable)
        yield make_example(rng, split, usable[index % len(usable)])


def opening(rng: random.Random, example: Example) -> list[dict[str, str]]:
    """The messages before the first answer; the schema is at times in the system message instead."""
    draw = rng.random()
    if draw < SYSTEM_SCHEMA_SHARE:
        return [{"role": "system", "content": example.schema_text}, {"role": "user", "content": example.question}]
    user = {"role": "user", "content": example.prompt}
    if draw < SYSTEM_SCHEMA_SHARE + SYSTEM_SHARE:
        return [{"role": "system", "content": rng.choice(SYSTEM_MESSAGES)}, user]
    return [user]


def make_conversation(rng: random.Random) -> list[dict[str, str]]:
    """A training chat: a schema with one question, or several about the same schema.

    Several questions spread the cost of reading the schema over more answers, and teach follow-up questions.
    """
    first = make_example(rng, "train")
    messages = [*opening(rng, first), {"role": "assistant", "content": first.sql}]
    num_follow_ups = 0 if rng.random() < FIRST_TURN_SHARE else rng.randint(1, 2)
    for _ in range(20):
        if num_follow_ups == 0:
            break
        patterns = PATTERNS if first.schema.child_key else SINGLE_TABLE_PATTERNS
        try:
            question, sql, _ = ask(rng, first.schema, rng.choice(patterns), False)
        except NoFit:
            continue
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": sql}]
        num_follow_ups -= 1
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for example in examples(args.split, args.seed, args.count):
        row = {"pattern": example.pattern, "prompt": example.prompt, "sql": example.sql}
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
