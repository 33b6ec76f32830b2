"""Test databases in SQLite: random rows for a schema, and whether two queries answer the same."""

import random
import sqlite3
from contextlib import closing

from conditions import random_date, random_number
from generate import Example
from schemas import Column, Table, random_text_value

NUM_ROWS = 40
NULL_SHARE = 0.08
PLANTED_SHARE = 0.35
MAX_STEPS = 2_000_000  # of SQLite's virtual machine; a runaway query counts as wrong
Row = tuple[object, ...]


def random_cell(rng: random.Random, column: Column, row_number: int, planted: list, pool: list) -> object:
    """One value: the row number for an id, else NULL, a literal of the question, or one of a small pool."""
    if column.kind == "id":
        return row_number
    if rng.random() < NULL_SHARE:
        return None
    if planted and rng.random() < PLANTED_SHARE:
        return rng.choice(planted)
    return rng.choice(pool)


def make_pool(rng: random.Random, column: Column) -> list:
    """Values the column draws from; text repeats often, so that groups have several rows."""
    if column.kind == "text":
        return [random_text_value(rng, False) for _ in range(5)]
    if column.kind == "date":
        return [random_date(rng) for _ in range(25)]
    if column.kind == "key":
        return list(range(1, NUM_ROWS // 2))
    return [random_number(rng, column.kind) for _ in range(20)]


def neighbours(values: list) -> list:
    """The values and, for numbers, the next ones below and above, which tell `>` from `>=`."""
    return [
        v for value in values for v in ([value] if isinstance(value, str) else [value - 1, value, value, value + 1])
    ]


def fill_table(rng: random.Random, connection: sqlite3.Connection, table: Table, example: Example) -> None:
    planted = {
        c.name: neighbours([v for t, name, v in example.planted if (t, name) == (table.name, c.name)])
        for c in table.columns
    }
    pools = {c.name: make_pool(rng, c) for c in table.columns}
    rows = [
        [random_cell(rng, c, number, planted[c.name], pools[c.name]) for c in table.columns]
        for number in range(1, NUM_ROWS + 1)
    ]
    marks = ", ".join("?" * len(table.columns))
    connection.executemany(f"INSERT INTO {table.name} VALUES ({marks})", rows)


def build(example: Example, seed: int) -> sqlite3.Connection:
    """An in-memory database with the example's tables and random rows."""
    connection = sqlite3.connect(":memory:")
    for statement in split_statements(example.schema_text):
        connection.execute(statement)
    rng = random.Random(f"rows-{seed}")
    for table in example.schema.tables:
        fill_table(rng, connection, table, example)
    connection.execute("PRAGMA query_only = ON")
    return connection


def split_statements(schema_text: str) -> list[str]:
    """One statement a line, with or without the semicolon."""
    return [line for line in schema_text.splitlines() if line.strip()]


def run(connection: sqlite3.Connection, sql: str) -> list[Row]:
    """The rows of one query. Raises sqlite3.Error for bad SQL and for a query that takes too long."""
    steps = iter(range(MAX_STEPS // 10_000))
    connection.set_progress_handler(lambda: next(steps, None) is None, 10_000)
    return connection.execute(sql).fetchall()


def same_answer(example: Example, sql: str, num_databases: int = 3) -> bool:
    """Whether `sql` gives the gold query's rows on several random databases.

    The order of rows counts only where the gold query has ORDER BY. Raises sqlite3.Error if the gold query fails.
    """
    if sql.lstrip()[:6].upper() != "SELECT":
        return False
    for seed in range(num_databases):
        with closing(build(example, seed)) as connection:
            gold = run(connection, example.sql)
            try:
                answer = run(connection, sql)
            except (sqlite3.Error, sqlite3.Warning):
                return False
        if "ORDER BY" not in example.sql:
            gold, answer = sorted(gold, key=repr), sorted(answer, key=repr)
        if gold != answer:
            return False
    return True
