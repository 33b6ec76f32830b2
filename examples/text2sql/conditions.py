"""Conditions: one column, one comparison, its SQL and its English."""

import random
from dataclasses import dataclass

import wordings
import words
from schemas import Column, Table, random_text_value

Forms = tuple[str, ...]


@dataclass(frozen=True)
class Condition:
    """A WHERE clause and its English: after a noun ("whose age is 9") and as what the noun does ("have age 9").

    `values` are literals worth planting in the column's test rows.
    """

    column: Column
    sql: str
    english: str
    verb: str
    values: tuple[str | int | float, ...]


def quote(value: str) -> str:
    """An SQL string literal."""
    return "'" + value.replace("'", "''") + "'"


def spoken(rng: random.Random, value: str) -> str:
    """A text value as typed in a question: bare, or in either kind of quotes."""
    draw = rng.random()
    return value if draw < 0.7 else f"'{value}'" if draw < 0.85 else f'"{value}"'


def random_number(rng: random.Random, kind: str) -> int | float:
    """A number of any size; round ones are as common as people make them."""
    digits = rng.randint(1, 5)
    value = rng.randint(1, 10**digits)
    if value > 100 and rng.random() < 0.5:
        value = round(value, -(len(str(value)) - 1)) or 100
    return value + rng.choice((0.5, 0.25, 0.1, 0.75)) if kind == "real" and rng.random() < 0.5 else value


def random_date(rng: random.Random) -> str:
    return f"{rng.randint(1990, 2026)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


class ConditionMaker:
    """Makes conditions on the columns of one table. `prefix` qualifies column names in joins ("" or "table.")."""

    def __init__(self, rng: random.Random, table: Table, prefix: str, held_out_wording: bool, held_out_values: bool):
        self.rng, self.table, self.prefix = rng, table, prefix
        self.held_out_wording, self.held_out_values = held_out_wording, held_out_values

    def make(self, form: str, column: Column) -> Condition:
        """The condition called `form` ("equals", "compare", ...) on `column`; KeyError for an unknown form."""
        makers = {
            "equals": self._equals,
            "compare": self._compare,
            "not_equals": self._not_equals,
            "between": self._between,
            "either": self._either,
            "like": self._like,
            "null": self._null,
            "not_null": self._not_null,
            "year": self._year,
        }
        return makers[form](column)

    def simple(self, column: Column) -> Condition:
        """The condition that people most often put on a column of this kind."""
        return self.make("equals" if column.kind in ("text", "id", "key") else "compare", column)

    def _text(self) -> str:
        return random_text_value(self.rng, self.held_out_values)

    def _literal(self, column: Column) -> tuple[str | int | float, str, str]:
        """A value for the column, its SQL literal and its form in the question."""
        if column.kind == "text":
            value = self._text()
            return value, quote(value), spoken(self.rng, value)
        if column.kind == "date":
            value = random_date(self.rng)
            return value, quote(value), value
        number = random_number(self.rng, column.kind)
        return number, str(number), str(number)

    def _build(
        self, column: Column, sql: str, forms: tuple[Forms, Forms], values: tuple = (), **parts: str
    ) -> Condition:
        """The condition, worded by one of `forms` (training, held out) with `parts` put in."""
        phrase = self.rng.choice(forms[1] if self.held_out_wording else forms[0])
        verb = self.rng.choice([form for form in forms[0] if form.startswith("that ")]).removeprefix("that ")
        parts["c"] = column.phrase
        return Condition(
            column, f"{self.prefix}{column.name} {sql}", phrase.format(**parts), verb.format(**parts), values
        )

    def _equals(self, column: Column) -> Condition:
        value, literal, said = self._literal(column)
        # "in Paris" names no column, so it is only asked where a single column can be meant.
        places = [c for c in self.table.columns if c.name in words.PLACE_WORDS]
        forms = wordings.PLACES if places == [column] and self.rng.random() < 0.4 else wordings.EQUALS
        return self._build(column, f"= {literal}", forms, (value,), v=said)

    def _compare(self, column: Column) -> Condition:
        value, literal, said = self._literal(column)
        operators = wordings.DATE_OPERATORS if column.kind == "date" else wordings.NUMBER_OPERATORS
        operator = self.rng.choice(list(operators))
        spoken_operator = self.rng.choice(operators[operator])
        return self._build(column, f"{operator} {literal}", wordings.COMPARES, (value,), op=spoken_operator, v=said)

    def _not_equals(self, column: Column) -> Condition:
        value, literal, said = self._literal(column)
        return self._build(column, f"<> {literal}", wordings.NOT_EQUALS, (value,), v=said)

    def _between(self, column: Column) -> Condition:
        low, high = self._literal(column), self._literal(column)
        while low[0] == high[0]:
            high = self._literal(column)
        low, high = sorted((low, high), key=lambda literal: literal[0])
        sql = f"BETWEEN {low[1]} AND {high[1]}"
        return self._build(column, sql, wordings.BETWEENS, (low[0], high[0]), v=low[2], w=high[2])

    def _either(self, column: Column) -> Condition:
        first, second = self._literal(column), self._literal(column)
        sql = f"IN ({first[1]}, {second[1]})"
        return self._build(column, sql, wordings.EITHERS, (first[0], second[0]), v=first[2], w=second[2])

    def _like(self, column: Column) -> Condition:
        value = self._text()
        if self.rng.random() < 0.5:
            value = value[: self.rng.randint(1, 3)].strip()
        shape = self.rng.choice(list(wordings.LIKES))
        # Planted values with something before and after the text tell the three shapes apart.
        planted = (value, value + "x", "x" + value, f"x{value}x")
        return self._build(
            column, f"LIKE {quote(shape.format(v=value))}", wordings.LIKES[shape], planted, v=spoken(self.rng, value)
        )

    def _null(self, column: Column) -> Condition:
        return self._build(column, "IS NULL", wordings.NULLS)

    def _not_null(self, column: Column) -> Condition:
        return self._build(column, "IS NOT NULL", wordings.NOT_NULLS)

    def _year(self, column: Column) -> Condition:
        year = self.rng.randint(1990, 2026)
        return self._build(column, f"LIKE '{year}-%'", wordings.YEARS, (f"{year}-03-01", f"{year}-11-30"), v=str(year))
