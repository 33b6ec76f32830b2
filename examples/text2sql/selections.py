"""Query patterns that select rows or columns of one table. See `patterns.py` for the notation."""

from patterns import Pattern


def with_second_condition(texts: tuple[str, ...], word: str) -> tuple[str, ...]:
    """The same wordings with a second condition after the first, joined by "and" or "or"."""
    return tuple(
        text.replace("{where}", f"{{where}} {word} {{where2}}").replace("{have}", f"{{have}} {word} {{have2}}")
        for text in texts
    )


# The ways to ask for rows and for a column under a condition serve many patterns.
ROWS = (
    "{show} all {table} {where}",
    "{show} the {table} {where}",
    "which {table} are there {where}",
    "{show} everything about {table} {where}",
    "{show} every {one} {where}",
    "{table} {where}",
    "{show} all columns of {table} {where}",
    "{show} all the {table} {where}",
    "which {table} {have}",
    "{show} those {table} {where}",
    "{show} any {table} {where}",
    "{show} each {one} {where}",
    "{show} all of the {table} {where}",
)
ROWS_HELD_OUT = ("{show} all details of {table} {where}", "which are the {table} {where}", "what {table} {have}")
COLUMN = (
    "{show} the {a} of {table} {where}",
    "{show} the {a} of all {table} {where}",
    "what is the {a} of {table} {where}",
    "{show} the {a} for {table} {where}",
    "for {table} {where}, {show} the {a}",
    "what {a} do {table} {where} have",
    "{show} {a} of {table} {where}",
    "{show} {a} for all {table} {where}",
    "{a} of {table} {where}",
    "what are the {a} values of {table} {where}",
    "which {table} {have}? {show} the {a}",
    "{show} the {one} {a} of all {table} {where}",
    "{show} the {a} for every {one} {where}",
    "for each {one} {where}, {show} the {a}",
    "what {a} does every {one} {where} have",
    "{show} the {a} of those {table} {where}",
    "{show} the {a} of any {one} {where}",
)
COLUMN_HELD_OUT = (
    "{show} the {a} of every {one} {where}",
    "for all {table} {where}, what is the {a}",
    "{show} the {a} of each of the {table} {where}",
)
SELECTING = (
    Pattern(
        "all_rows",
        "SELECT * FROM {table}",
        (
            "{show} all {table}",
            "{show} everything in {table}",
            "{show} all the {table}",
            "{show} every {one}",
            "{show} all columns of {table}",
            "{show} all rows of {table}",
            "{show} the {table}",
            "{show} all details of {table}",
            "{show} the whole table of {table}",
            "{show} each of the {table}",
            "{show} all of the {table}",
        ),
        ("{show} everything about all {table}", "{show} all rows and columns of {table}"),
    ),
    Pattern(
        "one_column",
        "SELECT {a} FROM {table}",
        (
            "{show} the {a} of all {table}",
            "{show} the {a} of every {one}",
            "{show} the {a} of {table}",
            "{show} the {a} for each {one}",
            "{show} {a} of {table}",
            "what {a} does each {one} have",
            "for every {one}, {show} the {a}",
            "{show} all the {a} values of {table}",
            "{show} only the {a} of {table}",
            "{show} the {a} of each of the {table}",
            "what are the {a} of the {table}",
            "for all the {table}, {show} the {a}",
        ),
        ("{show} the {a} for all the {table}", "what is the {a} of each {one}"),
    ),
    Pattern(
        "two_columns",
        "SELECT {a}, {b} FROM {table}",
        (
            "{show} the {a} and {b} of all {table}",
            "{show} the {a} and the {b} of every {one}",
            "{show} {a} and {b} of {table}",
            "{show} {a}, {b} for all {table}",
            "{show} the {a} and {b} for each {one}",
            "for each {one}, {show} the {a} and the {b}",
            "what are the {a} and {b} of {table}",
            "{show} {a} and also {b} of every {one}",
            "{show} both the {a} and the {b} of {table}",
            "for the {table}, {show} {a} and {b}",
        ),
        ("{show} both {a} and {b} of {table}", "for all {table}, {show} {a} and {b}"),
    ),
    Pattern(
        "distinct",
        "SELECT DISTINCT {g} FROM {table}",
        (
            "{show} the distinct {g} of {table}",
            "{show} the different {g} values of {table}",
            "{show} the unique {g} values in {table}",
            "which different {g} values do {table} have",
            "{show} all distinct values of {g} in {table}",
            "{show} every {g} of {table} without duplicates",
            "{show} unique {g} of {table}",
            "what distinct {g} values are there for {table}",
            "{show} all the different values of {g} in {table}",
            "which unique {g} values are there for {table}",
        ),
        ("{show} all the unique values of {g} for {table}", "which distinct {g} are there in {table}"),
    ),
    Pattern(
        "sorted",
        "SELECT {a} FROM {table} ORDER BY {n} {dir}",
        (
            "{show} the {a} of all {table} ordered by {n} {dir}",
            "{show} the {a} of {table} sorted by {n} {dir}",
            "sort the {a} of {table} by {n} {dir}",
            "{show} {a} of {table}, sorted by {n} {dir}",
            "{show} the {a} of every {one} by {n} {dir}",
            "order the {a} of {table} by {n} {dir}",
            "{show} the {a} for all {table} in order of {n}, {dir}",
            "by {n} {dir}, {show} the {a} of all {table}",
            "ordered by {n} {dir}, {show} {a} of {table}",
            "{show} the {a} for {table} ordered by {n}, {dir}",
            "{show} the {a} of each {one}, sorted by {n} {dir}",
        ),
        ("{show} the {a} for each {one}, ordered by {n} {dir}", "sorted by {n} {dir}, {show} the {a} of {table}"),
    ),
    Pattern(
        "top",
        "SELECT {a} FROM {table} ORDER BY {n} {most} LIMIT {k}",
        (
            "{show} the {a} of the {k} {table} with the {most} {n}",
            "{show} the {k} {table} with the {most} {n} by {a}",
            "for the {k} {table} with the {most} {n}, {show} the {a}",
            "what is the {a} of the {k} {table} with {most} {n}",
            "{show} {a} of the {k} {table} that have the {most} {n}",
            "which {k} {a} of {table} have the {most} {n}",
            "{show} the {a} for the {k} {table} having the {most} {n}",
            "{show} the {a} of all those {table} that are the {k} with the {most} {n}",
            "for the {k} {table} that have the {most} {n}, {show} the {a}",
            "what are the {a} of the {k} {table} having the {most} {n}",
        ),
        (
            "{show} the {a} of those {k} {table} that have the {most} {n}",
            "what {a} do the {k} {table} with the {most} {n} have",
        ),
    ),
    Pattern(
        "top_rows",
        "SELECT * FROM {table} ORDER BY {n} {most} LIMIT {k}",
        (
            "{show} the {k} {table} with the {most} {n}",
            "which {k} {table} have the {most} {n}",
            "{show} all columns of the {k} {table} with the {most} {n}",
            "which are the {k} {table} with the {most} {n}",
            "{show} {k} {table} with the {most} {n}",
            "{show} the {k} {table} having the {most} {n}",
            "{show} the {k} {table} that have the {most} {n}",
            "what are the {k} {table} that have the {most} {n}",
            "which are those {k} {table} with the {most} {n}",
            "{show} every one of the {k} {table} with {most} {n}",
        ),
        ("{show} those {k} {table} that have the {most} {n}", "what {k} {table} have the {most} {n}"),
    ),
)

