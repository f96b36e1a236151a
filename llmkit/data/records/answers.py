"""Rows of `qa`: a question, a text, and where in it the answer stands.

**Source**: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", section 3;
questions without an answer: Rajpurkar et al. 2018, "Know What You Don't Know", section 4.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from llmkit.data.places import Fault
from llmkit.data.records.form import Form, average, refused, require
from llmkit.data.records.names import NAMES
from llmkit.data.records.record import Fields, Record, Roles, Row, columns_of
from llmkit.data.tables import short
from llmkit.recipe.labelled import Labelled

NEAR = 32
"""How many characters from its stated start an answer may stand, to be taken for the one that is meant."""
REPAIRED = "answers that stood near their stated start (repaired)"
LOOKED_UP = "answers without a start (the first place where they stand is taken)"
_LOOK_AT = 1000
IMPOSSIBLE = "questions without an answer"


def recognise_qa(sample: Sequence[Record], data: Labelled) -> Form:
    """The form of rows with questions.

    Raises:
        DataError: They are of none that is known.
    """
    nested = any(_inside(record) is not None for record in sample)
    shown = list(islice((inner for record in sample for inner in expand(record)), _LOOK_AT))
    roles = Roles(columns_of(shown), data.columns, NAMES["qa"])
    if not shown or not roles.has("question", "context"):
        require(roles, ("question", "context"), "qa", shown or sample, data.form)
    if not roles.has("answers") and not any("is_impossible" in record.fields for record in shown):
        require(roles, ("answers",), "qa", shown, data.form)
    counts: Counter[str] = Counter()

    def row(fields: Fields) -> Row:
        context = roles.text(fields, "context")
        answers = _answers(fields, roles)
        counts[IMPOSSIBLE] += not answers
        return {
            "id": str(roles.get(fields, "id") or ""),
            "question": roles.text(fields, "question"),
            "context": context,
            "answers": [_placed(text, start, context, counts) for text, start in answers],
        }

    def finish(rows: list[Row]) -> None:
        for made in rows:
            made["id"] = made["id"] or made["place"]

    def said(rows: Sequence[Row]) -> str:
        words = "SQuAD" if nested else "questions in columns"
        contexts = len({made["context"] for made in rows})
        return f"read as {words}, {average(len(rows), contexts)} questions a text on average"

    return Form("squad" if nested else "columns", row, said, counts, expand, finish)


def expand(record: Record) -> Iterator[Record]:
    """The questions of an article or a paragraph, each with its context and its path; a question is itself."""
    inside = _inside(record)
    if inside is None:
        yield record
        return
    shared = {key: value for key, value in record.fields.items() if key not in ("paragraphs", "qas")}
    sign = "." if ": " in record.where else ": "
    for index, inner in enumerate(record.fields[inside]):
        where = f"{record.where}{sign}{inside}[{index}]"
        fields = {**shared, **inner} if isinstance(inner, dict) else shared
        yield from expand(Record(where, fields))


def _inside(record: Record) -> str | None:
    return next((key for key in ("paragraphs", "qas") if isinstance(record.fields.get(key), list)), None)


def _answers(fields: Fields, roles: Roles) -> list[tuple[Any, Any]]:
    """The answers as they are written: text and start, None where none is said.

    Raises:
        Fault: Nothing is said of an answer, not even that there is none.
    """
    if fields.get("is_impossible") is True or fields.get("is_impossible") == "true":
        return []
    value, start = roles.value(fields, "answers"), roles.get(fields, "start")
    if isinstance(value, dict):  # as `datasets` keeps them: lists of texts and of starts
        texts, starts = value.get("text"), value.get("answer_start", value.get("start"))
        texts = texts if isinstance(texts, list) else [texts]
        starts = starts if isinstance(starts, list) else [starts] * len(texts)
        if len(texts) == len(starts):
            return list(zip(texts, starts, strict=True))
    elif isinstance(value, list):
        return [
            (one.get("text"), one.get("answer_start", one.get("start")))
            if isinstance(one, dict)
            else (one, None)
            for one in value
        ]
    elif isinstance(value, str):
        return [(value, start)] if value.strip() else []
    raise refused(
        "no answers",
        f"column {roles.column('answers')!r} holds {short(value)}, which are no answers",
        "write `[{text: ..., answer_start: ...}]`, a text, or `[]` where there is no answer",
        value,
    )


def _placed(text: Any, start: Any, context: str, counts: Counter[str]) -> dict[str, Any]:
    """The answer where it stands in the context.

    Raises:
        Fault: It does not stand there, nor near.
    """
    if not isinstance(text, str) or not text.strip():
        raise refused(
            "empty answer", f"the answer is {short(text)}", "`answers: []` says that there is none", text
        )
    begin = _whole(start)
    if begin is not None and begin >= 0 and context.startswith(text, begin):
        return {"text": text, "start": begin}
    if begin is None or begin < 0:
        counts[LOOKED_UP] += 1
        begin = context.find(text)
    else:
        counts[REPAIRED] += 1
        begin = _nearest(text, begin, context)
    if begin >= 0:
        return {"text": text, "start": begin}
    raise _absent(text, _whole(start), context)


def _whole(start: Any) -> int | None:
    """A start as a number of characters; a table gives it as text."""
    if isinstance(start, str) and start.strip().lstrip("-").isdigit():
        return int(start)
    return start if isinstance(start, int) and not isinstance(start, bool) else None


def _nearest(text: str, start: int, context: str) -> int:
    """Where the text stands nearest to `start`, within `NEAR` characters; -1 if nowhere."""
    low = max(start - NEAR, 0)
    after = context.find(text, start, start + NEAR + len(text))
    before = context.rfind(text, low, start + len(text))
    found = [place for place in (before, after) if place >= 0]
    return min(found, key=lambda place: (abs(place - start), place), default=-1)


def _absent(text: str, start: int | None, context: str) -> Fault:
    if start is None or start < 0:
        what = f"the answer {short(text)!r} stands nowhere in the context"
    else:
        there = short(context[start : start + len(text)])
        what = f"the answer {short(text)!r} is not in the context at {start:,}, where {there!r} stands"
    elsewhere = context.find(text)
    hint = f"it stands at {elsewhere:,}" if elsewhere >= 0 else "the answer must be copied from the context"
    return refused("answer not in the context", what, f"{hint}; `on_error: skip` leaves such rows out", text)
