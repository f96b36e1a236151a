"""What every form of rows has: how one row of it is made canonical, and what is said of them all."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from llmkit.data.places import Fault
from llmkit.data.records.record import Fields, Record, Roles, Row, columns_of
from llmkit.data.tables import short
from llmkit.errors import DataError
from llmkit.recipe.labelled import FORMS, ROLES
from llmkit.registry import nearest

_MOST_KEYS = 20
NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]+")


def one_each(record: Record) -> Iterable[Record]:
    """A record is a row."""
    return (record,)


@dataclass
class Form:
    """One of the forms in which a task's rows come.

    Attributes:
        name: One of the task's `FORMS`.
        row: From a record's values to the canonical row, without its place; a `Fault` where it is wrong.
        said: What the rows were taken for, for a person.
        counts: What `row` met, by name.
        expand: From a record to those in it, where one holds several rows.
        finish: Called with all rows at the end, to make them alike; a `DataError` where they cannot be used.
        label_key: The key of the labels that are counted: `label` of `cls`, `tags` of `tag`.
    """

    name: str
    row: Callable[[Fields], Row]
    said: Callable[[Sequence[Row]], str]
    counts: Counter[str] = field(default_factory=Counter)
    expand: Callable[[Record], Iterable[Record]] = one_each
    finish: Callable[[list[Row]], None] | None = None
    label_key: str = ""


LOOKS: dict[str, dict[str, str]] = {
    "cls": {
        "columns": "a text and its label in columns",
        "fasttext": "lines that begin with `__label__NAME`",
    },
    "regression": {"columns": "a text and a number in columns"},
    "tag": {"columns": "`tokens` and `tags`, two lists of one length, or a word a line (`format: conll`)"},
    "qa": {
        "columns": "question, context, answers (and start) in columns",
        "squad": "SQuAD's data, paragraphs, qas",
    },
    "seq2seq": {
        "columns": "source and target in columns",
        "translation": "`translation`, an object of two languages",
    },
    "sft": {
        "messages": "`messages`, a list of {role, content}",
        "sharegpt": "`conversations`, a list of {from, value}",
        "alpaca": "instruction, input, output",
        "pairs": "prompt and completion",
    },
    "dpo": {
        "preference": "prompt, chosen, rejected",
        "sharegpt": "conversations, chosen, rejected",
        "dialogues": "chosen and rejected, whole dialogues",
        "kto": "prompt, completion and label, true or false",
    },
    "embed": {
        "pairs": "anchor and positive",
        "triplets": "anchor, positive and negatives",
        "scored": "anchor, positive and score",
    },
}
"""What each form looks like, for messages."""


def unknown_form(
    task: str,
    sample: Sequence[Record],
    lacking: str = "",
    form: str = "auto",
    free: Sequence[str] | None = None,
) -> DataError:
    """The error for rows of no known form, or not of the one that is asked for.

    Args:
        task: The task.
        sample: The first records.
        lacking: The role for which no column was found.
        form: The form asked for, if one was.
        free: The columns that play no role yet; None: all of them.
    """
    columns = columns_of(sample)
    keys = ", ".join(columns[:_MOST_KEYS]) + (", ..." if len(columns) > _MOST_KEYS else "")
    forms = [form] if form != "auto" else list(FORMS[task])
    known = "; ".join(f"{name}: {LOOKS[task][name]}" for name in forms)
    what = f"the rows are not of the form `{form}`" if form != "auto" else f"no form that `{task}` knows"
    role = lacking or ROLES[task][0]
    able = columns if free is None else list(free)
    is_text = task in ("embed", "seq2seq") and role != "score"
    fits = len(able) == 1 and not (is_text and holds_numbers(sample, able[0]))
    guess = nearest(role, able) or (able[0] if fits else "NAME")
    mapped = f"If a column has another name, say so: `columns: {{{role}: {guess}}}`"
    if columns and not able:
        mapped = f"All columns play other parts: add one with the {role!r}, or say which is which: `columns: {{...}}`"
    missing = f"; nothing tells which is {lacking!r}" if lacking else ""
    return DataError(
        f"{sample[0].where}: {what}; the keys found are {keys or 'none'}{missing}",
        hint=f"known: {known}. {mapped}",
    )


def holds_numbers(sample: Sequence[Record], column: str) -> bool:
    """Whether a column holds numbers alone, which are no texts that belong to others."""
    return all(NUMBER.fullmatch(str(one.fields.get(column, "")).strip()) for one in sample)


def require(roles: Roles, needed: Sequence[str], task: str, sample: Sequence[Record], form: str) -> None:
    """Check that each role has a column.

    Raises:
        DataError: One has none.
    """
    for role in needed:
        if not roles.has(role):
            raise unknown_form(task, sample, role, form, roles.unused)


def average(total: int, count: int) -> str:
    """A mean, as it is said: `3.0`."""
    return f"{total / count:,.1f}" if count else "0.0"


def counted(count: int, one: str, many: str = "") -> str:
    """`1 class`, `77 classes`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def refused(reason: str, what: str, hint: str, value: object = "") -> Fault:
    """A fault with the value that is to blame."""
    return Fault(reason, what, hint=hint, value=short(value))
