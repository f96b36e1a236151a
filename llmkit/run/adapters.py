"""Adapters as a person names them, on the one base that they were made for."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import UsageError
from llmkit.registry import kind_for
from llmkit.run.folders import find_adapter
from llmkit.run.tasks import TaskRun, task_run
from llmkit.train.places import model_folder, teacher_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmkit.objectives.base import Objective


@dataclass(frozen=True)
class Chosen:
    """An adapter that was named.

    Attributes:
        word: As it was named, without its weight.
        place: Its folder.
        weight: How much it counts.
        run: The run that made it; None where it is from elsewhere.
    """

    word: str
    place: Path
    weight: float
    run: TaskRun | None

    @property
    def base(self) -> str:
        """The folder or name of the model that it was made for."""
        if self.run is not None:
            return model_folder(str(self.run.section.model.name))
        fields = json.loads((self.place / "adapter_config.json").read_bytes())
        return model_folder(str(fields.get("base_model_name_or_path") or ""))


@dataclass(frozen=True)
class Adapted:
    """A base that computes with adapters.

    Attributes:
        model: In evaluation mode, on CPU in float32.
        names: What each adapter is called in it, with its weight.
        tokenizer: That of the adapters.
        source: The folder or name of that tokenizer.
        base: The folder or name of the base.
        task: What the first run among them learned; None where no run made them.
    """

    model: "PreTrainedModel"
    names: dict[str, float]
    tokenizer: Any
    source: str
    base: str
    task: "Objective | None"


def choose_adapters(words: Sequence[str], runs: Path) -> list[Chosen]:
    """The adapters that are meant by `RUN`, `FOLDER` or `RUN=WEIGHT`.

    Raises:
        MissingError: One is not there.
        UsageError: One is named twice, or its weight is no number.
    """
    found: list[Chosen] = []
    for word in words:
        name, weight = _weighed(word)
        place = find_adapter(name, runs)
        if any(place.resolve() == one.place.resolve() for one in found):
            raise UsageError(f"{name} is named twice", hint=f"name it once, with its weight: {name}=2")
        found.append(Chosen(name, place, weight, task_run(place)))
    return found


def _weighed(word: str) -> tuple[str, float]:
    name, mark, weight = word.rpartition("=")
    if not mark or Path(word).exists():
        return word, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise UsageError(f"{word}: {weight!r} is no weight", hint=f"write a number: {name}=0.5") from None


def load_adapted(chosen: Sequence[Chosen], *, base: str | None = None) -> Adapted:
    """Load the base of some adapters, and put them into it.

    Args:
        chosen: One or several.
        base: The base that was named; by default what they were made for.

    Raises:
        MissingError: The base is gone.
        UsageError: They were made for different models, or know different tokens.
    """
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.models.build import kind_of
    from llmkit.models.combining import put_adapters
    from llmkit.models.growing import grow_vocabulary
    from llmkit.models.heads import choose_heads
    from llmkit.models.tasks import build_task_model
    from llmkit.objectives.base import Prepares, Stops
    from llmkit.objectives.make import make_task
    from llmkit.objectives.texts import pad_id

    base = _one_base(chosen, base)
    first = next((one for one in chosen if one.run is not None), None)
    run = first.run if first is not None else None
    source = _tokenizer_of(chosen, base)
    tokenizer = load_tokenizer(source)
    kind = kind_of(base) if run is None else kind_for(run.section.task, run.facts)
    task: Objective | None = None if run is None else make_task(run.section, run.material())
    model, _ = build_task_model(
        base,
        kind,
        labels=() if run is None else run.material().labels,
        number=run is not None and run.section.task == "regression",
        pad_token_id=pad_id(tokenizer),
        trusted=run is not None and run.section.model.trust_remote_code,
    )
    added = len(tokenizer) - len(load_tokenizer(base))
    if added > 0:
        grow_vocabulary(model, len(tokenizer), added, seed=0 if run is None else run.loaded.recipe.seed)
    names = put_adapters(model, [(one.place, one.weight) for one in chosen])
    choose_heads(model, kind)
    if task is not None and isinstance(task, Prepares):
        task.prepare(model)
    if run is not None and run.section.task == "cls":  # as where it was trained
        kinds = ("single_label_classification", "multi_label_classification")
        model.config.problem_type = kinds[run.section.cls.multiple]
    if task is not None and isinstance(task, Stops):
        model.generation_config.eos_token_id = sorted({*task.stops, tokenizer.eos_token_id} - {None})
    return Adapted(model.eval(), names, tokenizer, source, base, task)


def _one_base(chosen: Sequence[Chosen], named: str | None) -> str:
    """The base of all of them.

    Raises:
        UsageError: There are several, by their weights.
    """
    bases = {one.word: one.base for one in chosen}
    if named is not None:
        bases = {named: model_folder(named), **bases}
    (first, base), *others = bases.items()
    for word, other in others:
        if Path(other).resolve() != Path(base).resolve() and teacher_weights(other) != teacher_weights(base):
            raise UsageError(
                f"{word} was made for {other}, and {first} {'is' if first == named else 'was made for'} {base}",
                hint="adapters go together on one base",
            )
    return base


def _tokenizer_of(chosen: Sequence[Chosen], base: str) -> str:
    """Where the tokenizer is that all of them know: beside the first, or the base's.

    Raises:
        UsageError: They know different tokens, or ask by different chat templates.
    """
    from llmkit.data.tokenizers import fingerprint, load_tokenizer

    places = {
        one.word: str(one.place) if (one.place / "tokenizer_config.json").is_file() else base
        for one in chosen
    }
    known = {
        word: (fingerprint(made), getattr(made, "chat_template", None))
        for word, made in ((word, load_tokenizer(place)) for word, place in places.items())
    }
    (first, its), *others = known.items()
    for word, other in others:
        if other != its:
            what = "other tokens" if other[0] != its[0] else "another chat template"
            raise UsageError(
                f"{word} was trained with {what} than {first}",
                hint="train both with the same tokenizer and `finetune.chat_template`",
            )
    return places[first]
