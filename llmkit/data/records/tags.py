"""Rows of `tag`: words, and a tag for each.

**Source**: the BIO tags of Tjong Kim Sang and Veenstra 1999, "Representing Text Chunks", section 2 (IOB1, IOB2);
BIOES as in Ratinov and Roth 2009, "Design Challenges and Misconceptions in Named Entity Recognition", section 4.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from llmkit.data.records.form import Form, counted, refused, require
from llmkit.data.records.names import NAMES
from llmkit.data.records.record import Fields, Record, Roles, Row, columns_of
from llmkit.data.tables import checked_text, short
from llmkit.recipe.labelled import Labelled

OUTSIDE = "O"
_ORDER = "BIMELSU"
BARE = "tags inside an entity that did not begin (read as its beginning, as seqeval does)"


def recognise_tag(sample: Sequence[Record], data: Labelled) -> Form:
    """The form of rows with tags.

    Raises:
        DataError: They are of none that is known.
    """
    columns = columns_of(sample)
    roles = Roles(columns, data.columns, NAMES["tag"])
    if columns == [str(i + 1) for i in range(len(columns))] and len(columns) > 1:
        roles.take("tokens", columns[0])
        roles.take("tags", columns[-1])
    require(roles, ("tokens", "tags"), "tag", sample, data.form)
    counts: Counter[str] = Counter()

    def row(fields: Fields) -> Row:
        tokens = _list(roles.value(fields, "tokens"), roles.column("tokens"), "tokens")
        tags = _list(roles.value(fields, "tags"), roles.column("tags"), "tags")
        _check_lengths(tokens, tags)
        counts[BARE] += num_bare(tags)
        return {"tokens": tokens, "tags": tags}

    return Form(
        "columns", row, lambda rows: f"read as words and tags{_scheme(rows)}", counts, label_key="tags"
    )


def split_tag(tag: str) -> tuple[str, str]:
    """The mark and the type of a tag: `B-person` is `B` and `person`, `NOUN` has no mark."""
    mark, sign, kind = tag.partition("-")
    return (mark, kind) if sign and len(mark) == 1 and mark in _ORDER else ("", tag)


def tag_key(tag: str) -> tuple[bool, str, int, str]:
    """Sorts tags: `O`, then by type, and those of a type as they follow each other in a text."""
    mark, kind = split_tag(tag)
    return tag != OUTSIDE, kind, _ORDER.find(mark) if mark else -1, tag


def completed(tags: Sequence[str]) -> tuple[str, ...]:
    """The tags with those that their scheme has besides: `I-X` where there is `B-X`, and others that any type has.

    A type that came as single words only in the training rows may come as several elsewhere.
    """
    parts = [split_tag(tag) for tag in tags if tag != OUTSIDE]
    marks = dict.fromkeys(mark for mark, _ in parts if mark)
    marks |= {"I": None} if "B" in marks else {}
    made = [f"{mark}-{kind}" for mark, kind in parts if mark for mark in marks]
    return tuple(sorted({*tags, *made}, key=tag_key))


def num_bare(tags: Sequence[str]) -> int:
    """How many tags are `I-X` (or `E-X`, `L-X`) where no tag of `X` goes before."""
    before, bare = "", 0
    for tag in tags:
        mark, kind = split_tag(tag)
        bare += mark in ("I", "M", "E", "L") and before != kind
        before = kind if mark in ("B", "I", "M") else ""
    return bare


def _list(value: Any, column: str, role: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise refused(
            "no list",
            f"column {column!r} holds {short(value)}, which is no list of {role}",
            f"a row has two lists of one length, tokens and tags; name another column: `columns: {{{role}: ...}}`",
            value,
        )
    made = [str(one) if isinstance(one, int) and role == "tags" else one for one in value]
    for place, one in enumerate(made):
        if not isinstance(one, str) or not one or one.isspace():
            raise refused(
                f"empty {role[:-1]}",
                f"column {column!r} holds {short(one)} at place {place + 1}, which is no {role[:-1]}",
                "repair or remove the row; `on_error: skip` leaves such rows out",
                one,
            )
        checked_text(one, column)
    return made


def _check_lengths(tokens: Sequence[str], tags: Sequence[str]) -> None:
    if len(tokens) != len(tags):
        raise refused(
            "tokens and tags differ in length",
            f"{counted(len(tokens), 'token')} and {counted(len(tags), 'tag')}",
            "each token has one tag; repair or remove the row",
            " ".join(tokens),
        )


def _scheme(rows: Sequence[Row]) -> str:
    """What the tags are, in words."""
    tags = {tag for row in rows for tag in row["tags"]}
    marks = {split_tag(tag)[0] for tag in tags}
    kinds = {split_tag(tag)[1] for tag in tags if tag != OUTSIDE}
    if marks == {""}:
        return f", {counted(len(kinds), 'tag')} without marks of beginning and inside"
    known = (("BIOES", "ES"), ("BILOU", "LU"), ("BIO", "B"))
    scheme = next((name for name, signs in known if marks & set(signs)), "IO")
    return f", {scheme}, {counted(len(kinds), 'type')}"
