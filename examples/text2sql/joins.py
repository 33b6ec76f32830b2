"""Query patterns over two tables. See `patterns.py` for the notation and `slots.py` for the slots."""

from patterns import Pattern

JOIN = "FROM {child} JOIN {parent} ON {child}.{key} = {parent}.id"

JOIN_PATTERNS = (
    Pattern(
        "join_columns",
        "SELECT {ca}, {pa} " + JOIN,
        (
            "{show} the {ca} of each {child_one} and the {pa} of its {parent_one}",
            "{show} the {ca} of all {child} with the {pa} of their {parent_one}",
            "{show} every {child_one} {ca} together with the {parent_one} {pa}",
            "for each {child_one}, {show} its {ca} and the {pa} of its {parent_one}",
            "{show} the {child_one} {ca} and the {parent_one} {pa}",
            "{show} the {ca} of every {child_one} and the {parent_one} {pa}",
            "for all {child}, {show} the {ca} together with the {pa} of the {parent_one}",
        ),
        (
            "{show} the {ca} of every {child_one} together with the {pa} of its {parent_one}",
            "for each {child_one}, {show} the {ca} and the {parent_one} {pa}",
        ),
    ),
    Pattern(
        "join_where",
        "SELECT {ca} " + JOIN + " WHERE {pwhere}",
        (
            "{show} the {ca} of {child} of {parent} {pwhere}",
            "{show} the {ca} of {child} that belong to {parent} {pwhere}",
            "{show} the {ca} of all {child} of the {parent_one} {pwhere}",
            "for {parent} {pwhere}, {show} the {ca} of their {child}",
            "what is the {ca} of the {child} of {parent} {pwhere}",
            "{show} the {ca} of every {child_one} of the {parent_one} {pwhere}",
            "for the {parent_one} {pwhere}, what are the {ca} of the {child}",
            "{show} the {ca} of all {child} that belong to {parent} {pwhere}",
        ),
        (
            "{show} the {ca} of all {child} that belong to the {parent_one} {pwhere}",
            "for the {parent_one} {pwhere}, {show} the {ca} of its {child}",
        ),
    ),
    Pattern(
        "join_parent_where",
        "SELECT {pa} " + JOIN + " WHERE {cwhere}",
        (
            "{show} the {pa} of the {parent} of {child} {cwhere}",
            "{show} the {parent_one} {pa} for {child} {cwhere}",
            "for {child} {cwhere}, {show} the {pa} of their {parent_one}",
            "what is the {pa} of the {parent_one} of {child} {cwhere}",
            "for each of the {child} {cwhere}, {show} the {parent_one} {pa}",
            "for every {child_one} {cwhere}, {show} the {pa} of its {parent_one}",
            "{show} the {pa} of the {parent_one} of every {child_one} {cwhere}",
            "for all {child} {cwhere}, {show} the {pa} of the {parent_one}",
            "{show} the {parent_one} {pa} of all {child} {cwhere}",
        ),
        (
            "for all {child} {cwhere}, {show} the {parent_one} {pa}",
            "{show} the {pa} of the {parent_one} for {child} {cwhere}",
        ),
    ),
    Pattern(
        "join_count",
        "SELECT COUNT(*) " + JOIN + " WHERE {pwhere}",
        (
            "how many {child} belong to {parent} {pwhere}",
            "how many {child} do {parent} {pwhere} have",
            "{what} the number of {child} of {parent} {pwhere}",
            "count the {child} of the {parent_one} {pwhere}",
            "how many {child} does the {parent_one} {pwhere} have",
            "{what} the total number of {child} that belong to {parent} {pwhere}",
            "count how many {child} the {parent_one} {pwhere} has",
            "how many of the {child} belong to the {parent_one} {pwhere}",
        ),
        (
            "count the {child} that belong to {parent} {pwhere}",
            "{what} the number of {child} of the {parent_one} {pwhere}",
        ),
    ),
    Pattern(
        "join_aggregate",
        "SELECT {agg}({cn}) " + JOIN + " WHERE {pwhere}",
        (
            "{what} the {agg} {cn} of {child} of {parent} {pwhere}",
            "{what} the {agg} {cn} of {child} that belong to {parent} {pwhere}",
            "for {parent} {pwhere}, {what} the {agg} {cn} of their {child}",
            "{what} the {agg} {cn} of all {child} of the {parent_one} {pwhere}",
            "for the {parent_one} {pwhere}, {what} the {agg} {cn} of the {child}",
            "{what} the {agg} value of {cn} of {child} that belong to the {parent_one} {pwhere}",
            "{what} the {agg} {cn} of the {child} of the {parent_one} {pwhere}",
        ),
        (
            "{what} the {agg} {cn} of the {child} that belong to the {parent_one} {pwhere}",
            "for the {parent_one} {pwhere}, {what} the {agg} {cn} of its {child}",
        ),
    ),
    Pattern(
        "join_group_count",
        "SELECT {pg}, COUNT(*) " + JOIN + " GROUP BY {pg}",
        (
            "how many {child} are there for each {parent_one} {pg}",
            "{show} the {pg} of each {parent_one} and its number of {child}",
            "{show} the number of {child} per {parent_one} {pg}",
            "for each {parent_one} {pg}, how many {child} are there",
            "count the {child} by {parent_one} {pg}",
            "{show} each {parent_one} {pg} with its number of {child}",
            "for each {parent_one} {pg}, count the {child}",
            "{what} the total number of {child} for each {parent_one} {pg}",
            "{show} the count of {child} by {parent_one} {pg}",
        ),
        (
            "for each {parent_one} {pg}, {show} the number of {child}",
            "{show} the count of {child} for each {parent_one} {pg}",
        ),
    ),
    Pattern(
        "join_group_aggregate",
        "SELECT {pg}, {agg}({cn}) " + JOIN + " GROUP BY {pg}",
        (
            "{what} the {agg} {cn} of {child} for each {parent_one} {pg}",
            "{show} the {pg} of each {parent_one} and the {agg} {cn} of its {child}",
            "{show} the {agg} {cn} of {child} per {parent_one} {pg}",
            "for each {parent_one} {pg}, {what} the {agg} {cn} of its {child}",
            "{show} each {parent_one} {pg} with the {agg} {cn} of its {child}",
            "for each {parent_one} {pg}, {show} the {agg} {cn} of all its {child}",
            "{what} the {agg} {cn} of the {child} for every {parent_one} {pg}",
            "{show} the {agg} {cn} of {child} by {parent_one} {pg}",
        ),
        (
            "for each {parent_one} {pg}, {show} the {agg} {cn} of {child}",
            "{show} the {agg} {cn} of the {child} by {parent_one} {pg}",
        ),
    ),
    Pattern(
        "join_most",
        "SELECT {pg} " + JOIN + " GROUP BY {pg} ORDER BY COUNT(*) DESC LIMIT 1",
        (
            "which {parent_one} {pg} has the most {child}",
            "{what} the {pg} of the {parent_one} with the most {child}",
            "{what} the {parent_one} {pg} with the most {child}",
            "{show} the {pg} of the {parent_one} that has the most {child}",
            "for which {parent_one} {pg} do we have the most {child}",
            "{show} the {parent_one} {pg} with the most {child}",
        ),
        (
            "{show} the {parent_one} {pg} that has the most {child}",
            "for which {parent_one} {pg} are there the most {child}",
        ),
    ),
    Pattern(
        "without_children",
        "SELECT {pb} FROM {parent} WHERE id NOT IN (SELECT {key} FROM {child} WHERE {key} IS NOT NULL)",
        (
            "{show} the {pb} of {parent} without {child}",
            "{show} the {pb} of {parent} that have no {child}",
            "{show} the {pb} of all {parent} with no {child}",
            "which {parent} have no {child}? {show} the {pb}",
            "for {parent} without any {child}, {show} the {pb}",
            "for all {parent} that have no {child}, {show} the {pb}",
            "{show} the {pb} of every {parent_one} without {child}",
        ),
        ("{show} the {pb} for {parent} that are without {child}", "for {parent} that have no {child}, {show} the {pb}"),
    ),
    Pattern(
        "with_children",
        "SELECT {pb} FROM {parent} WHERE id IN (SELECT {key} FROM {child})",
        (
            "{show} the {pb} of {parent} that have {child}",
            "{show} the {pb} of {parent} with at least one {child_one}",
            "{show} the {pb} of all {parent} that have at least one {child_one}",
            "which {parent} have {child}? {show} the {pb}",
            "for {parent} that have any {child}, {show} the {pb}",
            "for all {parent} with {child}, {show} the {pb}",
            "{show} the {pb} for every {parent_one} that has {child}",
        ),
        (
            "{show} the {pb} for {parent} with {child}",
            "for {parent} that have at least one {child_one}, {show} the {pb}",
        ),
    ),
)
