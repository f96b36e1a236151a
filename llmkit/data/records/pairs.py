"""Rows of `seq2seq` and `embed`: a text and another that belongs to it."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from llmkit.data.records.classes import number_of
from llmkit.data.records.form import NUMBER, Form, average, holds_numbers, refused, require, unknown_form
from llmkit.data.records.names import NAMES
from llmkit.data.records.record import Fields, Record, Roles, Row, columns_of, plain, text_of
from llmkit.data.tables import short
from llmkit.recipe.labelled import Labelled

END_MARKS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "</s>", "<eos>", "<end_of_turn>")
"""How models' ends of text are spelt: some files have them in their texts, where they are no text."""
CUT = "texts that ended with a mark such as `<|endoftext|>` (taken off: the tokenizer adds its own)"
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z]{2,4})?")


def without_end(text: str, counts: Counter[str]) -> str:
    """The text without a mark of its end, which is counted; a text of nothing else stays."""
    mark = next((mark for mark in END_MARKS if text.rstrip().endswith(mark)), None)
    if mark is None or not text.rstrip().removesuffix(mark).strip():
        return text
    counts[CUT] += 1
    return text.rstrip().removesuffix(mark).rstrip(" ")


def recognise_seq2seq(sample: Sequence[Record], data: Labelled) -> Form:
    """The form of rows with a text to read and one to write.

    Raises:
        DataError: They are of none that is known.
    """
    columns = columns_of(sample)
    nested = sample[0].fields.get("translation")
    counts: Counter[str] = Counter()
    if data.form == "translation" or (data.form == "auto" and isinstance(nested, dict)):
        return _translation(sample, data, counts)
    roles = Roles(columns, data.columns, NAMES["seq2seq"])
    _by_place(roles, columns, ("source", "target"))
    require(roles, ("source", "target"), "seq2seq", sample, data.form)

    def row(fields: Fields) -> Row:
        return {
            "source": roles.text(fields, "source"),
            "target": without_end(roles.text(fields, "target"), counts),
        }

    return Form("columns", row, lambda rows: _said(roles, ("source", "target")), counts)


def recognise_embed(sample: Sequence[Record], data: Labelled) -> Form:
    """The form of rows whose texts are near to each other or far.

    Raises:
        DataError: They are of none that is known.
    """
    columns = columns_of(sample)
    roles = Roles(columns, data.columns, NAMES["embed"])
    if columns == ["1", "2", "3"] and not data.columns:
        # A third column without a name is a score, where it is a number. Else it may be anything, such as where a
        # row is from, and is a wrong document only if the recipe says so.
        if NUMBER.fullmatch(sample[0].fields["3"].strip()):
            roles.take("score", "3")
        elif data.form == "triplets":
            roles.take("negatives", "3")
    _by_place(roles, columns, ("anchor", "positive"))
    for role in ("anchor", "positive"):
        if columns[0] == "1" and role not in data.columns and holds_numbers(sample, roles.column(role)):
            raise unknown_form("embed", sample, role)
    require(roles, ("anchor", "positive"), "embed", sample, data.form)
    form = data.form
    if form == "auto":
        form = "triplets" if roles.has("negatives") else "scored" if roles.has("score") else "pairs"
    extra = {"triplets": "negatives", "scored": "score"}.get(form, "")
    require(roles, (extra,) if extra else (), "embed", sample, data.form)

    def row(fields: Fields) -> Row:
        made: Row = {"anchor": roles.text(fields, "anchor"), "positive": roles.text(fields, "positive")}
        if extra == "negatives":
            made["negatives"] = _negatives(roles, fields)
        elif extra == "score":
            made["score"] = number_of(roles.value(fields, "score"), roles.column("score"), "score")
        return made

    def said(rows: Sequence[Row]) -> str:
        used = ("anchor", "positive", extra) if extra else ("anchor", "positive")
        mean = average(sum(len(made.get("negatives", ())) for made in rows), len(rows))
        return _said(roles, used, form) + (f", {mean} negatives a row" if extra == "negatives" else "")

    return Form(form, row, said, expand=lambda record: _positives(record, roles))


def _translation(sample: Sequence[Record], data: Labelled, counts: Counter[str]) -> Form:
    """`{"translation": {"en": ..., "zh": ...}}`: from the first language to the second, or as `columns` say."""
    inner = sample[0].fields.get("translation")
    if not isinstance(inner, dict) or len(inner) < 2:
        raise unknown_form("seq2seq", sample, "", "translation")
    first, second = (str(name) for name in list(inner)[:2])
    source = data.columns.get("source", "").removeprefix("translation.")
    target = data.columns.get("target", "").removeprefix("translation.")
    source = source or (second if target == first else first)
    target = target or (first if source == second else second)
    roles = Roles(
        columns_of(sample), {"source": f"translation.{source}", "target": f"translation.{target}"}, {}
    )

    def row(fields: Fields) -> Row:
        return {
            "source": roles.text(fields, "source"),
            "target": without_end(roles.text(fields, "target"), counts),
        }

    return Form("translation", row, lambda rows: f"read as translation, {source} to {target}", counts)


def _by_place(roles: Roles, columns: Sequence[str], wanted: tuple[str, str]) -> None:
    """Columns without names, or with names of languages: the first two, in their order."""
    unnamed = list(columns) == [str(i + 1) for i in range(len(columns))] and len(columns) in (2, 3)
    languages = len(columns) == 2 and all(_LANGUAGE.fullmatch(plain(column)) for column in columns)
    if (unnamed or languages) and not roles.has(*wanted):
        free = [column for column in roles.columns if column in roles.unused]
        for role, column in zip((role for role in wanted if not roles.has(role)), free, strict=False):
            roles.take(role, column)


def _said(roles: Roles, used: Sequence[str], form: str = "columns") -> str:
    shown = ", ".join(f"{role} from `{roles.column(role)}`" for role in used)
    left = [column for column in roles.columns if column not in {roles.column(role) for role in used}]
    unused = f"; not used: {', '.join(f'`{column}`' for column in left)}" if left else ""
    return f"read as {form}: {shown}{unused}"


def _negatives(roles: Roles, fields: Fields) -> list[str]:
    value, column = roles.value(fields, "negatives"), roles.column("negatives")
    found = value if isinstance(value, list) else [value]
    if not found:
        raise refused(
            "no negatives", f"column {column!r} holds {short(value)}", "repair or remove the row", value
        )
    return [text_of(one, column, "negatives") for one in found]


def _positives(record: Record, roles: Roles) -> Iterator[Record]:
    """A row for each positive, where they come as a list."""
    column = roles.column("positive")
    value = record.fields.get(column)
    if not isinstance(value, list) or not value:
        yield record
        return
    for index, one in enumerate(value):
        where = f"{record.where}: {column}[{index}]" if len(value) > 1 else record.where
        yield Record(where, {**record.fields, column: one})
