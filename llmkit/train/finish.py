"""After the last step: the model folder, the card, the report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmkit import __version__
from llmkit.data.tokenizers import end_texts, frame_texts, save_tokenizer
from llmkit.models.freezing import count_learning
from llmkit.models.save import save_model
from llmkit.objectives.base import Accompanies, Batch, LossModule
from llmkit.plan import Plan
from llmkit.recipe.architectures import kind_of_config
from llmkit.recipe.schema import Finetune
from llmkit.registry import goal_of
from llmkit.report.card import write_model_card
from llmkit.report.report import collect, write_report
from llmkit.report.trying import try_trained
from llmkit.train.adapted import export_adapter
from llmkit.train.job import Job
from llmkit.train.state import TrainState


def finish(
    job: Job,
    plan: Plan,
    core: LossModule,
    tokenizer: PreTrainedTokenizerBase,
    state: TrainState,
    figures: Mapping[str, float],
    some_rows: Callable[[], Batch] | None = None,
) -> None:
    """Export the model with its card, then write the report whose status says that all is done.

    What was trained beside the model is exported first, each to a folder of its own name beside the model's; so is an
    adapter, before it is merged into the model.

    Args:
        job: The run.
        plan: Its numbers.
        core: Model and objective; an adapter is merged in place.
        tokenizer: Travels along.
        state: That of the model's weights.
        figures: Named `eval/...`, of this state.
        some_rows: A batch of real rows on the device, to compare a merged model on; only adapters need it.

    Raises:
        GateError: A merged model predicts otherwise than it did with its adapter.
    """
    folder, model = Path(job.folder), core.model
    recipe = job.checked_recipe()
    section = job.section()
    goal = goal_of(section.objective)
    kind = kind_of_config(model.config.to_dict()) if goal.also else goal.model
    adapted = isinstance(section, Finetune) and section.adapter is not None
    facts: dict[str, Any] = {
        "name": recipe.name,
        "kind": Path(job.folder).name,
        **({"task": section.objective, "base": str(section.model.name)} if job.rows else {}),
        "language": recipe.language,
        "command": job.command,
        "next_command": try_trained(section.objective, str(folder.parent), section.prompts),
        "model": {
            "model_type": model.config.model_type,
            "num_parameters": plan.num_parameters if adapted else model.num_parameters(),
            **({"num_trained": count_learning(model).trained} if job.rows else {}),
        },
        "tokenizer": job.tokenizer_figures,
        "final": dict(figures),
    }
    card = {**collect(folder, {**facts, "status": "done"}), "run": str(folder), "model_kind": kind}
    tokenizer.model_max_length = plan.context
    if job.rows:
        pass  # a pretrained model's own tokenizer frames texts as the model knows it
    elif kind in ("masked", "pairs", "detector"):
        frame_texts(tokenizer)
    elif kind == "seq2seq":
        end_texts(tokenizer)
    manifest = {"kind": "model", "llmkit": __version__, "step": state.step, "identity": job.identity}
    for name, part in core.parts.items():
        if isinstance(part, PreTrainedModel):
            save_model(
                folder / name,
                part,
                facts={**manifest, "kind": name},
                companions=[lambda place: save_tokenizer(tokenizer, place)],
            )

    def add(place: Path) -> None:
        save_tokenizer(tokenizer, place)
        write_model_card(place, card)

    def add_all(place: Path) -> None:
        add(place)
        if isinstance(core.objective, Accompanies):
            core.objective.accompany(place)

    if isinstance(section, Finetune) and section.adapter is not None and some_rows is not None:
        facts["adapter"] = export_adapter(
            folder / "adapter", core, section, some_rows(), facts=manifest, companion=add
        )
    if not adapted or facts["adapter"]["merged"]:
        save_model(folder / "model", model, facts=manifest, companions=[add_all])
    write_report(folder, {**facts, "status": "done"})
