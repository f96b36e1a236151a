"""Names to code, lazily: `clm -> llmkit.objectives.clm:build`; a wrong name gets the nearest as answer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal, TypeVar

from llmkit.errors import UsageError

T = TypeVar("T")

ModelKind = Literal[
    "causal", "masked", "pairs", "seq2seq", "detector", "sequence", "tokens", "answers", "encoder"
]
"""What a model does: `causal` predicts the next token, `masked` fills gaps, `pairs` also says whether two texts belong
together, `seq2seq` writes an output to an input, `detector` finds replaced tokens; `sequence` judges a text, `tokens`
each token of it, `answers` finds where an answer stands, `encoder` gives what its body computes."""

SENTINELS = tuple(f"<|extra_{number}|>" for number in range(100))
"""Marks that stand for spans of text which were taken out, in the order of the text."""

BERT_ROLES = ("<|cls|>", "<|sep|>", "<|mask|>")
"""What stands for `[CLS]`, `[SEP]` and `[MASK]` in vocabularies that do not have these."""


@dataclass(frozen=True)
class Goal:
    """An objective as far as it is known without its code.

    Attributes:
        code: `module:function`; called with the recipe's `pretrain` section and the `Vocabulary`, it gives the
            objective.
        model: The kind of model that learns it.
        sections: Its settings' names in the `pretrain` section.
        tokens: Special tokens that it needs; a tokenizer that the recipe learns gets them.
        metrics: What an evaluation of it measures.
        learns_end: Whether the ends of documents are among its targets.
        end: A special token of its own that ends what the model writes, besides the end of text.
        isolates: Whether documents that share a row can be kept apart.
        positions: Whether its rows say where documents begin, isolated or not.
        other: Whether its rows come with text of another document.
        best: Of a task, the metric that tells a better model, without the `eval/` in front.
        packs: Of a task, whether several of its rows can stand in a line without seeing each other.
        chats: Of a task, whether its rows are conversations, written by a chat template.
        also: Of a task, other kinds of model that can do it; which one it is follows from the model, see `kind_for`.
    """

    code: str
    model: ModelKind
    sections: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("loss", "perplexity")
    learns_end: bool = False
    end: str = ""
    isolates: bool = False
    positions: bool = False
    other: bool = False
    best: str = "loss"
    packs: bool = False
    chats: bool = False
    also: tuple[ModelKind, ...] = ()


OBJECTIVES: Mapping[str, Goal] = {
    "clm": Goal(
        "llmkit.objectives.clm:build",
        "causal",
        metrics=("loss", "perplexity", "bits_per_byte"),
        learns_end=True,
        isolates=True,
    ),
    "mlm": Goal(
        "llmkit.objectives.mlm:build",
        "masked",
        sections=("mlm",),
        tokens=BERT_ROLES,
        metrics=("loss", "perplexity", "accuracy"),
    ),
    "mlm+nsp": Goal(
        "llmkit.objectives.nsp:build",
        "pairs",
        sections=("nsp", "mlm"),
        tokens=BERT_ROLES,
        metrics=("loss", "perplexity", "accuracy", "pair_accuracy"),
        other=True,
    ),
    "electra": Goal(
        "llmkit.objectives.electra:build",
        "detector",
        sections=("electra",),
        tokens=BERT_ROLES,
        metrics=("loss", "perplexity", "detector_loss", "accuracy", "recall"),
    ),
    "span": Goal("llmkit.objectives.span:build", "seq2seq", sections=("span",), tokens=SENTINELS),
    "denoise": Goal(
        "llmkit.objectives.denoise:build",
        "seq2seq",
        sections=("denoise",),
        tokens=("<|mask|>",),
        learns_end=True,
        positions=True,
    ),
    "infill": Goal(
        "llmkit.objectives.infill:build",
        "causal",
        sections=("infill",),
        tokens=(*SENTINELS, "<|eop|>"),
        end="<|eop|>",
    ),
    "fim": Goal(
        "llmkit.objectives.fim:build",
        "causal",
        sections=("fim",),
        tokens=("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        learns_end=True,
        isolates=True,
        positions=True,
    ),
}


TASKS: Mapping[str, Goal] = {
    "cls": Goal(
        "llmkit.objectives.cls:build",
        "sequence",
        sections=("cls",),
        metrics=("loss", "accuracy", "macro_f1", "mcc", "ece", "micro_f1"),
        best="accuracy",
    ),
    "regression": Goal(
        "llmkit.objectives.regression:build",
        "sequence",
        metrics=("loss", "pearson", "spearman", "mse"),
        best="spearman",
    ),
    "tag": Goal(
        "llmkit.objectives.tag:build",
        "tokens",
        sections=("tag",),
        metrics=("loss", "f1", "precision", "recall", "accuracy"),
        best="f1",
    ),
    "qa": Goal(
        "llmkit.objectives.qa:build",
        "answers",
        sections=("qa",),
        metrics=("loss", "f1", "exact_match", "best_f1", "best_exact_match", "has_answer_f1", "no_answer_f1"),
        best="f1",
    ),
    "seq2seq": Goal(
        "llmkit.objectives.seq2seq:build",
        "seq2seq",
        sections=("seq2seq",),
        metrics=("loss", "perplexity", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum"),
        best="loss",
        also=("causal",),
    ),
    "sft": Goal(
        "llmkit.objectives.sft:build",
        "causal",
        sections=("sft",),
        metrics=("loss", "perplexity", "accuracy"),
        packs=True,
        chats=True,
    ),
    "dpo": Goal(
        "llmkit.objectives.dpo:build",
        "causal",
        sections=("dpo",),
        metrics=("loss", "accuracy", "margin"),
        best="accuracy",
        chats=True,
    ),
    "embed": Goal(
        "llmkit.objectives.embed:build",
        "encoder",
        sections=("embed",),
        metrics=("loss", "recall_at_1", "recall_at_10", "mrr", "recall_at_5", "ndcg_at_10", "spearman"),
        best="loss",
    ),
}
"""What a model can be fine-tuned for on labelled rows; the objectives above, too, on text."""


@dataclass(frozen=True)
class Evaluation:
    """A way to measure a model, as far as it is known without its code.

    Attributes:
        code: `module:function`; called with a `Subject` and what is `Asked`, it gives a `Measurement`.
        metrics: Figures that it can give, in the order in which they are shown.
        best: The figure that tells a better model.
        reads: Settings of the `eval` section that it goes by, besides those that all do.
        shared: Whether several processes can share the work.
    """

    code: str
    metrics: tuple[str, ...]
    best: str
    reads: tuple[str, ...] = ()
    shared: bool = False


_WRITTEN = (
    "exact_match",
    "f1",
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "distinct_1",
    "distinct_2",
    "repetition",
)

_TIMED = (
    "latency_ms_p50",
    "latency_ms_p95",
    "rows_per_s",
    "tokens_per_s",
    "first_token_ms_p50",
    "first_token_ms_p95",
    "decode_tokens_per_s",
    "memory_bytes",
    "num_parameters",
    "file_bytes",
)

EVALUATIONS: Mapping[str, Evaluation] = {
    "text": Evaluation(
        "llmkit.run.measure.text:measure",
        ("loss", "perplexity", "bits_per_byte", "char_perplexity"),
        best="bits_per_byte",
        reads=("data", "rows", "context", "stride", "reference"),
        shared=True,
    ),
    "labelled": Evaluation(
        "llmkit.run.measure.labelled:measure",
        (),
        best="",
        reads=("data", "labelled", "rows", "noise"),
        shared=True,
    ),
    "choice": Evaluation(
        "llmkit.run.measure.choice:measure",
        ("accuracy", "accuracy_norm", "accuracy_bytes", "perplexity"),
        best="accuracy",
        reads=("data", "labelled", "rows", "choice"),
    ),
    "harness": Evaluation("llmkit.run.measure.harness:measure", (), best="", reads=("harness",)),
    "generation": Evaluation(
        "llmkit.run.measure.generation:measure",
        _WRITTEN,
        best="f1",
        reads=("data", "labelled", "rows", "generation"),
    ),
    "retrieval": Evaluation(
        "llmkit.run.measure.retrieval:measure",
        ("recall_at_1", "recall_at_5", "recall_at_10", "mrr", "exact_match", "f1"),
        best="mrr",
        reads=("data", "labelled", "rows", "retrieval", "generation"),
    ),
    "speed": Evaluation("llmkit.run.measure.speed:measure", _TIMED, best="latency_ms_p50", reads=("speed",)),
}
"""What a model can be asked. `labelled` stands for every task: its figures are the task's."""


