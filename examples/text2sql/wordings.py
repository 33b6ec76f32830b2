"""English for the small parts of a question: conditions, aggregates, and ways to ask.

Where a table has two lists, the first is used in training and the second only in the held-out wordings.
"""

SHOW = (
    "show",
    "show me",
    "list",
    "give me",
    "find",
    "display",
    "return",
    "get",
    "what are",
    "tell me",
    "I want",
    "I need",
    "please list",
    "please show me",
    "can you list",
    "can you give me",
    "could you show",
    "print",
)
WHAT_IS = (
    "what is",
    "what's",
    "show",
    "give me",
    "tell me",
    "find",
    "calculate",
    "compute",
    "get",
    "return",
    "I want to know",
    "I need",
    "can you tell me",
    "please give me",
    "could you find",
    "show me",
)

AGGREGATES = {
    "AVG": ("average", "average", "mean"),
    "SUM": ("total", "total", "combined", "summed"),
    "MIN": ("minimum", "lowest", "smallest"),
    "MAX": ("maximum", "highest", "largest", "biggest"),
}
DIRECTIONS = {
    "ASC": (
        "in ascending order",
        "from lowest to highest",
        "ascending",
        "in increasing order",
        "lowest first",
        "from smallest to largest",
    ),
    "DESC": (
        "in descending order",
        "from highest to lowest",
        "descending",
        "in decreasing order",
        "highest first",
        "from largest to smallest",
    ),
}
EXTREMES = {"DESC": ("highest", "largest", "biggest", "greatest", "most"), "ASC": ("lowest", "smallest", "least")}
SUPERLATIVES = {"MAX": ("highest", "largest", "biggest", "maximum"), "MIN": ("lowest", "smallest", "minimum")}

