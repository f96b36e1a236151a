"""Passages to search, and questions with what is right to find: passages by name or text, or those with an answer.

A text that occurs several times is one passage: else copies of the right one would count as wrong ones before it.

**Source**: Karpukhin et al., "Dense Passage Retrieval for Open-Domain Question Answering", 2020, section 4 (a passage
that holds an answer is right).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from llmkit.data.places import Fault, Tally
from llmkit.data.records.answers import expand
from llmkit.data.records.names import NAMES
from llmkit.data.records.read import read_records
from llmkit.data.records.record import Record, Roles, columns_of
from llmkit.data.tables import short
from llmkit.errors import DataError, UsageError
from llmkit.evaluate.prompts import check_roles, made_of, no_column, texts_of
from llmkit.metrics.answers import normalised
from llmkit.metrics.scripts import UNSPACED
from llmkit.recipe.labelled import Labelled
from llmkit.registry import nearest

_LOOKED_AT = 100
_COMPARED = 10_000
"""Names that one which is not known is compared with, so that a message is not waited for."""
_LOOKS = "rows are `question` and `positive` (names of passages, or their texts), or `question` and `answers`"
_UNSPACED = re.compile(f"[{UNSPACED}]")


@dataclass(frozen=True)
class Query:
    """A question.

    Attributes:
        place: Where the row stands: `questions.jsonl:17`.
        question: The question.
        named: What the row says of its passages: their names or texts.
        answers: Texts that answer it.
        relevant: The numbers of its passages; empty where what holds an answer is right.
    """

    place: str
    question: str
    named: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    relevant: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """What it is, wherever it stands."""
        content = json.dumps([self.question, self.named, self.answers], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Collection:
    """What is searched, and for what.

    Attributes:
        passages: The texts, each once.
        names: The first name of each.
        queries: The questions.
        right: What is right to find: the passages that rows name, or those that hold an answer.
    """

    passages: Sequence[str]
    names: Sequence[str]
    queries: Sequence[Query]
    right: Literal["named", "answers"]


def read_collection(
    data: Labelled, corpus: Labelled | None, base: Path, *, cache: Path | None = None
) -> Collection:
    """Read questions and passages.

    Args:
        data: Where the questions are; SQuAD's json, too.
        corpus: Where the passages are; None: they are the texts that the questions name as right.
        base: The folder that relative paths may start from.
        cache: Where standard input is kept.

    Raises:
        UsageError: Nothing says which passages to search, or `columns` names no role of such rows.
        DataError: A row cannot be used, two passages have one name, a question names one that is not there, or only
            some name any.
    """
    queries = _read_queries(data, base, cache)
    if corpus is not None:
        passages, names, numbers = _read_passages(corpus, base, cache)
        return _placed(queries, passages, names, numbers)
    lacking = next((query for query in queries if not query.named), None)
    if lacking is not None:
        raise UsageError(
            f"{lacking.place}: the question names no passage, and nothing says which passages to search",
            hint="eval.retrieval.corpus=FILES",
        )
    texts = list(dict.fromkeys(text for query in queries for text in query.named))
    return _placed(queries, texts, [str(number) for number in range(len(texts))], {})


def holds(passage: str, answer: str) -> bool:
    """Whether an answer stands in a passage: as words, whatever their case, articles and punctuation.

    Where the answer is of a script without spaces, or nothing is left of it, as a run of characters.
    """
    plain = normalised(answer)
    if not plain or _UNSPACED.search(answer):
        return "".join(answer.casefold().split()) in "".join(passage.casefold().split())
    return f" {plain} " in f" {normalised(passage)} "


def _read_queries(data: Labelled, base: Path, cache: Path | None) -> list[Query]:
    check_roles(data.columns, tuple(NAMES["retrieval"]), "retrieval")
    tally = Tally()
    records = _flat(read_records(data, "retrieval", base=base, cache=cache, tally=tally))
    first = list(islice(records, _LOOKED_AT))
    roles = Roles(columns_of(first), data.columns, NAMES["retrieval"])
    if first and not roles.has("question"):
        raise no_column("question", first, _LOOKS)
    if first and not (roles.has("positive") or roles.has("answers")):
        raise no_column("positive", first, _LOOKS)

    def make(record: Record) -> Query:
        named = _several(record, roles, "positive")
        answers = _several(record, roles, "answers")
        if not named and not answers:
            raise Fault(
                "nothing is right to find",
                "the question has neither a passage nor an answer",
                hint="repair or remove the row; `on_error: skip` leaves such rows out",
            )
        return Query(record.where, roles.text(record.fields, "question"), named, answers)

    queries: list[Query] = made_of(chain(first, records), data, tally, make, "questions")
    return queries


def _flat(records: Iterable[Record]) -> Iterable[Record]:
    return chain.from_iterable(expand(record) for record in records)


def _several(record: Record, roles: Roles, role: str) -> tuple[str, ...]:
    value = roles.get(record.fields, role)
    if value is None or value == []:
        return ()
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, list):
        value = [str(one) if isinstance(one, int) else one for one in value]
    return texts_of(value, roles.column(role), role)


def _read_passages(
    corpus: Labelled, base: Path, cache: Path | None
) -> tuple[list[str], list[str], dict[str, int]]:
    """Texts, their first names, and the number of the passage that each name stands for."""
    tally = Tally()
    records = read_records(corpus, "passages", base=base, cache=cache, tally=tally)
    first = list(islice(records, _LOOKED_AT))
    roles = Roles(columns_of(first), corpus.columns, NAMES["passages"])
    if first and not roles.has("text"):
        raise no_column("text", first, "passages are `text`, and `id` where rows name them")

    def make(record: Record) -> tuple[str, str, str]:
        name = roles.get(record.fields, "id")
        return record.where, "" if name is None else str(name), roles.text(record.fields, "text")

    numbers: dict[str, int] = {}
    texts: dict[str, int] = {}
    names: list[str] = []
    for where, name, text in made_of(chain(first, records), corpus, tally, make, "passages"):
        if name in numbers:
            raise DataError(
                f"{where}: there is another passage with the name {name!r}",
                hint="give each a name of its own",
            )
        number = texts.setdefault(text, len(texts))
        if number == len(names):
            names.append(name or where)
        if name:
            numbers[name] = number
    return list(texts), names, numbers


def _placed(
    queries: Sequence[Query], passages: Sequence[str], names: Sequence[str], numbers: Mapping[str, int]
) -> Collection:
    """The questions with the numbers of their passages; where none names any, what holds an answer is right."""
    if not any(query.named for query in queries):
        return Collection(passages, names, list(queries), "answers")
    known = {**{text: number for number, text in enumerate(passages)}, **numbers}
    placed = []
    for query in queries:
        missing = next((name for name in query.named if name not in known), None)
        if missing is not None:
            raise DataError(
                f"{query.place}: there is no passage {short(missing)!r} in the corpus",
                hint=_instead(missing, numbers or passages, queries),
            )
        if not query.named:
            raise DataError(
                f"{query.place}: the question names no passage, and others do",
                hint="measure questions that name passages and those with answers alone apart",
            )
        placed.append(replace(query, relevant=tuple(known[name] for name in query.named)))
    return Collection(passages, names, placed, "named")


def _instead(missing: str, known: Iterable[str], queries: Sequence[Query]) -> str:
    """What would work where a passage is not there."""
    guess = nearest(missing, list(islice(known, _COMPARED)))
    said = (
        f"did you mean {short(guess)!r}?" if guess else "name passages by their `id`, or by their whole texts"
    )
    if not all(query.answers for query in queries):
        return said
    # Not by itself: another figure would stand under the same name.
    return f"{said} Or let what holds an answer be right: eval.labelled.columns.positive=NONE"
