"""Query patterns that count, aggregate, group or compare with an aggregate. See `patterns.py` for the notation."""

from patterns import Pattern

# The ways to count under a condition serve several patterns.
COUNT = (
    "how many {table} are there {where}",
    "how many {table} {where} are there",
    "{what} the number of {table} {where}",
    "count the {table} {where}",
    "count {table} {where}",
    "how many {table} {where}",
    "number of {table} {where}",
    "{what} the count of {table} {where}",
    "how many {table} do we have {where}",
)
COUNT_HELD_OUT = (
    "{what} the total number of {table} {where}",
    "how many are the {table} {where}",
    "count how many {table} there are {where}",
    "how many of the {table} {have}",
)

COUNTING = (
    Pattern(
        "count",
        "SELECT COUNT(*) FROM {table}",
        (
            "how many {table} are there",
            "{what} the number of {table}",
            "count all {table}",
            "count the {table}",
            "how many {table} do we have",
            "{what} the count of {table}",
            "how many {table} are there in total",
            "number of {table}",
            "how many rows are there in {table}",
        ),
        ("{what} the total number of {table}", "count how many {table} we have"),
    ),
    Pattern("count_where", "SELECT COUNT(*) FROM {table} WHERE {where}", COUNT, COUNT_HELD_OUT),
    Pattern("count_compare", "SELECT COUNT(*) FROM {table} WHERE {where}", COUNT, COUNT_HELD_OUT, "compare"),
    Pattern("count_between", "SELECT COUNT(*) FROM {table} WHERE {where}", COUNT, COUNT_HELD_OUT, "between"),
    Pattern("count_not_equal", "SELECT COUNT(*) FROM {table} WHERE {where}", COUNT, COUNT_HELD_OUT, "not_equals"),
    Pattern("count_null", "SELECT COUNT(*) FROM {table} WHERE {where}", COUNT, COUNT_HELD_OUT, "null"),
    Pattern("count_year", "SELECT COUNT(*) FROM {table} WHERE {where}", COUNT, COUNT_HELD_OUT, "year"),
    Pattern(
        "count_in_place",
        "SELECT COUNT(*) FROM {table} WHERE {place_column} = {place}",
        (
            "how many {table} work in {place}",
            "how many {table} are in {place}",
            "how many {table} live in {place}",
            "how many {table} are based in {place}",
            "how many {table} come from {place}",
        ),
        ("how many of the {table} work in {place}", "how many of the {table} are in {place}"),
    ),
    Pattern(
        "count_distinct",
        "SELECT COUNT(DISTINCT {g}) FROM {table}",
        (
            "how many different {g} values do {table} have",
            "how many distinct {g} values are there in {table}",
            "{what} the number of different {g} of {table}",
            "count the distinct {g} values of {table}",
            "how many unique {g} values are there for {table}",
            "{what} the number of unique {g} values in {table}",
        ),
        ("count how many different {g} values {table} have", "{what} the count of distinct {g} in {table}"),
    ),
)

