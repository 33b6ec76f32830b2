"""What a query pattern is: the SQL of one kind of query and the ways to ask for it.

The patterns are in `selections.py`, `aggregations.py` and `joins.py`. Each is a template; `slots.py` says what each
slot stands for. `wordings` are for training; `held_out` ones are used in the held-out split and nowhere else.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """One kind of query. `form` says what condition (`conditions.ConditionMaker.make`) the where slots hold."""

    name: str
    sql: str
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]
    form: str = "simple"

    @property
    def is_join(self) -> bool:
        return "{parent}" in self.sql
