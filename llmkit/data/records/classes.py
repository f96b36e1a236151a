"""Rows of `cls` and `regression`: a text or two, and a label or a number."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llmkit.data.records.form import Form, average, counted, refused, require, unknown_form
from llmkit.data.records.names import NAMES
from llmkit.data.records.record import Fields, Record, Roles, Row, columns_of, text_of
from llmkit.data.tables import short
from llmkit.errors import DataError
from llmkit.recipe.labelled import Labelled

_FASTTEXT = "__label__"
_DECIMAL = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+")
_WHOLE = re.compile(r"[-+]?[0-9]+")
_NOTHING = ("", "nan")
DISAGREE = "texts that stand there with different labels"
_DIGITS = re.compile(r"([0-9]+)")


def recognise_cls(sample: Sequence[Record], data: Labelled) -> Form:
    """The form of rows with classes.

    Raises:
        DataError: They are of none that is known.
    """
    lines = columns_of(sample) == ["text"] and "label" not in data.columns
    if data.form == "fasttext" or (
        lines and data.form == "auto" and str(sample[0].fields["text"]).startswith(_FASTTEXT)
    ):
        return _finished(Form("fasttext", _fasttext_row, lambda rows: "read as fastText's lines"), data)
    roles = _roles("cls", sample, data)

    def row(fields: Fields) -> Row:
        made = _texts(roles, fields)
        made["label"] = _label(roles.value(fields, "label"), roles.column("label"), data.separator)
        return made

    return _finished(Form("columns", row, lambda rows: _said(roles)), data)


def recognise_regression(sample: Sequence[Record], data: Labelled) -> Form:
    """The form of rows with numbers.

    Raises:
        DataError: They are of none that is known.
    """
    roles = _roles("regression", sample, data)

    def row(fields: Fields) -> Row:
        made = _texts(roles, fields)
        made["label"] = number_of(roles.value(fields, "label"), roles.column("label"), "label")
        return made

    def said(rows: Sequence[Row]) -> str:
        labels = [made["label"] for made in rows]
        return f"{_said(roles)}, numbers from {min(labels):g} to {max(labels):g}" if labels else _said(roles)

    return Form("columns", row, said)


def number_of(value: Any, column: str, role: str) -> float:
    """A number that is written as one or as text.

    Raises:
        Fault: It is none, or not finite.
    """
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number):
        return number
    missing = value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING)
    raise refused(
        "missing number" if missing else "no number",
        f"column {column!r} holds {short(value)}, which is no finite number",
        f"repair or remove the row, or name another column: `columns: {{{role}: ...}}`"
        + ("" if missing else "; for names of classes set `task: cls`"),
        value,
    )


def natural_key(label: str) -> tuple[Any, ...]:
    """Sorts numbers as numbers, also within names: `2` before `10`, `star 2` before `star 10`."""
    if _WHOLE.fullmatch(label):
        return (0, int(label), label)
    parts = _DIGITS.split(label)
    return (1, [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)], label)


def labels_of(row: Row) -> list[str]:
    """The labels of a row of `cls`, which may be one."""
    label = row["label"]
    return label if isinstance(label, list) else [label]


def _roles(task: str, sample: Sequence[Record], data: Labelled) -> Roles:
    columns = columns_of(sample)
    roles = Roles(columns, data.columns, NAMES[task])
    if columns == ["1", "2"]:
        _by_values(roles, sample, task)
    elif len(columns) == 2 and roles.has("text") != roles.has("label"):
        roles.take("label" if roles.has("text") else "text", roles.unused[0])
    if len(columns) == 1 and not roles.has("label"):
        raise unknown_form(task, sample, "label", data.form, free=())
    require(roles, ("text", "label"), task, sample, data.form)
    return roles


def _by_values(roles: Roles, sample: Sequence[Record], task: str) -> None:
    """Two columns without names: the label is the one with fewer different values, or with numbers."""
    first, second = ([record.fields.get(column) for record in sample] for column in ("1", "2"))
    if task == "regression":
        label = "1" if all(_is_number(value) for value in first) else "2"
    else:
        label = "1" if len(set(map(str, first))) < len(set(map(str, second))) else "2"
    if not roles.has("text") and not roles.has("label"):
        roles.take("label", label)
        roles.take("text", "2" if label == "1" else "1")


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _texts(roles: Roles, fields: Fields) -> Row:
    made = {"text": roles.text(fields, "text")}
    if roles.has("other"):
        made["other"] = roles.text(fields, "other")
    return made


def _said(roles: Roles) -> str:
    shown = [f"{role} from `{roles.column(role)}`" for role in ("text", "other", "label") if roles.has(role)]
    unused = f"; not used: {', '.join(f'`{column}`' for column in roles.unused)}" if roles.unused else ""
    return f"read as columns: {', '.join(shown)}{unused}"


def _fasttext_row(fields: Fields) -> Row:
    words = str(fields.get("text", "")).split(" ")
    count = next((i for i, word in enumerate(words) if not word.startswith(_FASTTEXT)), len(words))
    labels = [_label(word.removeprefix(_FASTTEXT), "text", None) for word in words[:count]]
    if not labels:
        raise refused(
            "missing label", "the line does not begin with `__label__`", "repair it", fields.get("text")
        )
    text = text_of(" ".join(words[count:]), "text", "text")
    return {"text": text, "label": labels[0] if count == 1 else list(dict.fromkeys(labels))}


def _label(value: Any, column: str, separator: str | None) -> str | list[str]:
    """The label, or the list of them; whole numbers become their digits.

    Raises:
        Fault: There is none, or it is no label.
    """
    if isinstance(value, str):
        value = value.strip()
        if separator is not None:
            parts = (part.strip() for part in value.split(separator))
            return list(dict.fromkeys(part for part in parts if part))
        if value.startswith("[") and value.endswith("]"):
            value = _listed(value, column)
    if isinstance(value, list):
        return list(dict.fromkeys(_one(one, column) for one in value))
    return _one(value, column)


def _one(value: Any, column: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)  # all labels together tell later whether they are numbers
    if isinstance(value, str) and value.strip().lower() not in _NOTHING:
        return text_of(value.strip(), column, "label")
    missing = value is None or isinstance(value, float | str)
    raise refused(
        "missing label" if missing else "no label",
        f"column {column!r} holds {short(value)}, which is no label",
        "repair or remove the row (`on_error: skip` leaves such rows out), or name another column: "
        "`columns: {label: ...}`",
        value,
    )


def _listed(value: str, column: str) -> list[Any] | str:
    """A list that a table's field spells, as JSON."""
    try:
        return list(json.loads(value))
    except ValueError:
        raise refused(
            "no label",
            f"column {column!r} holds {short(value)}, which looks like a list but is no JSON",
            'write it as `["a", "b"]`, or `a|b` with `separator: "|"`',
            value,
        ) from None