AGGREGATING = (
    Pattern(
        "aggregate",
        "SELECT {agg}({n}) FROM {table}",
        (
            "{what} the {agg} {n} of all {table}",
            "{what} the {agg} {n} of {table}",
            "{what} the {agg} {n} for {table}",
            "{what} the {agg} {n} over all {table}",
            "{agg} {n} of {table}",
            "{what} the {agg} of {n} for all {table}",
            "{what} the {agg} {n}",
            "for all {table}, {what} the {agg} {n}",
        ),
        ("{what} the {agg} {n} across {table}", "{what} the {agg} value of {n} of {table}"),
    ),
    Pattern(
        "aggregate_where",
        "SELECT {agg}({n}) FROM {table} WHERE {where}",
        (
            "{what} the {agg} {n} of {table} {where}",
            "{what} the {agg} {n} for {table} {where}",
            "for {table} {where}, {what} the {agg} {n}",
            "{what} the {agg} {n} of all {table} {where}",
            "{agg} {n} of {table} {where}",
            "{what} the {agg} of {n} for {table} {where}",
        ),
        ("{what} the {agg} {n} over all {table} {where}", "{what} the {agg} value of {n} for {table} {where}"),
    ),
    Pattern(
        "range",
        "SELECT MIN({n}), MAX({n}) FROM {table}",
        (
            "{what} the lowest and highest {n} of {table}",
            "{what} the minimum and maximum {n} of all {table}",
            "{what} the smallest and largest {n} of {table}",
            "{what} the min and max {n} for {table}",
            "{what} both the minimum and the maximum {n} of {table}",
        ),
        ("{what} the minimum {n} and the maximum {n} of {table}", "for {table}, {what} the lowest and the highest {n}"),
    ),
    Pattern(
        "group_count",
        "SELECT {g}, COUNT(*) FROM {table} GROUP BY {g}",
        (
            "how many {table} are there {each}",
            "{show} the number of {table} {each}",
            "count the {table} {each}",
            "{each}, how many {table} are there",
            "{show} each {g} with its number of {table}",
            "how many {table} does each {g} have",
            "{show} the count of {table} {each}",
            "number of {table} {each}",
        ),
        ("{each}, {show} the number of {table}", "{show} each {g} and how many {table} it has"),
    ),
    Pattern(
        "group_count_where",
        "SELECT {g}, COUNT(*) FROM {table} WHERE {where} GROUP BY {g}",
        (
            "how many {table} {where} are there {each}",
            "{show} the number of {table} {where} {each}",
            "count the {table} {where} {each}",
            "{each}, how many {table} {where} are there",
        ),
        ("{each}, {show} the number of {table} {where}", "{show} the count of {table} {where}, {each}"),
    ),
    Pattern(
        "group_aggregate",
        "SELECT {g}, {agg}({n}) FROM {table} GROUP BY {g}",
        (
            "{what} the {agg} {n} of {table} {each}",
            "{show} the {agg} {n} {each} in {table}",
            "{each}, {what} the {agg} {n} of {table}",
            "{show} each {g} with the {agg} {n} of its {table}",
            "{what} the {agg} {n} {each} of {table}",
            "{show} the {agg} {n} of the {table} {each}",
        ),
        ("{show} each {g} and the {agg} {n} of its {table}", "{each}, {show} the {agg} {n} for {table}"),
    ),
    Pattern(
        "having_count",
        "SELECT {g} FROM {table} GROUP BY {g} HAVING COUNT(*) > {k}",
        (
            "which {g} values have more than {k} {table}",
            "{show} the {g} values with more than {k} {table}",
            "{show} each {g} that has more than {k} {table}",
            "{show} every {g} with more than {k} {table}",
            "which {g} has over {k} {table}",
            "for which {g} are there more than {k} {table}",
        ),
        ("{show} the {g} values that have over {k} {table}", "which {g} values are there with more than {k} {table}"),
    ),
    Pattern(
        "having_aggregate",
        "SELECT {g} FROM {table} GROUP BY {g} HAVING {agg}({n}) > {v}",
        (
            "which {g} values have {table} with {agg} {n} above {v}",
            "{show} the {g} values where the {agg} {n} of {table} is more than {v}",
            "{show} each {g} whose {table} have a {agg} {n} greater than {v}",
            "for which {g} is the {agg} {n} of {table} over {v}",
            "{show} every {g} of {table} with {agg} {n} above {v}",
            "which {g} of {table} has a {agg} {n} higher than {v}",
        ),
        (
            "{show} the {g} values for which the {agg} {n} of {table} is above {v}",
            "which {g} has {table} with a {agg} {n} over {v}",
        ),
    ),
    Pattern(
        "most_common",
        "SELECT {g} FROM {table} GROUP BY {g} ORDER BY COUNT(*) DESC LIMIT 1",
        (
            "{what} the most common {g} of {table}",
            "which {g} has the most {table}",
            "{what} the most frequent {g} in {table}",
            "which {g} do most {table} have",
            "{what} the {g} with the most {table}",
            "which {g} is the most common for {table}",
        ),
        ("which is the most frequent {g} of {table}", "{what} the {g} that has the most {table}"),
    ),
)

NESTED = (
    Pattern(
        "extreme",
        "SELECT {a} FROM {table} WHERE {n} = (SELECT {max}({n}) FROM {table})",
        (
            "{what} the {a} of the {one} with the {max} {n}",
            "{what} the {a} of the {table} with the {max} {n}",
            "which {one} has the {max} {n}? {show} the {a}",
            "{show} the {a} of the {one} that has the {max} {n}",
            "for the {one} with the {max} {n}, {what} the {a}",
            "which {a} has the {one} with the {max} {n}",
        ),
        ("{show} the {a} for the {one} having the {max} {n}", "what {a} does the {one} with the {max} {n} have"),
    ),
    Pattern(
        "versus_average",
        "SELECT {a} FROM {table} WHERE {n} {than} (SELECT AVG({n}) FROM {table})",
        (
            "{show} the {a} of {table} with {than} average {n}",
            "{show} the {a} of {table} whose {n} is {than} the average",
            "{show} the {a} of all {table} with a {n} {than} the average {n}",
            "which {a} have {table} with {n} {than} the average",
            "for {table} with a {n} {than} average, {show} the {a}",
            "{show} the {a} of {table} where the {n} is {than} average",
        ),
        (
            "{show} the {a} for {table} where {n} is {than} the average",
            "{show} the {a} of every {one} whose {n} is {than} average",
        ),
    ),
    Pattern(
        "count_versus_average",
        "SELECT COUNT(*) FROM {table} WHERE {n} {than} (SELECT AVG({n}) FROM {table})",
        (
            "how many {table} have a {n} {than} the average",
            "how many {table} have {than} average {n}",
            "count the {table} with {n} {than} the average",
            "{what} the number of {table} whose {n} is {than} average",
            "how many {table} are there with a {n} {than} the average {n}",
        ),
        ("count the {table} whose {n} is {than} the average", "how many {table} are there whose {n} is {than} average"),
    ),
)