EQUALS = (
    (
        "whose {c} is {v}",
        "with {c} {v}",
        "where {c} is {v}",
        "where the {c} is {v}",
        "that have {c} {v}",
        "with {c} equal to {v}",
        "where {c} equals {v}",
        "having {c} {v}",
        "for which the {c} is {v}",
        "where {c} = {v}",
        "with the {c} {v}",
        "that have the {c} {v}",
        "whose {c} equals {v}",
        "for which {c} is {v}",
        "with a {c} equal to {v}",
        "having a {c} equal to {v}",
    ),
    ("with a {c} of {v}", "in which {c} is {v}", "that have {c} equal to {v}"),
)
COMPARES = (
    (
        "whose {c} is {op} {v}",
        "with {c} {op} {v}",
        "where {c} is {op} {v}",
        "where the {c} is {op} {v}",
        "that have {c} {op} {v}",
        "with a {c} {op} {v}",
        "having {c} {op} {v}",
        "for which the {c} is {op} {v}",
        "with a {c} of {op} {v}",
        "having {c} of {op} {v}",
        "for which {c} is {op} {v}",
        "that have {c} {op} {v}",
    ),
    ("that have a {c} {op} {v}", "in which {c} is {op} {v}", "having a {c} of {op} {v}"),
)
NUMBER_OPERATORS = {
    ">": ("greater than", "more than", "above", "over", "higher than", "larger than", ">"),
    "<": ("less than", "below", "under", "lower than", "smaller than", "<"),
    ">=": ("at least", "no less than", "greater than or equal to", ">="),
    "<=": ("at most", "no more than", "less than or equal to", "<="),
}
DATE_OPERATORS = {
    ">": ("after", "later than"),
    "<": ("before", "earlier than"),
    ">=": ("on or after",),
    "<=": ("on or before",),
}
NOT_EQUALS = (
    (
        "whose {c} is not {v}",
        "where {c} is not {v}",
        "with {c} other than {v}",
        "with a {c} different from {v}",
        "where the {c} is not {v}",
        "whose {c} is different from {v}",
        "where {c} does not equal {v}",
        "that do not have {c} {v}",
        "where {c} != {v}",
        "in which the {c} is not {v}",
        "with a {c} other than {v}",
        "for which {c} is different from {v}",
        "that have a {c} other than {v}",
    ),
    ("where {c} is other than {v}", "for which the {c} is not {v}", "whose {c} does not equal {v}"),
)
BETWEENS = (
    (
        "whose {c} is between {v} and {w}",
        "with {c} between {v} and {w}",
        "where {c} is between {v} and {w}",
        "with a {c} from {v} to {w}",
        "where the {c} is in the range {v} to {w}",
        "with {c} in the range {v} to {w}",
        "whose {c} is from {v} to {w}",
        "that have a {c} between {v} and {w}",
        "in which {c} is between {v} and {w}",
        "for which the {c} is between {v} and {w}",
        "having {c} from {v} to {w}",
    ),
    (
        "having a {c} between {v} and {w}",
        "for which the {c} is from {v} to {w}",
        "whose {c} is in the range {v} to {w}",
    ),
)
EITHERS = (
    (
        "whose {c} is {v} or {w}",
        "with {c} {v} or {w}",
        "where {c} is either {v} or {w}",
        "where {c} is {v} or {w}",
        "whose {c} is either {v} or {w}",
        "with {c} in {v}, {w}",
        "where the {c} is one of {v} and {w}",
        "that have {c} {v} or {w}",
        "in which the {c} is {v} or {w}",
        "for which {c} is either {v} or {w}",
        "with a {c} of {v} or {w}",
    ),
    ("for which the {c} is {v} or {w}", "with a {c} of either {v} or {w}", "whose {c} is one of {v} and {w}"),
)
LIKES = {
    "{v}%": (
        (
            "whose {c} starts with {v}",
            "where {c} starts with {v}",
            "with {c} starting with {v}",
            "where the {c} begins with {v}",
            "whose {c} begins with {v}",
            "that have a {c} starting with {v}",
        ),
        ("with a {c} that begins with {v}", "for which the {c} starts with {v}"),
    ),
    "%{v}": (
        (
            "whose {c} ends with {v}",
            "where {c} ends with {v}",
            "with {c} ending with {v}",
            "where the {c} ends in {v}",
            "whose {c} ends in {v}",
            "that have a {c} ending in {v}",
        ),
        ("with a {c} that ends in {v}", "for which the {c} ends with {v}"),
    ),
    "%{v}%": (
        (
            "whose {c} contains {v}",
            "where {c} contains {v}",
            "with {c} containing {v}",
            "with {v} in the {c}",
            "where the {c} includes {v}",
            "that have {v} in their {c}",
            "whose {c} includes {v}",
        ),
        ("with a {c} that contains {v}", "for which the {c} includes {v}", "having {v} in the {c}"),
    ),
}
NULLS = (
    (
        "with no {c}",
        "without a {c}",
        "whose {c} is missing",
        "where {c} is null",
        "that have no {c}",
        "where the {c} is empty",
        "whose {c} is not set",
        "where {c} is unknown",
        "in which the {c} is missing",
        "for which {c} is unknown",
        "having no {c}",
    ),
    ("for which the {c} is missing", "that are without a {c}", "whose {c} is null"),
)
NOT_NULLS = (
    (
        "that have a {c}",
        "whose {c} is not null",
        "where {c} is not null",
        "where the {c} is known",
        "with a known {c}",
        "whose {c} is set",
        "where {c} is not missing",
        "in which {c} is known",
        "for which {c} is not null",
        "having a {c}",
    ),
    ("for which the {c} is known", "where the {c} is set", "with a {c} that is not null"),
)
YEARS = (
    (
        "with {c} in {v}",
        "whose {c} is in {v}",
        "where {c} is in {v}",
        "with a {c} in the year {v}",
        "where the {c} is in {v}",
        "whose {c} is in the year {v}",
        "that have a {c} in {v}",
        "in which the {c} is in {v}",
        "for which {c} is in {v}",
        "having a {c} in the year {v}",
    ),
    ("having {c} in {v}", "for which the {c} is in the year {v}"),
)
PLACES = (
    ("in {v}", "from {v}", "in {v}", "based in {v}", "located in {v}", "that are in {v}", "that are from {v}"),
    ("that are based in {v}", "that come from {v}"),
)
