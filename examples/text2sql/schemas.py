"""Table schemas: random ones for training, the hand-written ones for the held-out split, and their SQL text."""

import random
import string
from dataclasses import dataclass

import words
from heldout import HELD_OUT_SCHEMAS, HELD_OUT_VALUES, held_out_words

HELD_OUT_WORDS = held_out_words()
SQL_TYPES = {
    "id": ("INTEGER", "INTEGER PRIMARY KEY", "INT"),
    "key": ("INTEGER", "INT"),
    "text": ("TEXT", "TEXT", "VARCHAR(50)", "VARCHAR(100)"),
    "number": ("INTEGER", "INTEGER", "INT"),
    "real": ("REAL", "REAL", "FLOAT", "NUMERIC"),
    "date": ("DATE", "DATE", "TEXT"),
}


@dataclass(frozen=True)
class Column:
    """One column; `kind` is a key of `SQL_TYPES` and decides which questions make sense for it."""

    name: str
    kind: str

    @property
    def phrase(self) -> str:
        """The name as a person would write it in a question."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Table:
    """One table; `noun` is the singular snake_case noun and `name` what the schema calls the table."""

    noun: str
    name: str
    columns: tuple[Column, ...]

    @property
    def phrase(self) -> str:
        return plural(self.noun).replace("_", " ")

    def of_kind(self, *kinds: str) -> list[Column]:
        return [column for column in self.columns if column.kind in kinds]

    def create_sql(self, rng: random.Random) -> str:
        """The CREATE TABLE statement, with the type names people use."""
        columns = ", ".join(f"{c.name} {rng.choice(SQL_TYPES[c.kind])}" for c in self.columns)
        return f"CREATE TABLE {self.name} ({columns});"


@dataclass(frozen=True)
class Schema:
    """One or two tables. Where `child_key` is set, `tables` are (parent, child) and it refers to the parent's id."""

    tables: tuple[Table, ...]
    child_key: str | None
    held_out: bool


def plural(noun: str) -> str:
    """The English plural of a regular noun."""
    if noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun + "s"


def random_word(rng: random.Random) -> str:
    """An invented lower-case word, so that the model must copy names and cannot recall them."""
    while True:
        word = spliced_word(rng) if rng.random() < 0.5 else syllable_word(rng)
        if len(word) > 2 and word not in words.RESERVED and not {word, plural(word)} & HELD_OUT_WORDS:
            return word


def syllable_word(rng: random.Random) -> str:
    return "".join(
        rng.choice(words.ONSETS) + rng.choice(words.VOWELS) + rng.choice(words.CODAS)
        for _ in range(rng.choice((1, 2, 2, 2)))
    )


def spliced_word(rng: random.Random) -> str:
    """The head of one English word and the tail of another: the spellings of real names, which syllables lack."""
    head, tail = rng.choice(words.SPLICED), rng.choice(words.SPLICED)
    middle = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 3))) if rng.random() < 0.3 else ""
    return head[: rng.randint(2, 6)] + middle + tail[-rng.randint(2, 6) :]


def random_noun(rng: random.Random) -> str:
    noun = random_word(rng) if rng.random() < 0.5 else rng.choice(words.TABLE_NOUNS)
    if rng.random() < 0.2:
        first = rng.choice(words.MODIFIERS) if rng.random() < 0.6 else random_word(rng)
        return f"{first}_{noun}"
    return noun


def random_column(rng: random.Random, kind: str) -> Column:
    if kind == "date":
        name = (
            rng.choice(words.DATE_WORDS)
            if rng.random() < 0.6
            else random_word(rng) + rng.choice(("_on", "_at", "_date", "_day", "ed", ""))
        )
        return Column(name, kind)
    if rng.random() < 0.5:
        name = random_word(rng)
        if rng.random() < 0.3:
            name += "_" + (random_word(rng) if rng.random() < 0.5 else rng.choice(words.TABLE_NOUNS))
        elif rng.random() < 0.3:
            name = plural(name)
        return Column(name, kind)
    if kind == "text":
        return Column(rng.choice(words.TEXT_WORDS), kind)
    name = rng.choice(words.NUMBER_WORDS)
    return Column(f"{rng.choice(words.NUMBER_PREFIXES)}_{name}" if rng.random() < 0.2 else name, kind)


def random_columns(rng: random.Random, num_columns: int) -> list[Column]:
    """Distinct random columns of mixed kinds, often with the `name` that most tables have."""
    columns = [Column("name", "text")] if rng.random() < 0.5 else []
    while len(columns) < num_columns:
        column = random_column(rng, rng.choice(("text", "text", "number", "number", "real", "date")))
        if column.name not in [c.name for c in columns]:
            columns.append(column)
    return columns


def build_table(rng: random.Random, noun: str, columns: list[Column], has_id: bool, key: str | None) -> Table:
    """Shuffles the columns, puts the id first and the foreign key anywhere, and names the table."""
    rng.shuffle(columns)
    if key is not None:
        columns.insert(rng.randint(0, len(columns)), Column(key, "key"))
    if has_id:
        columns.insert(0, Column("id", "id"))
    name = plural(noun) if noun in words.RESERVED or rng.random() < 0.8 else noun
    return Table(noun, name, tuple(columns))


def random_schema(rng: random.Random, num_tables: int) -> Schema:
    """A training schema. Two tables are always a parent and a child, since a join needs the link."""
    if num_tables == 1:
        columns = random_columns(rng, rng.randint(2, 6))
        return Schema((build_table(rng, random_noun(rng), columns, rng.random() < 0.8, None),), None, False)
    parent_noun, child_noun = random_noun(rng), random_noun(rng)
    while child_noun == parent_noun:
        child_noun = random_noun(rng)
    key = f"{parent_noun}_id"
    parent = build_table(rng, parent_noun, random_columns(rng, rng.randint(2, 4)), True, None)
    child = build_table(rng, child_noun, random_columns(rng, rng.randint(2, 4)), rng.random() < 0.8, key)
    return Schema((parent, child), key, False)


def held_out_schema(rng: random.Random, num_tables: int) -> Schema:
    """One of the hand-written schemas with its columns shuffled, whole or one of its tables alone."""
    parent_noun, parent_text, child_noun, child_text = rng.choice(HELD_OUT_SCHEMAS)
    key = f"{parent_noun}_id"
    parent = build_table(rng, parent_noun, parse_columns(parent_text), True, None)
    child = build_table(rng, child_noun, parse_columns(child_text), True, key if num_tables == 2 else None)
    if num_tables == 1:
        return Schema((rng.choice((parent, child)),), None, True)
    return Schema((parent, child), key, True)


def parse_columns(text: str) -> list[Column]:
    """Columns from the `name:kind` notation of `heldout.py`."""
    return [Column(*part.split(":")) for part in text.split()]


def random_text_value(rng: random.Random, held_out: bool) -> str:
    """A value for a text column: a known word, an invented one, two words, or a code such as K42."""

    def word() -> str:
        if rng.random() < 0.5:
            return rng.choice(HELD_OUT_VALUES if held_out else words.VALUES)
        made_up = random_word(rng)
        return made_up.capitalize() if rng.random() < 0.75 else made_up

    draw = rng.random()
    if draw < 0.05:
        return f"{rng.choice('ABCDEFGHKLMPRSTX')}{rng.randint(1, 999)}"
    return f"{word()} {word()}" if draw < 0.2 else word()
