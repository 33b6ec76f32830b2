"""Fills a pattern's slots from a schema: once for the SQL, once for the English."""

import random
import string

import wordings
import words
from conditions import Condition, ConditionMaker, quote, random_number, spoken
from patterns import Pattern
from schemas import Column, Schema, Table, plural, random_text_value

THAN = {
    ">": ("above", "higher than", "greater than", "more than", "over"),
    "<": ("below", "lower than", "less than", "under"),
}
EACH = ("for each {g}", "per {g}", "by {g}", "for every {g}", "grouped by {g}")
VALUE_KINDS = ("text", "number", "real", "date")
FORM_KINDS = {
    "simple": VALUE_KINDS,
    "equals": VALUE_KINDS,
    "compare": ("number", "real", "date"),
    "not_equals": ("text", "text", "number"),
    "between": ("number", "real", "date"),
    "either": ("text", "text", "number"),
    "like": ("text",),
    "null": VALUE_KINDS,
    "not_null": VALUE_KINDS,
    "year": ("date",),
}


class NoFit(Exception):
    """The schema has no column for a slot; the caller draws another schema."""


class Filler:
    """Chooses what one pattern is about. Owns the columns already used, so that no slot repeats another's column."""

    def __init__(self, rng: random.Random, schema: Schema, pattern: Pattern, held_out_wording: bool):
        self.rng, self.schema, self.pattern, self.held_out_wording = rng, schema, pattern, held_out_wording
        self.sql: dict[str, str] = {}
        self.english: dict[str, str] = {}
        self.planted: list[tuple[str, str, str | int | float]] = []
        self._used: set[tuple[str, str]] = set()

    def fill(self) -> None:
        """Fills every slot of the SQL and the English ones that go with them. Raises NoFit."""
        table = None
        if self.pattern.is_join:
            self._name_joined_tables()
        else:
            table = self.rng.choice(self.schema.tables)
            self._put("table", table.name, table.phrase)
            self.english["one"] = table.noun.replace("_", " ")
        # Columns that are asked for come before conditions, which take what is left.
        slots = [name for _, name, _, _ in string.Formatter().parse(self.pattern.sql) if name and name not in self.sql]
        for slot in sorted(dict.fromkeys(slots), key=lambda name: "where" in name):
            self._fill_slot(slot, table)
        self.english["show"] = self.rng.choice(wordings.SHOW)
        self.english["what"] = self.rng.choice(wordings.WHAT_IS)

    def _put(self, slot: str, sql: str, english: str) -> None:
        self.sql[slot], self.english[slot] = sql, english

    def _name_joined_tables(self) -> None:
        if self.schema.child_key is None:
            raise NoFit
        for role, table in zip(("parent", "child"), self.schema.tables, strict=True):
            self._put(role, table.name, table.phrase)
            self.english[f"{role}_one"] = table.noun.replace("_", " ")
        self.sql["key"] = self.schema.child_key

    def _fill_slot(self, slot: str, table: Table | None) -> None:
        """Fills one slot of the SQL; without a table, the slot's first letter says which joined table it is of."""
        if slot in ("agg", "max", "dir", "most", "than", "k", "v"):
            self._fill_word(slot)
            return
        prefix = ""
        if table is None:
            table = self.schema.tables[0 if slot[0] == "p" else 1]
            prefix, slot_kind = f"{table.name}.", slot[1:]
            if slot == "pb":  # a parent's column in a query that names one table in FROM
                prefix = ""
        else:
            slot_kind = slot
        if slot_kind in ("where", "where2"):
            self._fill_condition(slot, table, prefix)
        elif slot_kind == "place_column":
            self._fill_place(table)
        elif slot_kind != "place":
            kinds = {"a": VALUE_KINDS, "b": VALUE_KINDS, "g": ("text",), "n": ("number", "real")}[slot_kind]
            column = self._column(table, kinds)
            several = slot_kind in ("a", "b") and self.rng.random() < 0.3
            self._put(slot, prefix + column.name, plural(column.phrase) if several else column.phrase)
            if slot == "g":
                self.english["each"] = self.rng.choice(EACH).format(g=column.phrase)

    def _fill_word(self, slot: str) -> None:
        if slot in ("k", "v"):
            number = str(self.rng.randint(2, 12) if slot == "k" else random_number(self.rng, "number"))
            self._put(slot, number, number)
            return
        choices = {
            "agg": wordings.AGGREGATES,
            "max": wordings.SUPERLATIVES,
            "dir": wordings.DIRECTIONS,
            "most": wordings.EXTREMES,
            "than": THAN,
        }[slot]
        sql = self.rng.choice(list(choices))
        self._put(slot, sql, self.rng.choice(choices[sql]))

    def _column(self, table: Table, kinds: tuple[str, ...]) -> Column:
        free = [column for column in table.of_kind(*kinds) if (table.name, column.name) not in self._used]
        if not free:
            raise NoFit
        column = self.rng.choice(free)
        self._used.add((table.name, column.name))
        return column

    def _fill_condition(self, slot: str, table: Table, prefix: str) -> None:
        form = self.pattern.form
        column = self._column(table, FORM_KINDS[form])
        # A held-out wording is a new sentence; half of the time its condition is worded in a new way as well.
        new_phrase = self.held_out_wording and self.rng.random() < 0.5
        maker = ConditionMaker(self.rng, table, prefix, new_phrase, self.schema.held_out)
        if form == "simple" and column.kind in ("number", "real") and self.rng.random() < 0.3:
            condition: Condition = maker.make("equals", column)
        else:
            condition = maker.simple(column) if form == "simple" else maker.make(form, column)
        self._put(slot, condition.sql, condition.english)
        self.english[slot.replace("where", "have")] = condition.verb
        self.planted.extend((table.name, column.name, value) for value in condition.values)

    def _fill_place(self, table: Table) -> None:
        places = [column for column in table.columns if column.name in words.PLACE_WORDS]
        if len(places) != 1:
            raise NoFit
        value = random_text_value(self.rng, self.schema.held_out)
        self.sql["place_column"] = places[0].name
        self._put("place", quote(value), spoken(self.rng, value))
        self.planted.append((table.name, places[0].name, value))
