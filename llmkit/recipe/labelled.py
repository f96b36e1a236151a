"""The rows that a task learns from: where they are, what form they have, and which column plays which role."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from llmkit.recipe.block import Block, Files
from llmkit.recipe.units import Count, Several, listing
from llmkit.registry import nearest

Form = Literal[
    "auto", "columns", "fasttext", "squad", "translation", "messages", "sharegpt", "alpaca", "pairs",
    "preference", "dialogues", "kto", "triplets", "scored",
]  # fmt: skip
Problem = tuple[tuple[str, ...], str, str]
"""Where in the source's settings something is wrong, what, and what would work."""

_TURNS = ("role", "content")

ROLES: Mapping[str, tuple[str, ...]] = {
    "cls": ("text", "other", "label"),
    "regression": ("text", "other", "label"),
    "tag": ("tokens", "tags"),
    "qa": ("id", "question", "context", "answers", "start"),
    "seq2seq": ("source", "target"),
    "sft": ("messages", *_TURNS, "tools", "system", "prompt", "input", "completion", "history"),
    "dpo": ("prompt", "chosen", "rejected", *_TURNS, "system", "completion", "label"),
    "embed": ("anchor", "positive", "negatives", "score"),
}
"""By task: what a column of its rows can be."""

FORMS: Mapping[str, tuple[str, ...]] = {
    "cls": ("columns", "fasttext"),
    "regression": ("columns",),
    "tag": ("columns",),
    "qa": ("columns", "squad"),
    "seq2seq": ("columns", "translation"),
    "sft": ("messages", "sharegpt", "alpaca", "pairs"),
    "dpo": ("preference", "sharegpt", "dialogues", "kto"),
    "embed": ("pairs", "triplets", "scored"),
}
"""By task: the forms in which its rows are known to come."""


class Labelled(Block):
    """Where a task's rows come from: files (globs, folders, `-` for stdin) or a data set by name."""

    name: str | None = None
    """What reports call these rows; by default the name of their file or folder."""
    files: Files | None = None
    """Paths, globs (`data/**/*.jsonl.zst`), folders or URLs, from the current folder or else the recipe's; `-` reads
    stdin. jsonl, json, csv, tsv, parquet, conll, txt, each also .gz or .zst."""
    dataset: str | None = None
    """A data set on the Hub or in a folder, read with `datasets`: `owner/name` or `owner/name:config`."""
    split: str = "train"
    """Which split of `dataset` to read."""
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "conll", "text"] = "auto"
    """How the files are written; `auto` goes by the name's ending, and for `.txt` by the task and the first line.
    `json` is a list of objects, or an object that holds one; `conll` a word a line, sentences between blank lines;
    `text` a row a line."""
    form: Form = "auto"
    """What the rows look like. For `cls`: `columns`, or `fasttext` (`__label__good so good`). `qa`: `columns`, or
    `squad`. `seq2seq`: `columns`, or `translation` (`{"translation": {"en": ..., "zh": ...}}`). `sft`: `messages` (a
    list of `{role, content}`), `sharegpt` (of `{from, value}`), `alpaca` (instruction, input, output) or `pairs` (a
    prompt and its answer). `dpo`: `preference` (prompt, chosen, rejected), `sharegpt` (conversations, chosen,
    rejected), `dialogues` (whole ones, chosen and rejected) or `kto` (prompt, completion, label). `embed`: `pairs`,
    `triplets` or `scored`. `auto` goes by the columns, and says what it found."""
    columns: dict[str, str] = {}
    """Which column plays which role, where its name does not tell: `{text: review, label: stars}`. Dots lead into
    objects (`meta.stars`); where no line names the columns they are called 1, 2 and so on."""
    header: bool | Literal["auto"] = "auto"
    """Whether the first line of a csv or tsv file names its columns; `auto` looks for names that the task knows."""
    separator: str | None = None
    """What stands between the labels of a text that may have several (`sport|music`); by default a text is one label,
    and several come as a list."""
    max_labels: Several = 1000
    """How many different labels `cls` may have at most: more are taken for a wrong column."""
    encoding: str = "utf-8"
    """The encoding of the files, such as `utf-8` or `gb18030`."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a row that cannot be used: `stop` names it and ends, `skip` counts it, keeps an example and
    goes on."""
    limit: Count | None = None
    """Read at most so many rows, the first ones; by default all."""


def check_labelled(task: str, data: Mapping[str, Any]) -> list[Problem]:
    """What is wrong between a source's settings and the task, beyond each setting's own type.

    Args:
        task: The task.
        data: The source's settings as they were written.

    Returns:
        For each problem the path of its key within the source, a message and a hint.
    """
    if task not in ROLES:
        return []
    return [*_roles(task, data.get("columns")), *_form(task, data), *_only_for(task, data)]


def _roles(task: str, columns: object) -> Iterator[Problem]:
    if not isinstance(columns, Mapping):
        return
    for role in columns:
        if role not in ROLES[task]:
            guess = nearest(str(role), ROLES[task])
            # `{review: text}` for `{text: review}`: the usual slip.
            turned = columns[role] if columns[role] in ROLES[task] else None
            hint = (
                f"did you mean `{turned}: {role}`?" if turned else f"did you mean `{guess}`?" if guess else ""
            )
            message = f"`{role}` is no role of a row of `{task}`; it has {listing(ROLES[task])}"
            yield ("columns", str(role)), message, hint or f"write the role first: `{ROLES[task][0]}: {role}`"


def _form(task: str, data: Mapping[str, Any]) -> Iterator[Problem]:
    form = data.get("form", "auto")
    if form != "auto" and form not in FORMS[task]:
        owners = [f"`{other}`" for other, forms in FORMS.items() if form in forms]
        hint = f"`{form}` is a form of {' and '.join(owners)}" if owners else ""
        yield ("form",), f"rows of `{task}` come as {listing(('auto', *FORMS[task]))}, not `{form}`", hint


def _only_for(task: str, data: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings that only one task has."""
    if data.get("format") == "conll" and task != "tag":
        yield ("format",), f"`conll` holds a tag for each word, and `{task}` has none", "set `task: tag`"
    if data.get("separator") is not None and task != "cls":
        yield ("separator",), f"`separator` parts the labels of `cls`, and `{task}` has none", "leave it out"
    if data.get("separator") == "":
        yield ("separator",), "`separator` is empty, and so parts nothing", "write `separator: '|'`"