@dataclass(frozen=True)
class Method:
    """A way to make a model smaller, as far as it is known without its code.

    Attributes:
        code: `module:function`; called with what is `Given` and the recipe's step, it gives what was `Made`.
        settings: The settings of a step that it reads, with what they are where the recipe says nothing; None: they
            are needed, or left out.
        needs: Settings that must be given.
        kinds: The kinds of models that it takes; empty: all.
    """

    code: str
    settings: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    kinds: tuple[ModelKind, ...] = ()


METHODS: Mapping[str, Method] = {
    "quantize": Method(
        "llmkit.compress.quantize:apply",
        {
            "format": "int8",
            "bits": None,
            "solver": "auto",
            "group": "auto",
            "symmetric": True,
            "smooth": 0.5,
            "damping": 0.01,
            "keep": [],
            "recover": None,
        },
    ),
    "prune": Method(
        "llmkit.compress.prune:apply",
        {
            "what": "weights",
            "share": None,
            "by": "auto",
            "pattern": "free",
            "scope": "layer",
            "stages": 1,
            "damping": 0.01,
            "keep": [],
            "recover": None,
        },
        needs=("share",),
    ),
    "distil": Method(
        "llmkit.compress.distil:apply",
        {"layers": None, "choose": "uniform", "channels": 1.0, "recover": {}},
        needs=(),
    ),
    "factorize": Method(
        "llmkit.compress.factorize:apply",
        {"share": None, "by": "auto", "keep": [], "recover": None},
        needs=("share",),
    ),
    "export": Method("llmkit.compress.export:apply", {"to": None, "type": "auto"}, needs=("to",)),
}
"""How a model is made smaller."""

