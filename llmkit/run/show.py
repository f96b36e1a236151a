"""`llmkit show`: rows as a model gets them, with what it learns of each token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import UsageError
from llmkit.recipe import Loaded
from llmkit.registry import OBJECTIVES, TASKS
from llmkit.report.console import Reporter
from llmkit.run.folders import Options

if TYPE_CHECKING:
    from llmkit.data.chat import MaskedPiece
    from llmkit.data.samples import LabelledRow
    from llmkit.objectives.base import Example, Ints, Material, Objective

_SAID = ("label", "score", "answers")
"""Of a row, what the model is to say of it."""


@dataclass(frozen=True)
class Shown:
    """A text of a row.

    Attributes:
        place: The file and line it comes from.
        pieces: Its tokens.
        facts: What else is known of it, by name.
    """

    place: str
    pieces: "Sequence[MaskedPiece]"
    facts: Mapping[str, Any] = field(default_factory=dict)


def recipe_of_run(word: str, runs: Path) -> Path | None:
    """The recipe that a run of fine-tuning was made by; None where `word` is no such run."""
    for place in (Path(word), runs / word):
        for folder in (place, place / "finetune", place.parent):
            if (folder / "resolved.yaml").is_file() and folder.name == "finetune":
                return folder / "resolved.yaml"
    return None


def show(
    loaded: Loaded,
    options: Options,
    reporter: Reporter,
    *,
    sample: int,
    seed: int = 0,
    held_out: bool = False,
) -> list[Shown]:
    """Some rows of a recipe's `finetune` section, encoded as training does it.

    Args:
        loaded: The recipe.
        options: As for every verb.
        reporter: Told what is known of the rows.
        sample: How many; all, where there are fewer.
        seed: Which.
        held_out: Of the held-out rows instead of those to learn from.

    Returns:
        One entry a text: a preference has two.

    Raises:
        UsageError: The recipe has no such section, or its rows are not labelled ones.
        DataError: A row is wrong.
    """
    section = loaded.recipe.finetune
    if section is None or section.task in OBJECTIVES:
        raise UsageError(
            "the recipe has no rows to show: no `finetune` section with a task on labelled rows",
            hint="a text as tokens: llmkit tokenize TEXT --show MODEL",
        )
    import numpy as np

    from llmkit.data.samples import Samples
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.objectives.base import Material
    from llmkit.objectives.make import make_task
    from llmkit.run.finetune import with_base
    from llmkit.run.rows import prepare_rows

    loaded = with_base(loaded, options)
    prepared = prepare_rows(loaded, options, reporter)
    tokenizer = load_tokenizer(prepared.tokenizer)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UsageError(f"{prepared.tokenizer} is written in Python and does not tell its pieces")
    material = Material(
        tokenizer, prepared.context, prepared.labels, loaded.recipe.language, dict(prepared.facts)
    )
    objective = make_task(section, material)
    rows = Samples(prepared.folder, "held_out" if held_out else "train")
    numbers = np.random.default_rng(seed).permutation(len(rows))[:sample]
    return [
        shown for number in numbers for shown in _shown(objective, material, section.task, rows[int(number)])
    ]


def _shown(objective: "Objective", material: "Material", task: str, row: "LabelledRow") -> list[Shown]:
    from llmkit.data.chat import masked_pieces
    from llmkit.objectives.texts import CUT

    example = objective.encode({**row, "seed": 0})
    said = {name: row[name] for name in _SAID if name in row}
    if cut := int(example.get(CUT, 0)):
        said["cut"] = cut
    texts = _texts(objective, task, example)
    found = []
    for name, (ids, targets) in texts.items():
        facts = {**({"text": name} if len(texts) > 1 else {}), **said}
        if TASKS[task].model == "tokens":
            facts["tags"] = [material.labels[number] if number >= 0 else None for number in targets.tolist()]
        found.append(Shown(row["place"], masked_pieces(ids, targets, material.tokenizer), facts))
    return found


def _texts(objective: "Objective", task: str, example: "Example") -> "dict[str, tuple[Ints, Ints]]":
    """By name what is read or written of an example, and at each token's own place what is learned there."""
    import numpy as np

    from llmkit.objectives.base import NOT_LEARNED, Shows

    if isinstance(objective, Shows):
        return objective.texts(example)
    ids = example["input_ids"]
    by_token = TASKS[task].model == "tokens"
    return {"text": (ids, example["targets"] if by_token else np.full_like(ids, NOT_LEARNED))}
