"""Questions with a choice of answers, and contexts with the one continuation that is right."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.places import Fault, Faults, Place, Tally
from llmkit.data.records.names import NAMES
from llmkit.data.records.read import read_records
from llmkit.data.records.record import Record, Roles, columns_of, text_of
from llmkit.errors import DataError, UsageError
from llmkit.evaluate.requests import Answer
from llmkit.metrics.inputs import Booleans, Floats
from llmkit.recipe.labelled import Labelled
from llmkit.recipe.units import listing
from llmkit.registry import nearest

_ROLES = tuple(NAMES["choice"])
_CHOICE, _CONTINUATION = ("query", "choices", "gold"), ("context", "continuation")
_LOOKED_AT = 100


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
        place: Where the row stands: `arc.jsonl:17`.
        context: What stands before each option.
        options: The choices; of a row with `context` and `continuation` the continuation alone.
        gold: The number of the right one.
    """

    place: str
    context: str
    options: tuple[str, ...]
    gold: int = 0

    @property
    def key(self) -> str:
        """What it is, wherever it stands."""
        content = json.dumps([self.context, self.options, self.gold], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What a model answered. Shape suffix: N questions.

    Attributes:
        chosen_N: The likeliest option, by its log-probability.
        by_chars_N: The likeliest per character.
        by_bytes_N: The likeliest per byte of UTF-8.
        right_N: Whether the answer was right; of a continuation, whether the model would have written it.
        gold_N: The log-probability of the right option, in nats.
        confidence_N: How likely the chosen option is among all options.
    """

    chosen_N: np.ndarray[Any, np.dtype[np.int64]]
    by_chars_N: Booleans
    by_bytes_N: Booleans
    right_N: Booleans
    gold_N: Floats
    confidence_N: Floats


def read_questions(data: Labelled, base: Path, *, cache: Path | None = None) -> list[Question]:
    """Read questions, all of one kind: `query, choices, gold` or `context, continuation`.

    Args:
        data: Where they are.
        base: The folder that relative paths may start from.
        cache: Where standard input is kept.

    Raises:
        UsageError: `columns` names a role that such rows do not have.
        DataError: A row cannot be used; the message names its file and line.
    """
    _check_roles(data.columns)
    tally = Tally()
    records = read_records(data, "choice", base=base, cache=cache, tally=tally)
    first = list(islice(records, _LOOKED_AT))
    roles = Roles(columns_of(first), data.columns, NAMES["choice"])
    needed = _kind(roles, data.columns, first)
    questions: list[Question] = []
    for record in (one for some in (first, records) for one in some):
        if data.limit is not None and len(questions) == data.limit:
            break
        try:
            questions.append(_question(record, roles, needed))
        except Fault as fault:
            Faults(Place(record.where, bare_first=True), tally, data.on_error == "skip").row(1, fault)
    if not questions:
        source = data.name or data.dataset or ", ".join(data.files or [])
        raise DataError(f"{source}: there are no questions", hint="name files with rows: --data FILES")
    return questions


def _check_roles(columns: Mapping[str, str]) -> None:
    for role in columns:
        if role not in _ROLES:
            guess = nearest(role, _ROLES)
            raise UsageError(
                f"`{role}` is no role of a row of `choice`; it has {listing(_ROLES)}",
                hint=f"did you mean `{guess}`?" if guess else "write the role first: `query: COLUMN`",
            )


def _kind(roles: Roles, asked: Mapping[str, str], sample: Sequence[Record]) -> tuple[str, ...]:
    """The roles of the rows, told by their columns."""
    if not sample:
        return _CHOICE
    wanted = _CONTINUATION if set(asked) & set(_CONTINUATION) and not set(asked) & set(_CHOICE) else _CHOICE
    for needed in (wanted, _CONTINUATION):
        if roles.has(*needed):
            return needed
    lacking = next(role for role in wanted if not roles.has(role))
    columns = columns_of(sample)
    guess = nearest(lacking, columns) or "NAME"
    raise DataError(
        f"{sample[0].where}: nothing tells which column is {lacking!r}; the columns are {', '.join(columns)}",
        hint="rows are `query, choices, gold` or `context, continuation`; if a column has another name, say so: "
        f"eval.labelled.columns.{lacking}={guess}",
    )


def _question(record: Record, roles: Roles, needed: tuple[str, ...]) -> Question:
    fields = record.fields
    if needed == _CONTINUATION:
        continuation = roles.text(fields, "continuation")
        context = roles.value(fields, "context")
        if not isinstance(context, str):
            context = text_of(context, roles.column("context"), "context")  # says what is wrong
        return Question(record.where, context, (continuation,))
    column = roles.column("choices")
    options = _options(roles.value(fields, "choices"), column)
    gold = _gold(roles.value(fields, "gold"), options, roles.column("gold"))
    return Question(record.where, roles.text(fields, "query"), options, gold)


def _options(value: Any, column: str) -> tuple[str, ...]:
    """The choices: a list, as JSON where a cell of a table holds it, or `{text: [...], label: [...]}`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Fault("broken JSON", f"column {column!r}: {error}", hint="repair the row") from error
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if not isinstance(value, list) or len(value) < 2:
        raise Fault(
            "no choices",
            f"column {column!r} holds {json.dumps(value, ensure_ascii=False, default=str)[:80]}, which is no list "
            "of two or more texts",
            hint='choices look like ["no", "yes"]; with one right answer alone: `context, continuation`',
        )
    options = tuple(text_of(option, column, "choices") for option in value)
    if len(set(options)) < len(options):
        twice = next(option for option in options if options.count(option) > 1)
        raise Fault("two equal choices", f"column {column!r} holds {twice!r} twice", hint="repair the row")
    return options


def _gold(value: Any, options: Sequence[str], column: str) -> int:
    """The number of the right choice: counted from 0, or its letter, or itself."""
    number: int | None = None
    if isinstance(value, str):
        if value in options:
            number = options.index(value)
        elif value.strip().isdecimal():
            number = int(value)
        elif len(value.strip()) == 1 and value.strip().isascii() and value.strip().isalpha():
            number = ord(value.strip().upper()) - ord("A")
    elif isinstance(value, bool | int):
        number = int(value)
    if number is None or not 0 <= number < len(options):
        raise Fault(
            "no right choice",
            f"column {column!r} holds {json.dumps(value, ensure_ascii=False, default=str)[:60]}, and there are "
            f"{len(options)} choices",
            hint=f"give the number of the right one, 0 to {len(options) - 1}, its letter, or its text",
        )
    return number


def pairs_of(questions: Sequence[Question], separator: str) -> list[tuple[str, str]]:
    """Contexts and continuations, question after question, option after option.

    Args:
        questions: What is asked.
        separator: What stands between a context and an option. If it is blank, it is left out where either of them
            brings a blank; what it says besides blanks belongs to the context and is not scored.
    """
    pairs = []
    for question in questions:
        for option in question.options:
            blank = question.context[-1:].isspace() or option[:1].isspace() or not question.context
            between = "" if not separator.strip() and blank else separator
            bare = between.rstrip()
            pairs.append((question.context + bare, between[len(bare) :] + option))
    return pairs


def outcome_of(questions: Sequence[Question], answers: Sequence[Answer]) -> Outcome:
    """What came of the answers to `pairs_of` these questions.

    `by_chars_N` and `by_bytes_N` divide by the option's own length, without what stands before it, as the harness's
    `acc_norm` and `acc_bytes` do; of two equal ones the first is taken.

    **Source**: Gao, "Multiple Choice Normalization in LM Evaluation", 2021.
    """
    chosen, chars, encoded, right, gold, confidence = [], [], [], [], [], []
    start = 0
    for question in questions:
        some = answers[start : start + len(question.options)]
        start += len(question.options)
        likely = np.array([answer.loglikelihood for answer in some])
        num_chars = np.array([len(option) for option in question.options])
        num_bytes = np.array([len(option.encode()) for option in question.options])
        best = int(likely.argmax())
        chosen.append(best)
        chars.append(int((likely / num_chars).argmax()) == question.gold)
        encoded.append(int((likely / num_bytes).argmax()) == question.gold)
        right.append(best == question.gold if len(some) > 1 else some[0].greedy)
        gold.append(float(likely[question.gold]))
        confidence.append(float(1 / np.exp(likely - likely[best]).sum()))
    return Outcome(*map(np.array, (chosen, chars, encoded, right, gold, confidence)))


def always_same(questions: Sequence[Question], outcome: Outcome) -> int | None:
    """The number of the option that was chosen each time, if it was not the right one each time."""
    often = Counter(outcome.chosen_N.tolist())
    golds = {question.gold for question in questions}
    return next(iter(often)) if len(often) == 1 and len(golds) > 1 else None