_LOWER_IS_BETTER = frozenset(
    {
        "loss",
        "perplexity",
        "bits_per_byte",
        "char_perplexity",
        "detector_loss",
        "chosen_loss",
        "mse",
        "mae",
        "ece",
        "repetition",
        "latency_ms_p50",
        "latency_ms_p95",
        "first_token_ms_p50",
        "first_token_ms_p95",
        "memory_bytes",
        "num_parameters",
        "file_bytes",
    }
)

MEASURED = tuple(
    sorted({f"eval/{name}" for goal in (*OBJECTIVES.values(), *TASKS.values()) for name in goal.metrics})
)
"""What evaluations while training measure; not each of every objective."""

FIGURES = tuple(
    sorted(
        {name.removeprefix("eval/") for name in MEASURED}
        | {name for evaluation in EVALUATIONS.values() for name in evaluation.metrics}
    )
)
"""What `llmkit eval` measures; not each of every model."""


_UNDIRECTED = frozenset({"best_f1_threshold", "best_exact_match_threshold"})
_AVERAGED = ("macro_", "micro_", "weighted_", "samples_")


def direction_of(metric: str) -> Literal["lower", "higher"] | None:
    """Whether a model gets better as this figure falls or as it rises; None where neither can be said."""
    name = metric.removeprefix("eval/")
    if lower_is_better(name):
        return "lower"
    plain = next((name.removeprefix(mark) for mark in _AVERAGED if name.startswith(mark)), name)
    known = (
        (name in FIGURES and name not in _UNDIRECTED)
        or plain in ("f1", "precision", "recall")
        or name == "r2"
    )
    return "higher" if known else None


def lower_is_better(metric: str) -> bool:
    """Whether a model gets better as this metric falls; else as it rises."""
    return metric.removeprefix("eval/") in _LOWER_IS_BETTER


def kind_for(task: str, facts: Mapping[str, Any]) -> ModelKind:
    """The kind of model that a task is done by.

    Args:
        task: One on labelled rows.
        facts: What is known of its rows; they are encoded for one `kind` of model where the task is done by several.
    """
    kind: ModelKind = facts.get("kind") or TASKS[task].model
    return kind


def goal_of(objective: str) -> Goal:
    """What is known of an objective or a task.

    Raises:
        UsageError: There is none of that name.
    """
    return TASKS[objective] if objective in TASKS else find(OBJECTIVES, objective, "objective")


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` most likely meant, or None when nothing is close."""
    matches = get_close_matches(word.lower(), {c.lower(): c for c in choices}, n=1, cutoff=0.6)
    return next((c for c in choices if matches and c.lower() == matches[0]), None)


def load(code: str) -> Any:
    """Import what `module:attribute` stands for."""
    module, attribute = code.split(":")
    return getattr(import_module(module), attribute)


def find(registry: Mapping[str, T], name: str, kind: str) -> T:
    """What `name` stands for.

    Raises:
        UsageError: `name` is not registered; the message lists the known names and the nearest one.
    """
    if name not in registry:
        guess = nearest(name, list(registry))
        raise UsageError(
            f"unknown {kind} {name!r}; known: {', '.join(sorted(registry))}",
            hint=f"did you mean {guess!r}?" if guess else "",
        )
    return registry[name]
