"""The models of a chain beside the first, target by target, on some of what they are judged by."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmkit.errors import MissingError, UsageError
from llmkit.report.console import Reporter
from llmkit.run.compression.judge import Judged, is_exported
from llmkit.run.compression.material import MOST_TOKENS, Material, text_batches

if TYPE_CHECKING:
    from llmkit.objectives.base import Batch, LossModule

_MOST_BATCHES = 16
_MOST_ROWS = 1024


def pair_all(judged: Sequence[Judged], material: Material, reporter: Reporter) -> None:
    """Compare each model of a chain with the first; `paired` and `num_parameters` are filled in.

    A model that its runtime cannot be asked as the objective asks is passed over, and says so.

    Args:
        judged: The chain, its first model first.
        material: What it is made of.
        reporter: Told what happens.
    """
    first = material.core(judged[0].artefact.place)
    judged[0].num_parameters = _parameters(first)
    batches = judged_batches(material, first) if judged[1:] else []
    for one in judged[1:]:
        reporter.phase("compress", f"comparing {one.artefact.word} target by target")
        try:
            core = material.core(one.artefact.place)
            one.num_parameters = _parameters(core)
            one.paired = paired_of(first, core, batches)
        except (UsageError, MissingError) as error:
            if not is_exported(one.artefact):
                raise
            one.paired = {"num_targets": 0, "why": error.message}


def paired_of(first: "LossModule", core: "LossModule", batches: "Sequence[Batch]") -> dict[str, Any]:
    """Two models compared, as a report has it; see `evaluate.paired`."""
    from llmkit.evaluate.paired import compare_targets

    return compare_targets(first, core, batches).to_dict()


def judged_batches(material: Material, core: "LossModule", most: int = _MOST_BATCHES) -> "list[Batch]":
    """Micro-batches of what models are judged by, evenly spaced over all of it; never of what steps looked at.

    Args:
        material: What the chain is made of.
        core: A model of the chain.
        most: How many at most.

    Raises:
        UsageError: Nothing says what to measure on.
        DataError: There is nothing to measure on.
    """
    if material.task is not None:
        return _of_rows(material, core, most)
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.run.measure.text import learned_by, text_of

    subject, asked = material.subject, material.asked
    streams = text_of(subject, asked, load_tokenizer(str(subject.place))).streams()
    return text_batches(core, learned_by(subject), streams, batches=most)


def _of_rows(material: Material, core: "LossModule", most: int) -> "list[Batch]":
    from llmkit.data.loader import evenly_spaced
    from llmkit.data.sample_batches import held_out_batches
    from llmkit.run.measure.labels import rows_of

    assert material.task is not None
    asked = replace(material.asked, held_out_by=material.subject)
    store = rows_of(material.task, material.subject, asked, core).store
    rows = min(_MOST_ROWS, material.section.rows or _MOST_ROWS)
    found = held_out_batches(store, tokens=MOST_TOKENS, max_rows=rows, world_size=1, rank=0)
    groups = [group for group in found if group]
    objective = core.objective
    return [
        objective.collate([objective.encode(row) for _, row in groups[number]])
        for number in evenly_spaced(len(groups), most).tolist()
    ]


def _parameters(core: "LossModule") -> int:
    from llmkit.models.runtime_model import RuntimeModel

    model: Any = core.model
    if isinstance(model, RuntimeModel):
        return model.num_parameters()
    return sum(parameter.numel() for parameter in model.parameters())
