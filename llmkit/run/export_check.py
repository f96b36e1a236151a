"""A smoke export: the model that a run begins with, in the form of another runtime and run there, before it is trained.

What a trained model could not become is so known before hours are spent. The code is that of `llmkit compress`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.durable import scratch_folder
from llmkit.errors import MissingError, RunError, UsageError
from llmkit.plan import model_fields
from llmkit.plan.counted import is_counted
from llmkit.recipe.compression import Step
from llmkit.recipe.schema import Finetune, Model, Section
from llmkit.registry import METHODS, load
from llmkit.report.console import Reporter
from llmkit.train.steps import saved_steps

if TYPE_CHECKING:
    from llmkit.objectives.base import LossModule
    from llmkit.train.job import Job

_LATER = ("adapter", "distil")
"""Parts of a section that leave no trace in the form of what is exported."""


def refuse_ahead(section: Section, verb: str) -> None:
    """Refuse what is known before any text is read: a package that is missing, an architecture without an exporter.

    Args:
        section: What trains the model.
        verb: Its name in the recipe.

    Raises:
        MissingError: A package is missing.
        UsageError: There is no exporter for the architecture, or no whole model would be left to export.
    """
    if not section.export_check:
        return
    from llmkit.compress.gguf_export import FAMILIES, need_gguf
    from llmkit.compress.onnx_export import need_onnx

    if is_counted(section.model):
        raise UsageError(
            f"{verb}.export_check: an n-gram model is counted, not trained, and no other runtime reads it",
            hint="leave `export_check` out",
        )
    if isinstance(section, Finetune) and section.adapter is not None and not section.adapter.merge:
        raise UsageError(
            f"{verb}.export_check: an adapter that is not merged leaves no model to export",
            hint="adapter.merge=true, or leave `export_check` out",
        )
    for form in section.export_check:
        try:
            {"onnx": need_onnx, "gguf": need_gguf}.get(form, lambda: None)()
        except MissingError as error:
            raise _named(error, verb, form) from error
    kind = _type_of(section.model)
    if "gguf" in section.export_check and kind is not None and kind not in FAMILIES:
        raise UsageError(
            f"{verb}.export_check: to: gguf: there is no exporter for {kind}",
            hint=f"there is one for {', '.join(FAMILIES)}; or leave `gguf` out",
        )


def _type_of(spec: Model) -> str | None:
    """What transformers calls the architecture; None where only the Hub knows."""
    fields: Mapping[str, Any] | None = model_fields(spec)
    path = Path(str(spec.name)) / "config.json"
    if fields is None and path.is_file():
        fields = json.loads(path.read_bytes())
    return None if fields is None else fields.get("model_type")


def check_exports(job: "Job", reporter: Reporter) -> None:
    """Export the model that a run begins with, run it, and remove it; not again where there is a checkpoint.

    Args:
        job: The run; `export_check` of its section says which forms.
        reporter: Told what was found.

    Raises:
        UsageError: The architecture or the tokenizer has no such form.
        MissingError: A package is missing.
        RunError: The exported model does not say what the model says.
    """
    forms = job.section().export_check
    if not forms or saved_steps(Path(job.folder) / "checkpoints"):
        return
    import torch

    from llmkit.compress.given import Given
    from llmkit.data.tokenizers import save_tokenizer

    with torch.random.fork_rng(devices=[]), scratch_folder(Path(job.folder)) as place:
        core, tokenizer = _fresh(job)
        save_tokenizer(tokenizer, place)
        given = Given(core, (), place, job.seed, lambda line: None)
        for form in forms:
            reporter.phase("export check", f"`to: {form}`, before anything is trained")
            try:
                made = load(METHODS["export"].code)(given, Step(method="export", to=form))
                with scratch_folder(Path(job.folder)) as target:
                    made.write(target)
            except (UsageError, MissingError, RunError) as error:
                raise _named(error, job.verb, form) from error
            reporter.note(_told(form, made.facts))
            for line in made.warnings:
                reporter.warn(f"export check: {line}")


def _fresh(job: "Job") -> "tuple[LossModule, Any]":
    """The model with the weights that the run begins with, as it will be left at the end, and its tokenizer."""
    from llmkit.models.rounded import plain
    from llmkit.train.build import build_core, build_task_core, open_data
    from llmkit.train.samples import open_samples

    section = {key: value for key, value in job.recipe[job.verb].items() if key not in _LATER}
    bare = replace(job, recipe={**job.recipe, job.verb: section})
    if job.rows:
        rows = open_samples(bare)
        core, tokenizer = build_task_core(bare, bare.checked_plan(), rows)[0], rows.tokenizer
    else:
        tokenizer = open_data(bare).tokenizer
        core = build_core(bare, bare.checked_plan(), tokenizer)
    plain(core.model)
    core.model.float().cpu().eval()
    return core, tokenizer


def _told(form: str, facts: Mapping[str, Any]) -> str:
    where = f"run by {facts['runtime']}" if facts.get("runtime") else "read back"
    return f"checked: the new model can be exported `to: {form}` and, {where}, says the same"


def _named(
    error: UsageError | MissingError | RunError, verb: str, form: str
) -> UsageError | MissingError | RunError:
    """The same error, with the setting that asked for the export."""
    hint = f"{error.hint}; or leave `{form}` out" if error.hint else f"leave `{form}` out"
    return type(error)(f"{verb}.export_check: {error.message}", hint=hint)