def _finished(form: Form, data: Labelled) -> Form:
    """The form of `cls` whose labels are looked at together, when all are known."""
    recognised = form.said

    def finish(rows: list[Row]) -> None:
        form.counts[DISAGREE] += _num_disagreeing(rows)
        if any(isinstance(row["label"], list) for row in rows):
            for row in rows:
                row["label"] = labels_of(row)
        _check_labels(rows, data.max_labels)

    def said(rows: Sequence[Row]) -> str:
        classes = counted(len({label for row in rows for label in labels_of(row)}), "class", "classes")
        several = bool(rows) and isinstance(rows[0]["label"], list)
        mean = f", {average(sum(len(row['label']) for row in rows), len(rows))} a text" if several else ""
        return f"{recognised(rows)}, {classes}{mean}"

    form.finish, form.said, form.label_key = finish, said, "label"
    return form


def _num_disagreeing(rows: Sequence[Row]) -> int:
    """How many texts have more than one label, or list of labels, in different rows."""
    seen: dict[tuple[str, str | None], set[tuple[str, ...]]] = {}
    for row in rows:
        seen.setdefault((row["text"], row.get("other")), set()).add(tuple(sorted(labels_of(row))))
    return sum(len(labels) > 1 for labels in seen.values())


def _check_labels(rows: Sequence[Row], most: int) -> None:
    first: dict[str, str] = {}
    for row in rows:
        for label in labels_of(row):
            first.setdefault(label, row["place"])
    decimal = next((label for label in first if _DECIMAL.fullmatch(label)), None)
    if decimal is not None and all(_is_number(label) for label in first):
        whole = all(float(label).is_integer() for label in first)
        hint = "set `task: regression` to learn numbers"
        hint += "; for classes write whole numbers without a point" if whole else "; for classes write names"
        raise DataError(
            f"{first[decimal]}: the label {decimal} is a number with a point, no class", hint=hint
        )
    if len(first) > most:
        often = Counter(label for row in rows for label in labels_of(row))
        once = sum(count == 1 for count in often.values())
        raise DataError(
            f"the labels have {len(first):,} different values, over {most:,} ({once:,} of them once): such as "
            f"{short(next(iter(first)))!r} at {next(iter(first.values()))}",
            hint="name the column that holds the class: `columns: {label: ...}`; if these are classes, raise "
            "`max_labels`",
        )
