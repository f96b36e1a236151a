"""Where what a teacher says is kept: by all that it follows from, so that a run finds its own and no other."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llmkit.durable import hash_file
from llmkit.errors import UsageError
from llmkit.plan import Plan
from llmkit.recipe.objectives import Distil
from llmkit.recipe.schema import Finetune, Section
from llmkit.registry import goal_of
from llmkit.run.folders import CACHE, Options
from llmkit.train.places import model_folder, teacher_weights

_VERSION = 1


def check_cache(distil: Distil, verb: str) -> None:
    """Refuse, before anything is read, to keep what a model says whose weights are not here to be told apart by.

    Raises:
        UsageError: The teacher is a name on the Hub.
    """
    folder = Path(model_folder(distil.teacher))
    if distil.cache is not None and not folder.is_dir():
        raise UsageError(
            f"{verb}.distil.cache: {distil.teacher!r} is a name on the Hub, and a cache goes by the teacher's weights",
            hint=f"download it first (hf download {distil.teacher} --local-dir FOLDER) and give that folder",
        )


def cache_folder(section: Section, plan: Plan, options: Options, made_of: dict[str, Any], seed: int) -> str:
    """The folder of what the section's teacher says of its rows; empty where nothing is kept.

    Args:
        section: The recipe's.
        plan: The run's numbers.
        options: As for every verb.
        made_of: What the rows follow from: text and tokenizer, or labelled rows; and, of text, the sources' weights.
        seed: The recipe's.
    """
    cache, distil = plan.teacher_cache, section.distil
    if not cache or distil is None:
        return ""
    teacher = Path(model_folder(distil.teacher))
    content = {
        "version": _VERSION,
        "teacher": [teacher_weights(distil.teacher), hash_file(teacher / "config.json")],
        "temperature": distil.temperature,
        "precision": plan.precision,
        **{name: cache[name] for name in ("by", "top_k", "outputs", "rows_a_part")},
        "rows": {name: value for name, value in made_of.items() if name != "weights"},
        "section": _what_is_read(section),
        # Which row comes at a training position, and what chance makes of it.
        **({"seed": seed, "weights": made_of.get("weights")} if cache["by"] == "position" else {}),
    }
    address = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    return str(options.runs / CACHE / "teacher" / address)


def _what_is_read(section: Section) -> dict[str, Any]:
    """The settings that decide what a model reads of a row, and what it is to say there."""
    names = {*goal_of(section.objective).sections, "chat_template", "augment", "isolate_documents"}
    found = section.model_dump(mode="json", include=names)
    found |= {"objective": section.objective, "context": section.model.context}
    if isinstance(section, Finetune) and section.augment:
        from llmkit.data.augment.thesaurus import fingerprint as thesauri

        found["thesauri"] = thesauri(section.augment)
    return found
