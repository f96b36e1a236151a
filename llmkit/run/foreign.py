"""A model that no run here fine-tuned, taken for what its own files say that it can do."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import UsageError
from llmkit.recipe import load_recipe
from llmkit.recipe.architectures import in_words
from llmkit.registry import TASKS
from llmkit.run.folders import report_of, run_name
from llmkit.run.tasks import TaskRun

if TYPE_CHECKING:
    from llmkit.run.measure.asked import Asked, Subject

_LONGEST = 2048
_MADE_HERE = ("tokenize", "pretrain", "finetune")
_EVERYONES = ("model", "adapter", *_MADE_HERE)
"""Names of folders that tell nothing of the model in them."""
_NO_NAME = re.compile(r"LABEL_(\d+)")
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


def model_name(word: str) -> str:
    """What a model is called by its path: its folder's name; of a name that all models have, that of the one around."""
    return run_name(_telling(Path(word).absolute())[-1])


def home_of_foreign(place: Path, runs: Path) -> Path:
    """The folder in `runs` for the figures of a model from elsewhere, which no other model has.

    Args:
        place: The model's folder.
        runs: The folder of run folders.
    """
    parts = _telling(place.absolute())
    names = [run_name("-".join(parts[-count:])) for count in range(1, len(parts) + 1)]
    return next((runs / name for name in names if _is_free(runs / name, place)), runs / names[-1])


def _telling(place: Path) -> Sequence[str]:
    """The parts of a path up to the last one that tells models apart."""
    parts = [part for part in place.parts if part != place.anchor]
    while len(parts) > 1 and parts[-1] in _EVERYONES:
        parts.pop()
    return parts or ["model"]


def _is_free(home: Path, place: Path) -> bool:
    """Whether no run is there, and no figures of another model."""
    if any((home / verb).is_dir() for verb in _MADE_HERE):
        return False
    known = (report_of(path.parent).get("model") for path in home.glob("*/report.json"))
    folders = {str(one.get("folder")) for one in known if isinstance(one, dict)}
    return all(Path(folder).absolute() == place.absolute() for folder in folders)


def foreign_run(subject: "Subject", task: str, asked: "Asked") -> TaskRun:
    """What stands for the run of a model that was trained elsewhere, or for something else.

    Args:
        subject: The model.
        task: What it is asked.
        asked: What to measure it on: its labels are looked at.

    Raises:
        UsageError: The model cannot do the task, does not say what its classes are called, or there is no data.
        DataError: The rows cannot be read.
    """
    from llmkit.models.build import kind_of

    kind: dict[str, Any] = {}
    if task in ("sft", "dpo", "seq2seq"):
        found = kind_of(str(subject.place))
        needed = (TASKS[task].model, *TASKS[task].also)
        if found not in needed:
            raise UsageError(
                f"{subject.place} is {in_words(found)}; `{task}` needs {' or '.join(map(in_words, needed))}",
                hint="name such a model",
            )
        kind = {"kind": found} if TASKS[task].also else {}
    config = json.loads((subject.place / "config.json").read_text(encoding="utf-8"))
    own, said = _settings(task, subject.place, config)
    recipe: dict[str, Any] = {
        "llmkit": 1,
        "name": "measured",
        "seed": asked.seed,
        "language": asked.language,
        "finetune": {
            "task": task,
            "model": {"name": str(subject.place), "context": _context(subject)},
            "data": {"files": "-"},
            "train": {"length": "1 epochs"},
            **({task: own} if own else {}),
        },
    }
    facts = {"task": task, "labels": [], "form": "", "counts": {}, **kind}
    run = TaskRun(subject.place, load_recipe(recipe), facts, subject.precision, said=said)
    return _with_facts(run, task, config, asked)


def _with_facts(run: TaskRun, task: str, config: Mapping[str, Any], asked: "Asked") -> TaskRun:
    """The same with the form of its rows, whether questions may have no answer, and the names of its classes."""
    from llmkit.run.measure.labels import data_of, read

    data = data_of(run, asked)
    if data is None:
        holder = asked.held_out_by
        if holder is None or holder.task is None:
            raise UsageError(
                f"{run.place}: no run trained it, so nothing was held out to measure it on",
                hint="give labelled rows: --data FILES",
            )
        form, counts, labels = str(holder.task.facts["form"]), holder.task.facts["counts"], set[str]()
        labels.update(holder.task.facts["labels"])
    else:
        found = read(task, data, asked, told=False)
        form, counts, labels = found.form, dict(found.counts), set(found.labels)
    names = _labels(run.place, config, labels) if task in ("cls", "tag") else []
    facts = {**run.facts, "form": form, "counts": counts, "labels": names}
    return TaskRun(run.place, run.loaded, facts, run.precision, run.plan, run.said)


def _labels(place: Path, config: Mapping[str, Any], used: set[str]) -> list[str]:
    """The names of the model's classes; numbers where it has none and the rows are labelled by numbers.

    Raises:
        UsageError: It has none, and the rows have names.
    """
    known = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    known = known or {0: "LABEL_0", 1: "LABEL_1"}  # what transformers makes of no entry
    names = [known[number] for number in sorted(known)]
    if not all(_NO_NAME.fullmatch(name) for name in names) or used <= set(names):
        return names
    numbers = [str(number) for number in sorted(known)]
    if used <= set(numbers):
        return numbers
    some, own = ", ".join(sorted(used)[:10]), ", ".join(names[:3])
    raise UsageError(
        f"{place}: it does not say what its {len(names)} classes are called ({own}, ...), and the rows say {some}",
        hint=f"name them in order as `id2label` in {place / 'config.json'}, or label the rows 0 to {len(names) - 1}",
    )


def _context(subject: "Subject") -> int:
    """Tokens that the model reads: as many as it can, within reason."""
    from llmkit.models.tasks import longest_input

    path = subject.place / "sentence_bert_config.json"
    said = json.loads(path.read_text(encoding="utf-8")).get("max_seq_length") if path.is_file() else None
    longest = longest_input(str(subject.place), trusted=subject.trust_remote_code)
    return min(said or _LONGEST, longest or 512, _LONGEST)


def _settings(task: str, place: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The task's own settings as the model's files say them, and what a report should say of that."""
    if task == "cls":
        return {"multiple": config.get("problem_type") == "multi_label_classification"}, {}
    if task == "seq2seq":
        own = {"prefix": config["prefix"]} if config.get("prefix") else {}
        return own, own
    if task == "sft":
        return {"pack": False}, {}
    if task == "dpo":
        return {"loss": "simpo"}, {
            "compared": "by the mean log-probability of a token; there is no reference model"
        }
    if task == "embed":
        own = {"pooling": _pooling(place), **_prefixes(place)}
        return own, own
    return {}, {}


def _pooling(place: Path) -> str:
    """How vectors are made of what the model gives; the mean where nothing says it."""
    path = place / "1_Pooling" / "config.json"
    modes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    chosen = [name for mode, name in _POOLINGS.items() if modes.get(mode)]
    if len(chosen) > 1 or (modes and not chosen):
        raise UsageError(
            f"{path}: vectors are made in a way that is not known here: {', '.join(m for m in modes if modes[m])}",
            hint="llmkit knows the mean, the first or the last token",
        )
    return chosen[0] if chosen else "mean"


def _prefixes(place: Path) -> dict[str, str]:
    path = place / "config_sentence_transformers.json"
    prompts = json.loads(path.read_text(encoding="utf-8")).get("prompts", {}) if path.is_file() else {}
    return {
        "anchor_prefix": str(prompts.get("query", "")),
        "document_prefix": str(prompts.get("document", prompts.get("passage", ""))),
    }
