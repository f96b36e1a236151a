"""Which form a task's rows have."""

from collections.abc import Callable, Mapping, Sequence

from llmkit.data.records.answers import recognise_qa
from llmkit.data.records.classes import recognise_cls, recognise_regression
from llmkit.data.records.conversations import recognise_sft
from llmkit.data.records.form import Form
from llmkit.data.records.pairs import recognise_embed, recognise_seq2seq
from llmkit.data.records.preferences import recognise_dpo
from llmkit.data.records.record import Record
from llmkit.data.records.tags import recognise_tag
from llmkit.recipe.labelled import Labelled
from llmkit.registry import find

_RECOGNISERS: Mapping[str, Callable[[Sequence[Record], Labelled], Form]] = {
    "cls": recognise_cls,
    "regression": recognise_regression,
    "tag": recognise_tag,
    "qa": recognise_qa,
    "seq2seq": recognise_seq2seq,
    "sft": recognise_sft,
    "dpo": recognise_dpo,
    "embed": recognise_embed,
}


def recognise(task: str, sample: Sequence[Record], data: Labelled) -> Form:
    """The form of a task's rows, by the first of them and by what the recipe says.

    Raises:
        DataError: It is none that the task knows; shows the keys found and the forms known.
        UsageError: There is no such task.
    """
    return find(_RECOGNISERS, task, "task")(sample, data)
