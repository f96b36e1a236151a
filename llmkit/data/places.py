"""Documents, where they were found, and what is done when a row or a file is no text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import DataError

MOST_EXAMPLES = 20
_LONGEST_EXAMPLE = 200
_COUNT_BYTES = 2**22


class Fault(Exception):  # noqa: N818 (never leaves this package: it becomes a DataError or a count)
    """A row or a file that cannot be used.

    Attributes:
        reason: What kind of fault, for counting: `broken JSON`.
        what: What is wrong with this one, without its place.
        hint: What would work.
        value: The row, or the start of it.
        suffix: What the place gets appended, such as `:13` for a column.
    """

    def __init__(self, reason: str, what: str, *, hint: str = "", value: str = "", suffix: str = "") -> None:
        super().__init__(what)
        self.reason = reason
        self.what = what
        self.hint = hint
        self.value = value
        self.suffix = suffix

    def error(self, where: str) -> DataError:
        """The same as an error for a person."""
        return DataError(f"{where}{self.suffix}: {self.what}", hint=self.hint)


class FileFault(DataError):  # noqa: N818 (the pair of Fault)
    """A file, or a stretch of one, that cannot be used; the message names it.

    Attributes:
        reason: What kind of fault, for counting: `damaged .gz data`.
    """

    def __init__(self, message: str, *, hint: str = "", reason: str = "unreadable") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class Place:
    """Where rows come from: shows the place of each by its number, and works it out only then.

    Args:
        name: The file as messages show it.
        sign: What stands between the name and the number.
        path: The file on disk, where lines before `start` can be counted; None where they cannot.
        start: The byte at which the numbers begin.
        before: How many rows lie before `start`, if that is known.
        bare_first: The first row of the file is shown as the file.
    """

    __slots__ = ("_bare_first", "_before", "_path", "_start", "name", "sign")

    def __init__(
        self,
        name: str,
        *,
        sign: str = ":",
        path: str | None = None,
        start: int = 0,
        before: int | None = None,
        bare_first: bool = False,
    ) -> None:
        self.name = name
        self.sign = sign
        self._path = path
        self._start = start
        self._before = 0 if before is None and start == 0 else before
        self._bare_first = bare_first

    def show(self, number: int | None) -> str:
        """The place of a row, `web.jsonl:17`; without a number, the file."""
        if number is None:
            return self.name
        if self._before is None:
            count_before([self])
            if self._before is None:
                return f"{self.name}: line {number} after byte {self._start:,}"
        number += self._before
        return self.name if self._bare_first and number == 1 else f"{self.name}{self.sign}{number}"

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON; `Place(**json)` is the same again."""
        return {
            "name": self.name,
            "sign": self.sign,
            "path": self._path,
            "start": self._start,
            "before": self._before,
            "bare_first": self._bare_first,
        }


def count_before(places: Iterable[Place]) -> None:
    """Count the lines before each place that does not know them yet, in one pass of each file for all of them."""
    wanted: dict[str, list[Place]] = {}
    for place in places:
        if place._before is None and place._path is not None:
            wanted.setdefault(place._path, []).append(place)
    for path, waiting in wanted.items():
        at, found = 0, 0
        for place in sorted(waiting, key=lambda one: one._start):
            more = _count_lines(Path(path), at, place._start)
            if more is None:
                break
            at, found = place._start, found + more
            place._before = found


class Document:
    """One document: its text, and where it was found (`books/a.txt` or `web.jsonl:17`).

    Attributes:
        text: The text.
        place: Where it comes from, or where it is.
        number: Its number there.
        is_row: It is a table's row or a web page, which is cut into pieces where it is very long.
    """

    __slots__ = ("is_row", "number", "place", "text")

    def __init__(
        self, text: str, place: Place | str, number: int | None = None, *, is_row: bool = False
    ) -> None:
        self.text = text
        self.place = place
        self.number = number
        self.is_row = is_row

    @property
    def where(self) -> str:
        """Where it was found; worked out when asked for, which may mean to count the lines of a file."""
        return self.place if isinstance(self.place, str) else self.place.show(self.number)

    def __repr__(self) -> str:
        return f"Document({self.text!r}, {self.where!r})"


