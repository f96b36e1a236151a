"""What a model is asked where what it writes is measured: texts or conversations, with the right answers, if any."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from llmkit.data.places import Fault, Faults, Place, Tally
from llmkit.data.records import read_rows
from llmkit.data.records.names import NAMES
from llmkit.data.records.read import read_records
from llmkit.data.records.record import Fields, Record, Roles, columns_of, text_of
from llmkit.data.tables import short
from llmkit.errors import DataError, UsageError
from llmkit.recipe.labelled import Labelled
from llmkit.recipe.units import listing
from llmkit.registry import nearest

_ROLES = (*NAMES["generation"], "role", "content")
_LOOKED_AT = 100
_CONVERSATIONS = ("messages", "sharegpt", "alpaca")


@dataclass(frozen=True)
class Prompt:
    """A row.

    Attributes:
        place: Where it stands: `questions.jsonl:17`.
        text: What the model goes on from, or reads; of a conversation its last question.
        messages: The turns before the answer; empty where the row is no conversation.
        references: The right answers; none where there are none.
        tools: What the assistant may call in a conversation, in JSON schema.
    """

    place: str
    text: str
    messages: tuple[Mapping[str, Any], ...] = ()
    references: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """What it is, wherever it stands."""
        tools = [self.tools] if self.tools else []
        content = json.dumps([self.text, self.messages, self.references, *tools], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def shown(self) -> Any:
        """What is shown of it as the model's input."""
        return [dict(turn) for turn in self.messages] or self.text


def read_prompts(data: Labelled, base: Path, *, cache: Path | None = None) -> tuple[list[Prompt], int]:
    """Read prompts, each with its references, or conversations, of which the assistant's last turn is the reference.

    Args:
        data: Where they are.
        base: The folder that relative paths may start from.
        cache: Where standard input is kept.

    Returns:
        The prompts, and how many conversations were left out, as by `of_rows`.

    Raises:
        UsageError: `columns` names a role that such rows do not have.
        DataError: A row cannot be used, or only some of the rows have references; the message names file and line.
    """
    check_roles(data.columns, _ROLES, "generation")
    tally = Tally()
    records = read_records(data, "generation", base=base, cache=cache, tally=tally)
    first = list(islice(records, _LOOKED_AT))
    roles = Roles(columns_of(first), data.columns, NAMES["generation"])
    if data.form in _CONVERSATIONS or (first and _is_conversation(first[0].fields, roles)):
        columns = {role: column for role, column in data.columns.items() if role != "references"}
        rows = read_rows(
            data.model_copy(update={"columns": columns}), "sft", base=base, cache=cache, training=False
        ).rows
        return of_rows(rows)
    if first and not roles.has("prompt"):
        raise no_column("prompt", first, "rows are `prompt, references`, or conversations in `messages`")
    prompts = made_of(
        chain(first, records), data, tally, lambda record: _of_columns(record, roles), "prompts"
    )
    _check_alike(prompts)
    return prompts, 0


def of_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Prompt], int]:
    """Canonical rows of `sft` or `seq2seq` as prompts with their references, and how many were left out.

    A conversation is left out whose last answer has no text but calls tools: a reference of nothing would make a model
    right that writes nothing.

    Raises:
        DataError: All are left out.
    """
    prompts = [_of_row(row) for row in rows if _says_something(row)]
    if rows and not prompts:
        raise DataError(
            f"{rows[0]['place']}: the last answer has no text to compare with, nor has that of any other row "
            f"({len(rows):,} rows)",
            hint="give conversations that end with an answer in words",
        )
    return prompts, len(rows) - len(prompts)


def _says_something(row: Mapping[str, Any]) -> bool:
    return "messages" not in row or bool((row["messages"][-1].get("content") or "").strip())


def _of_row(row: Mapping[str, Any]) -> Prompt:
    if "messages" in row:
        *before, answer = row["messages"]
        asked = next((turn["content"] for turn in reversed(before) if turn["role"] == "user"), "")
        tools = tuple(row.get("tools") or ())
        return Prompt(row["place"], str(asked or ""), tuple(before), (answer["content"],), tools)
    return Prompt(row["place"], row["source"], (), (row["target"],))


def made_of(
    records: Iterable[Record], data: Labelled, tally: Tally, make: Any, what: str, *, skip: bool | None = None
) -> list[Any]:
    """What is made of each record, up to the limit; one that is wrong is an error with its place, or is left out.

    Raises:
        DataError: A record is wrong and not to be skipped, or nothing is there.
    """
    made: list[Any] = []
    skip = data.on_error == "skip" if skip is None else skip
    for record in records:
        if data.limit is not None and len(made) == data.limit:
            break
        try:
            made.append(make(record))
        except Fault as fault:
            Faults(Place(record.where, bare_first=True), tally, skip).row(1, fault)
    if not made:
        source = data.name or data.dataset or ", ".join(data.files or [])
        raise DataError(f"{source}: there are no {what}", hint="name files with rows: --data FILES")
    return made


def check_roles(columns: Mapping[str, str], roles: Sequence[str], task: str) -> None:
    """Look that columns are named for roles that such rows have.

    Raises:
        UsageError: One has not.
    """
    for role in columns:
        if role not in roles:
            guess = nearest(role, roles)
            raise UsageError(
                f"`{role}` is no role of a row of `{task}`; it has {listing(list(roles))}",
                hint=f"did you mean `{guess}`?" if guess else f"write the role first: `{roles[0]}: COLUMN`",
            )


def no_column(role: str, sample: Sequence[Record], looks: str, setting: str = "eval.labelled") -> DataError:
    """What is said where nothing tells which column plays a role."""
    columns = columns_of(sample)
    guess = nearest(role, columns) or "NAME"
    return DataError(
        f"{sample[0].where}: nothing tells which column is {role!r}; the columns are {', '.join(columns)}",
        hint=f"{looks}; if a column has another name, say so: {setting}.columns.{role}={guess}",
    )


def texts_of(value: Any, column: str, role: str) -> tuple[str, ...]:
    """One text or several: a text, a list, a list as JSON in a cell of a table, or SQuAD's answers.

    Raises:
        Fault: It is something else.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):  # else it is a text that begins with a bracket
            value = json.loads(value)
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if not isinstance(value, list):
        return (text_of(value, column, role),)
    if not value:
        raise Fault("no text", f"column {column!r} is an empty list", hint="repair or remove the row")
    items = [item["text"] if isinstance(item, Mapping) and "text" in item else item for item in value]
    return tuple(dict.fromkeys(text_of(item, column, role) for item in items))


def _is_conversation(fields: Fields, roles: Roles) -> bool:
    """Whether the row is a list of turns, or says its question in parts that are known to belong together."""
    return isinstance(roles.get(fields, "messages"), list)


def _of_columns(record: Record, roles: Roles) -> Prompt:
    fields = record.fields
    text = roles.text(fields, "prompt")
    if not roles.has("references"):
        return Prompt(record.where, text)
    value = roles.get(fields, "references")
    if value is None:
        return Prompt(record.where, text)
    return Prompt(record.where, text, (), texts_of(value, roles.column("references"), "references"))


def _check_alike(prompts: Sequence[Prompt]) -> None:
    lacking = [prompt for prompt in prompts if not prompt.references]
    if lacking and len(lacking) < len(prompts):
        raise DataError(
            f"{lacking[0].place}: {len(lacking):,} of {len(prompts):,} rows have no reference, the first of them "
            f"{short(lacking[0].text)!r}",
            hint="measure those with a reference and those without one apart",
        )