FILTERING = (
    Pattern("rows_where", "SELECT * FROM {table} WHERE {where}", ROWS, ROWS_HELD_OUT),
    Pattern("column_where", "SELECT {a} FROM {table} WHERE {where}", COLUMN, COLUMN_HELD_OUT),
    Pattern("column_compare", "SELECT {a} FROM {table} WHERE {where}", COLUMN, COLUMN_HELD_OUT, "compare"),
    Pattern(
        "columns_where",
        "SELECT {a}, {b} FROM {table} WHERE {where}",
        (
            "{show} the {a} and {b} of {table} {where}",
            "{show} the {a} and the {b} of all {table} {where}",
            "for {table} {where}, {show} the {a} and {b}",
            "{show} {a} and {b} for {table} {where}",
            "what are the {a} and {b} of {table} {where}",
            "{show} {a}, {b} of {table} {where}",
            "{show} both the {a} and the {b} of {table} {where}",
            "{show} the {a} and {b} of every {one} {where}",
            "for each {one} {where}, {show} {a} and {b}",
            "for all {table} {where}, {show} both {a} and {b}",
        ),
        ("{show} the {a} and {b} for every {one} {where}", "for all {table} {where}, {show} the {a} and the {b}"),
    ),
    Pattern("not_equal", "SELECT {a} FROM {table} WHERE {where}", COLUMN, COLUMN_HELD_OUT, "not_equals"),
    Pattern("between", "SELECT {a} FROM {table} WHERE {where}", COLUMN, COLUMN_HELD_OUT, "between"),
    Pattern("either", "SELECT {a} FROM {table} WHERE {where}", COLUMN, COLUMN_HELD_OUT, "either"),
    Pattern("like", "SELECT {a} FROM {table} WHERE {where}", COLUMN, COLUMN_HELD_OUT, "like"),
    Pattern("is_null", "SELECT {a} FROM {table} WHERE {where}", COLUMN, COLUMN_HELD_OUT, "null"),
    Pattern("is_not_null", "SELECT {a} FROM {table} WHERE {where}", COLUMN, COLUMN_HELD_OUT, "not_null"),
    Pattern("in_year", "SELECT {a} FROM {table} WHERE {where}", COLUMN, COLUMN_HELD_OUT, "year"),
    Pattern("rows_like", "SELECT * FROM {table} WHERE {where}", ROWS, ROWS_HELD_OUT, "like"),
    Pattern(
        "both",
        "SELECT {a} FROM {table} WHERE {where} AND {where2}",
        with_second_condition(COLUMN, "and"),
        with_second_condition(COLUMN_HELD_OUT, "and"),
    ),
    Pattern(
        "any_of",
        "SELECT {a} FROM {table} WHERE {where} OR {where2}",
        with_second_condition(COLUMN, "or"),
        with_second_condition(COLUMN_HELD_OUT, "or"),
    ),
    Pattern(
        "sorted_where",
        "SELECT {a} FROM {table} WHERE {where} ORDER BY {n} {dir}",
        (
            "{show} the {a} of {table} {where}, ordered by {n} {dir}",
            "{show} the {a} of all {table} {where} sorted by {n} {dir}",
            "for {table} {where}, {show} the {a} sorted by {n} {dir}",
            "{show} {a} of {table} {where}, sorted by {n} {dir}",
            "by {n} {dir}, {show} the {a} of {table} {where}",
            "ordered by {n} {dir}, {show} {a} of the {table} {where}",
            "{show} the {a} of every {one} {where}, sorted by {n} {dir}",
            "{show} the {a} for all {table} {where}, in order of {n} {dir}",
        ),
        (
            "{show} the {a} for {table} {where} ordered by {n} {dir}",
            "sorted by {n} {dir}, {show} the {a} of {table} {where}",
        ),
    ),
)
