"""The settings of measuring: what a model is asked, on what, and which figures must hold."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from llmkit.recipe.block import Block, Files, Words, as_list
from llmkit.recipe.units import Count, Ratio, Whole, shown, unit_error
from llmkit.registry import FIGURES, nearest

AVERAGES = tuple(
    f"{mean}_{name}"
    for mean in ("macro", "micro", "weighted", "samples")
    for name in ("precision", "recall", "f1")
)
"""Figures of classes and of tags, put together over them; `samples`: of rows with several labels."""
FURTHER: Mapping[str, tuple[str, ...]] = {
    "cls": ("exact_match",),
    "regression": ("mae", "r2"),
    "qa": (
        "has_answer_exact_match",
        "no_answer_exact_match",
        "best_f1_threshold",
        "best_exact_match_threshold",
    ),
    "dpo": ("chosen", "rejected", "chosen_loss", "kl"),
    "embed": ("pearson",),
    "mlm+nsp": ("pair_loss",),
}
"""By task or objective, figures that it gives besides those that it is known by."""
REPORTED = tuple(sorted({*FIGURES, *AVERAGES, *(name for some in FURTHER.values() for name in some)}))
"""All figures that may be asked for by name."""


def _figure(value: object) -> str:
    """A figure of an evaluation, whatever is evaluated."""
    if isinstance(value, str) and value in REPORTED:
        return value
    meant = nearest(str(value).removeprefix("eval/"), REPORTED)
    raise unit_error(
        f"`{shown(value)}` is no figure of an evaluation",
        f"did you mean `{meant}`?" if meant else f"write one of {', '.join(REPORTED)}",
    )


Figure = Annotated[str, PlainValidator(_figure), WithJsonSchema({"enum": list(REPORTED)})]
FigureList = Annotated[list[Figure], BeforeValidator(as_list, json_schema_input_type=Figure | list[Figure])]
"""Figures, of which one may stand without the brackets."""


def _as_counts(value: object) -> object:
    """One count may stand without the brackets of a list."""
    return [value] if isinstance(value, str | int | float) and not isinstance(value, bool) else value


Counts = Annotated[list[Count], BeforeValidator(_as_counts, json_schema_input_type=Count | list[Count])]


class Choices(Block):
    """How choices and continuations are scored."""

    separator: str = " "
    """What stands between a question and each choice, where neither brings a space of its own."""


class Harness(Block):
    """Tasks of lm-evaluation-harness."""

    tasks: Words
    """Their names, also names of groups and patterns (`arc_*`)."""
    include: str | None = None
    """A folder with task files of your own (YAML)."""
    shots: Annotated[Whole, Field(ge=0)] | None = None
    """Solved examples before each question; by default as the task says."""
    limit: Count | None = None
    """At most so many questions of each task."""
    backend: Literal["native", "harness"] = "native"
    """Who asks the model: `native`, our own scorer, which computes what requests share once; `harness`, its own."""
    chat: bool = False
    """Put each question into the model's chat template."""


class Generation(Block):
    """How the model writes where what it writes is measured."""

    max_new_tokens: Count = 128
    """Tokens that it writes at most."""
    beams: Count = 1
    """Hypotheses that a beam search keeps; 1 takes the likeliest token each time."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 writes the same each time; above, text is drawn."""
    top_k: Annotated[Whole, Field(ge=1)] | None = None
    """Draw among the k likeliest tokens only."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    stop: Words = []
    """Texts that end what is written."""
    chat: bool | Literal["auto"] = "auto"
    """Put prompts into the model's chat template; `auto`: where the model has one. Conversations always are."""
    bleu_tokenizer: Literal["auto", "13a", "zh", "char", "intl", "none"] = "auto"
    """How BLEU parts words; `auto`: `zh` for Chinese, else `13a`."""


class Retrieval(Block):
    """The passages to search, and how many are looked at."""

    corpus: Files | None = None
    """Files of passages: jsonl, csv or tsv with `text`, and `id` where queries name passages by it; txt has one a
    line."""
    top: Counts = [1, 5, 10]
    """The k of recall@k."""
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """A text's vector: the `mean` of its tokens' vectors, that of its first token (`cls`), or of its `last`; `auto`: as
    the model was trained, where that is known, else the mean."""
    query_prefix: str | None = None
    """What stands before each query, such as `"query: "`; by default as the model was trained."""
    passage_prefix: str | None = None
    """What stands before each passage, such as `"passage: "`; by default as the model was trained."""
    index: Literal["numpy", "faiss"] = "numpy"
    """What searches: `numpy` compares with every passage; `faiss` likewise, faster."""
    reader: str | None = None
    """A run or model that answers from the passages found; what it writes is measured, too."""
    passages: Count = 3
    """With `reader`: passages that it reads."""
    prompt: str = "{passages}\n\nQuestion: {question}\nAnswer:"
    """With `reader`: what it goes on from."""


class Speed(Block):
    """What `llmkit eval --speed` times."""

    batch: Counts = [1, 8]
    """Rows computed together."""
    length: Counts = [128]
    """Tokens of each row."""
    new_tokens: Count = 32
    """Tokens written after each row, by models that write."""
    rounds: Count = 5
    """How often each is timed, model after model in turn, when all are warm."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What matrix products are computed in; `auto`: as the model's run, fp32 for other models."""


class Gate(Block):
    """What must hold, else the command ends with exit code 4."""

    fail_under: dict[str, float] = {}
    """The worst value of a figure that is good enough: `{accuracy: 0.9}`. Of a figure of which less is better, such as
    `loss`, the largest."""
    max_drop: Ratio | None = None
    """How much worse than `against` a figure may be, as a share of its value there."""
    against: str | None = None
    """The run or model to compare with, on the same data."""
    metric: Figure | None = None
    """The figure that `max_drop` is about; by default the one that tells better models of the task."""


class Noise(Block):
    """How well the model bears damaged text."""

    typos: Ratio = 0.0
    """The share of characters that are dropped, doubled, swapped or replaced; measured beside the plain text."""
    seeds: Annotated[Whole, Field(ge=1)] = 1
    """How many differently damaged copies are measured."""
