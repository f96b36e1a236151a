"""A record, the columns of it that play a part, and its values, checked."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llmkit.data.places import Fault
from llmkit.data.tables import checked_text, pick, short
from llmkit.registry import nearest

Row = dict[str, Any]
Fields = Mapping[str, Any]
MOST_NAMES = 20


class Record(NamedTuple):
    """One row as it stands in its file.

    Attributes:
        where: Its place, `reviews.csv:17`.
        fields: Its values by column.
    """

    where: str
    fields: dict[str, Any]


def plain(name: object) -> str:
    """A column's name as names are compared: small letters, `_` for blanks and hyphens."""
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")


def columns_of(sample: Iterable[Record]) -> list[str]:
    """All columns of some records, in the order in which they come."""
    return list(dict.fromkeys(str(name) for record in sample for name in record.fields))


def named_columns(fields: Fields, prefix: str = "") -> list[str]:
    """The columns of one record, those of objects in it with dots."""
    names: list[str] = []
    for name, value in fields.items():
        names.append(prefix + str(name))
        if isinstance(value, Mapping):
            names += named_columns(value, f"{prefix}{name}.")
    return names


class Roles:
    """Which column plays which role: as the recipe says, else by the columns' names.

    Args:
        columns: The columns there are.
        asked: The recipe's `columns`.
        names: By role, the names that it usually has, the likeliest first.
    """

    def __init__(
        self, columns: Sequence[str], asked: Mapping[str, str], names: Mapping[str, Sequence[str]]
    ) -> None:
        self.columns = list(columns)
        self._found = dict(asked)
        there = {plain(column): column for column in reversed(self.columns)}
        for role, usual in names.items():
            taken = set(self._found.values())
            order = usual if role in usual else (role, *usual)
            likely = (there[name] for name in order if name in there)
            column = next((column for column in likely if column not in taken), None)
            if column is not None:
                self._found.setdefault(role, column)

    def has(self, *roles: str) -> bool:
        """Whether each role has its column."""
        return all(role in self._found for role in roles)

    def column(self, role: str) -> str:
        """The column of a role."""
        return self._found.get(role, role)

    def take(self, role: str, column: str) -> None:
        """Give a role its column, unless it has one."""
        self._found.setdefault(role, column)

    @property
    def unused(self) -> list[str]:
        """Columns that play no role."""
        used = {column.partition(".")[0] for column in self._found.values()} | set(self._found.values())
        return [column for column in self.columns if column not in used]

    def get(self, fields: Fields, role: str) -> Any:
        """The value of a role, None where the record has none."""
        column = self._found.get(role)
        if column is None:
            return None
        if column in fields:
            return fields[column]
        return self.value(fields, role) if "." in column else None

    def value(self, fields: Fields, role: str) -> Any:
        """The value of a role.

        Raises:
            Fault: The record has no such column.
        """
        column = self.column(role)
        if column in fields:
            return fields[column]
        try:
            return pick(fields, column)
        except Fault as fault:
            there = named_columns(fields)
            guess = nearest(column, there) or "NAME"
            hint = f"repair the row, or say which column it is: `columns: {{{role}: {guess}}}`"
            raise Fault(f"no column {column!r}", fault.what, hint=hint, value=fault.value) from fault

    def text(self, fields: Fields, role: str) -> str:
        """The text of a role, with the blanks around it.

        Raises:
            Fault: There is no such column, it holds no text, or only blanks.
        """
        return text_of(self.value(fields, role), self.column(role), role)


def text_of(value: Any, column: str, role: str) -> str:
    """The value, if it is a text that says something.

    Raises:
        Fault: It is not.
    """
    if not isinstance(value, str):
        kind = "nothing" if value is None else f"of type {type(value).__name__}"
        raise Fault(
            "missing value" if value is None else "not text",
            f"column {column!r} holds {short(value)}, which is {kind}, not text",
            hint=f"repair or remove the row (`on_error: skip` leaves such rows out), or name another column: "
            f"`columns: {{{role}: ...}}`",
            value=short(value),
        )
    if not value or value.isspace():
        raise Fault(
            "empty text",
            f"column {column!r} is empty",
            hint="repair or remove the row; `on_error: skip` leaves such rows out",
            value=short(value),
        )
    return checked_text(value, column)
