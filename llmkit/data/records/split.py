"""Training or held out, for rows with labels: by what a row asks, and each class in its proportion.

Rows that ask the same (the same text, context, prompt, source or anchor) are never on both sides. Within each class
they are ordered by a hash of that, and the first are held out until the class has its share. So a row's side depends on
neither its file nor its place, and new rows move only those that stand next to the border of their class.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

from llmkit.data.records.classes import labels_of
from llmkit.data.records.record import Row
from llmkit.data.records.tags import OUTSIDE, split_tag
from llmkit.data.split import UndividedError, document_hash

_ASKED: Mapping[str, tuple[str, ...]] = {
    "cls": ("text", "other"),
    "regression": ("text", "other"),
    "tag": ("tokens",),
    "qa": ("context",),
    "seq2seq": ("source",),
    "dpo": ("prompt",),
    "embed": ("anchor",),
}


def split_rows(rows: Sequence[Row], task: str, ratio: float) -> tuple[list[Row], list[Row]]:
    """Divide rows into those to train on and those held out, both in their order.

    For `cls` each class has its share of the held-out rows, by largest remainder; a row with several labels counts
    for its rarest one. So have the good and the bad answers of `dpo`, where each is a row. No class is held out wholly,
    so a class of one row is never held out; of `tag`, no type of entity is, if it can be helped. Groups of rows that
    ask the same stay together, so that shares are exact where groups have one row, and never above it otherwise.

    Args:
        rows: Canonical rows.
        task: Their task.
        ratio: The share to hold out, from 0 to below 1.

    Raises:
        UndividedError: The ratio is above 0 and no row can be held out.
    """
    if ratio == 0:
        return list(rows), []
    groups: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[document_hash(asked_of(row, task))].append(index)
    classes = [_classes_of(row, task) for row in rows]
    shared = classes if task in ("cls", "dpo") else None
    held = _kept_back(_chosen(groups, shared, len(rows), ratio), groups, classes)
    if not held:
        raise UndividedError(
            f"{len(rows):,} rows cannot be divided into a training and a held-out part (held_out: {ratio:g}): "
            f"{_why_undivided(len(groups), classes, task)}",
            hint="give more rows, name a `validation:` set, or set `held_out: 0`",
        )
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [row for index, row in enumerate(rows) if index in held]


def num_shared(train: Sequence[Row], held_out: Sequence[Row], task: str) -> int:
    """How many held-out rows ask what a training row asks too: what a model has seen it may just remember.

    Args:
        train: The rows to train on.
        held_out: The rows to measure on, such as a file of their own.
        task: Their task.
    """
    seen = {document_hash(asked_of(row, task)) for row in train}
    return sum(document_hash(asked_of(row, task)) in seen for row in held_out)


def asked_of(row: Row, task: str) -> str:
    """What a row asks, as one text: all that the model is given before it answers (of `qa`, the context alone)."""
    if task == "sft":
        turns = row["messages"]
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
        return json.dumps(turns[:first], sort_keys=True)
    return json.dumps([row.get(key) for key in _ASKED[task]], sort_keys=True)


def _classes_of(row: Row, task: str) -> tuple[str, ...]:
    if task == "cls":
        return tuple(labels_of(row))
    if task == "tag":
        return tuple({split_tag(tag)[1] for tag in row["tags"] if tag != OUTSIDE})
    if task == "dpo" and "label" in row:
        return (str(row["label"]),)
    return ()


def _chosen(
    groups: Mapping[int, list[int]], classes: Sequence[tuple[str, ...]] | None, num_rows: int, ratio: float
) -> set[int]:
    """The hashes of the groups that are held out."""
    strata: dict[str, list[int]] = defaultdict(list)
    often: dict[str, int] = defaultdict(int)
    for label in (label for row in classes or () for label in row):
        often[label] += 1
    for key, members in groups.items():
        found = {label for index in members for label in classes[index]} if classes is not None else set()
        strata[min(found, key=lambda label: (often[label], label), default="")].append(key)
    sizes = {label: sum(len(groups[key]) for key in keys) for label, keys in strata.items()}
    quotas = _shares(sizes, max(round(num_rows * ratio), 1), ratio)
    held: set[int] = set()
    for label, keys in strata.items():
        left = quotas[label]
        ordered = sorted(keys)
        for key in ordered[:-1]:  # one of each class stays in training
            if len(groups[key]) <= left:
                held.add(key)
                left -= len(groups[key])
    return held


def _shares(sizes: Mapping[str, int], total: int, ratio: float) -> dict[str, int]:
    """How many rows each class gives, together `total`, by largest remainder; of equal ones the first by name.

    **Source**: Hamilton's method, as Balinski and Young 1982, "Fair Representation", chapter 2.
    """
    exact = {label: size * ratio for label, size in sizes.items()}
    shares = {label: int(share) for label, share in exact.items()}
    by_remainder = sorted(sizes, key=lambda label: (shares[label] - exact[label], label))
    for label in by_remainder[: max(total - sum(shares.values()), 0)]:
        shares[label] += 1
    return shares


def _kept_back(
    held: set[int], groups: Mapping[int, list[int]], classes: Sequence[tuple[str, ...]]
) -> set[int]:
    """The indices of held-out rows, without a group of each class that would else have none in training."""
    trained = {
        label for key, members in groups.items() if key not in held for i in members for label in classes[i]
    }
    for key in sorted(held, reverse=True):
        found = {label for index in groups[key] for label in classes[index]}
        if not found <= trained:
            held.discard(key)
            trained |= found
    return {index for key in held for index in groups[key]}


def _why_undivided(num_groups: int, classes: Sequence[Sequence[str]], task: str) -> str:
    if task == "cls":
        return f"{len({name for row in classes for name in row}):,} classes, and each keeps a row in training"
    return f"{num_groups:,} of them differ in what they ask, and something must stay in training"
