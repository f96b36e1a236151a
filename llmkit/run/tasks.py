"""Models that were trained for a task: what is known of them, and what they say of texts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import UsageError
from llmkit.hardware import detect_elsewhere
from llmkit.recipe import Loaded, load_recipe
from llmkit.recipe.schema import Finetune
from llmkit.run.folders import find_model

if TYPE_CHECKING:
    from llmkit.objectives.base import LossModule, Material


@dataclass(frozen=True)
class TaskRun:
    """A run that trained a model for a task.

    Attributes:
        place: The model's folder.
        loaded: The run's recipe.
        facts: What is known of its rows (`data.json`).
        precision: What it computed in.
        plan: What was decided for its training; empty where that is not known.
        said: What a report should say of how it is asked, where no recipe says it.
    """

    place: Path
    loaded: Loaded
    facts: Mapping[str, Any]
    precision: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def section(self) -> Finetune:
        """How the model was trained."""
        section = self.loaded.recipe.finetune
        assert section is not None
        return section

    def material(self) -> "Material":
        """What the task is made of."""
        from llmkit.data.tokenizers import load_tokenizer
        from llmkit.objectives.base import Material

        return Material(
            tokenizer=load_tokenizer(str(self.place)),
            max_length=self.section.model.context,
            labels=tuple(self.facts["labels"]),
            language=self.loaded.recipe.language,
            facts=self.facts,
        )


def task_run(place: Path) -> TaskRun | None:
    """The run around a model folder, if it trained the model for a task on labelled rows."""
    recipe, data, plan = (place.parent / name for name in ("resolved.yaml", "data.json", "plan.json"))
    if not (recipe.is_file() and data.is_file() and plan.is_file()):
        return None
    facts = json.loads(data.read_bytes())
    if "task" not in facts:
        return None
    decided = json.loads(plan.read_bytes())
    return TaskRun(place, load_recipe(recipe), facts, str(decided["precision"]), decided)


def writing(run: TaskRun) -> TaskRun:
    """The run as one whose model is asked to write, where its evaluations measure the loss alone."""
    section = run.section
    asked = section.model_copy(update={"seq2seq": section.seq2seq.model_copy(update={"write": True})})
    recipe = run.loaded.recipe.model_copy(update={"finetune": asked})
    return replace(run, loaded=replace(run.loaded, recipe=recipe))


def predict(word: str, texts: Sequence[Mapping[str, Any]], *, runs: Path) -> list[dict[str, Any]]:
    """What a model that was trained for a task says of rows.

    Args:
        word: A run, its name, or its model folder.
        texts: Rows in the task's form, without what is asked for.
        runs: The folder of run folders.

    Raises:
        UsageError: The model was not trained for a task that says something of single rows.
        MissingError: There is no such model.
    """
    from llmkit.evaluate.predict import predict as say
    from llmkit.objectives.base import Predicts

    place = find_model(word, runs, adapters=True)
    run = task_run(place)
    if run is None:
        raise UsageError(f"{place}: not a model that a run fine-tuned", hint=f"llmkit generate {word} TEXT")
    core, _ = load_core(writing(run))
    if not isinstance(core.objective, Predicts):
        raise UsageError(
            f"{place}: a model trained for {run.section.task} says nothing of single rows",
            hint=f"llmkit generate {word} TEXT, or llmkit eval {word}",
        )
    if run.section.task == "qa" and any("context" not in text for text in texts):
        raise UsageError(
            "a question is answered from a text, and none is given",
            hint=f'llmkit predict {word} "A question?" --other "The text."',
        )
    return say(core, texts)


def load_core(run: TaskRun) -> "tuple[LossModule, str]":
    """The model and its task, ready to be measured or asked, and where it is.

    Raises:
        MissingError: The model is gone, or the one that its training began with, which it is compared with.
        UsageError: The folder holds no model that was trained for the task.
    """
    from llmkit.evaluate.task import load_task, refer_to
    from llmkit.models.attention import kernels_of, use_attention
    from llmkit.models.runtimes import runtime_of
    from llmkit.objectives.base import Refers
    from llmkit.train.places import model_folder

    device = detect_elsewhere(run.loaded.recipe.machine, "a task").device
    section, material = run.section, run.material()
    base = model_folder(str(section.model.name))
    core = load_task(run.place, section, material, base=base, device=device, bf16=run.precision == "bf16")
    if run.plan and runtime_of(run.place) is None:
        # As in training, for the same bits; a kernel that this machine lacks gives way to the usual one.
        name, known = str(run.plan["attention"]), kernels_of(core.model)
        use_attention(core.model, name if name in known else "sdpa", isolate=bool(run.plan.get("packed")))
    if isinstance(core.objective, Refers) and core.objective.needs_reference:
        trusted, seed = section.model.trust_remote_code, run.loaded.recipe.seed
        refer_to(core, base, material, device=device, trusted=trusted, seed=seed)
    return core, device