@dataclass
class Example:
    """One skipped row or file, to show."""

    place: Place
    number: int | None
    reason: str
    what: str
    value: str
    hint: str = ""

    @property
    def where(self) -> str:
        """Where it was found."""
        return self.place.show(self.number)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON, the place not yet worked out."""
        return {**vars(self), "place": self.place.as_json()}


@dataclass
class Tally:
    """What reading met.

    Attributes:
        bytes_read: Bytes taken from disk.
        documents: Documents given, none of them blank.
        empty_files: Files of no bytes.
        empty_documents: Blank documents, passed over.
        skipped_rows: Rows that were skipped, by reason.
        skipped_files: Files, or cut-off stretches of them, that were skipped, by reason.
        examples: The first few of what was skipped.
    """

    bytes_read: int = 0
    documents: int = 0
    empty_files: int = 0
    empty_documents: int = 0
    skipped_rows: dict[str, int] = field(default_factory=dict)
    skipped_files: dict[str, int] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    @property
    def num_skipped(self) -> int:
        """Rows and files skipped."""
        return sum(self.skipped_rows.values()) + sum(self.skipped_files.values())

    def skip_row(self, fault: Fault, place: Place, number: int) -> None:
        """Count a row that is left out."""
        self.skipped_rows[fault.reason] = self.skipped_rows.get(fault.reason, 0) + 1
        if len(self.examples) < MOST_EXAMPLES:
            value = fault.value[:_LONGEST_EXAMPLE].encode("utf-8", "replace").decode()
            self.examples.append(Example(place, number, fault.reason, fault.what, value, fault.hint))

    def skip_file(self, fault: FileFault, place: Place) -> None:
        """Count a file, or a stretch of one, that is left out."""
        self.skipped_files[fault.reason] = self.skipped_files.get(fault.reason, 0) + 1
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append(Example(place, None, fault.reason, fault.message, "", fault.hint))

    def add(self, other: "Tally") -> None:
        """Add what another reader met; tallies are added in the order of the parts."""
        self.bytes_read += other.bytes_read
        self.documents += other.documents
        self.empty_files += other.empty_files
        self.empty_documents += other.empty_documents
        for mine, theirs in (
            (self.skipped_rows, other.skipped_rows),
            (self.skipped_files, other.skipped_files),
        ):
            for reason, count in theirs.items():
                mine[reason] = mine.get(reason, 0) + count
        self.examples = (self.examples + other.examples)[:MOST_EXAMPLES]

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON, see `from_json`."""
        counts = {name: value for name, value in vars(self).items() if name != "examples"}
        return {**counts, "examples": [example.as_json() for example in self.examples]}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Tally":
        """The tally that `as_json` gave."""
        examples = [
            Example(**{**example, "place": Place(**example["place"])}) for example in stored["examples"]
        ]
        return cls(**{**stored, "examples": examples})

    def shown(self) -> dict[str, Any]:
        """What was skipped, for a report: counts by reason and examples with their places worked out."""
        count_before(example.place for example in self.examples)
        return {
            "empty_files": self.empty_files,
            "empty_documents": self.empty_documents,
            "rows": dict(self.skipped_rows),
            "files": dict(self.skipped_files),
            "examples": [
                {
                    "where": example.where,
                    "reason": example.reason,
                    "what": example.what,
                    "value": example.value,
                }
                for example in self.examples
            ],
        }


@dataclass(frozen=True)
class Faults:
    """What is done with the faults of one place: `on_error` of the recipe.

    Attributes:
        place: Where the rows come from.
        tally: Counts what is skipped.
        skip: Whether faults are skipped; else they are errors.
        marked: Whether bytes that are no text come marked (`text.decode`), to be looked for in each row.
    """

    place: Place
    tally: Tally
    skip: bool = False
    marked: bool = False

    def row(self, number: int, fault: Fault) -> None:
        """Skip the row and count it.

        Raises:
            DataError: Faults are not to be skipped.
        """
        if not self.skip:
            raise fault.error(self.place.show(number)) from fault
        self.tally.skip_row(fault, self.place, number)

    def file(self, fault: FileFault) -> None:
        """Skip the file, or the rest of the stretch that is being read, and count it.

        Raises:
            DataError: Faults are not to be skipped.
        """
        if not self.skip:
            raise fault
        self.tally.skip_file(fault, self.place)


def _count_lines(path: Path, start: int, stop: int) -> int | None:
    """Line ends in the file's bytes from `start` to `stop`; None if it can no longer be read."""
    found = 0
    try:
        with path.open("rb") as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(stop - start, _COUNT_BYTES))):
                found += chunk.count(b"\n")
                start += len(chunk)
    except OSError:
        return None
    return found
