"""The contract of a row format: which columns make a row one of it, and how it gives messages.

`conversation.read_conversation` makes an `Example` of the messages of every format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dora_vl.data.column_names import Row, parsed
from dora_vl.data.example import Example

Candidate = Mapping[str, str]
"""Maps columns that hold a role together to their labels, "" where there is none."""
Candidates = Mapping[str, Sequence[Candidate]]
"""Maps each role to the columns of a row that may hold it."""
Roles = Mapping[str, str]
"""Maps columns to the roles that `data.columns` gives them."""


@dataclass(frozen=True)
class Resolved:
    """A row by its roles: `fields` is what each holds, `uses` the role of each column, "" where it is left out."""

    format: RowFormat | None
    fields: Row
    uses: Mapping[str, str] = field(default_factory=dict)
    called: Mapping[str, str] = field(default_factory=dict)
    """Maps a role to the name of its column, as `data.columns` has it or in plain spelling."""

    def column_of(self, role: str) -> str:
        """Returns the first column that has a role."""
        return next((column for column, used_as in self.uses.items() if used_as == role), role)


@dataclass(frozen=True)
class RowFormat:
    """One form that a row can have.

    Attributes:
        needs: roles, each in a column that is not null.
        messages: reads what the roles hold as messages, each a `Turn` or an object of role and content.
        uses: further roles that it reads, besides `EVERYWHERE`.
        fits: what else makes a row one of this form, by its cells and columns.
        complete: adds what the row says besides its conversation.
        may_lack_question: a row without a question gets `data.ask`.
    """

    name: str
    needs: tuple[str, ...]
    messages: Callable[[Row], Sequence[object]]
    uses: tuple[str, ...] = ()
    fits: Callable[[Row, Candidates, Roles], bool] = lambda row, candidates, roles: True
    complete: Callable[[Example, Resolved], Example] = lambda example, resolved: example
    may_lack_question: bool = False


def ends_asking(row: Row, *_: object) -> bool:
    """Tells whether a row has messages of which the last is a user's."""
    values = [value for column in row.values() if isinstance(value := parsed(column), list) and value]
    last = [value[-1] for value in values if isinstance(value[-1], Mapping)]
    return any(message.get("role", message.get("from")) in ("user", "human") for message in last)
