"""Families of architectures as far as they are known without torch: their names, and what they can learn."""

from collections.abc import Mapping
from typing import Any

from llmkit.registry import OBJECTIVES, ModelKind

WAYS = ("preset", "architecture", "name", "config")
"""The keys of a `model` block that say which model; `config` also goes with `architecture`."""

KINDS: Mapping[str, tuple[ModelKind, ...]] = {
    "llama": ("causal",),
    "mistral": ("causal",),
    "qwen2": ("causal",),
    "gpt2": ("causal",),
    "qwen3": ("causal",),
    "mamba2": ("causal",),
    "bert": ("masked", "pairs"),
    "roberta": ("masked",),
    "modernbert": ("masked",),
    "electra": ("masked", "detector"),
    "t5": ("seq2seq",),
    "bart": ("seq2seq",),
    "rnn": ("causal",),
    "lstm": ("causal",),
    "gru": ("causal",),
    "cnn": ("causal",),
    "ngram": ("causal",),
}
"""Architecture -> the kinds of model that it makes here."""

OWN: Mapping[str, Mapping[str, Any]] = {
    "rnn": {"model_type": "llmkit-recurrent", "cell": "rnn"},
    "lstm": {"model_type": "llmkit-recurrent", "cell": "lstm"},
    "gru": {"model_type": "llmkit-recurrent", "cell": "gru"},
    "cnn": {"model_type": "llmkit-cnn"},
    "ngram": {"model_type": "llmkit-ngram"},
}
"""llmkit's own architectures, as their configurations say it."""

NOT_COUNTED = (
    "distil",
    "model.embeddings",
    "model.dropout",
    "train.label_smoothing",
    "train.z_loss",
    "train.l1",
    "train.gradient_noise",
    "train.ema",
)
"""Settings of `pretrain` for what is learnt by gradients: an n-gram model, which is counted, has none of them."""

DEFAULT_PRESETS: Mapping[ModelKind, str] = {
    "causal": "gpt-mini",
    "masked": "bert-mini",
    "pairs": "bert-mini",
    "seq2seq": "t5-mini",
    "detector": "electra-mini",
}
"""What a recipe that names no model gets, by the kind of model that its objective needs."""

_IN_WORDS: Mapping[ModelKind, str] = {
    "causal": "a causal language model",
    "masked": "a masked language model",
    "pairs": "a masked language model with a next-sentence head",
    "seq2seq": "an encoder-decoder",
    "detector": "a detector of replaced tokens",
    "sequence": "a classifier of texts",
    "tokens": "a tagger of tokens",
    "answers": "a model that finds answers",
    "encoder": "an encoder of texts",
}


_HEADS: Mapping[str, ModelKind] = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "answers",
}
"""How classes of transformers end that have a head for a task."""


def in_words(kind: ModelKind) -> str:
    """What a kind of model is called."""
    return _IN_WORDS[kind]


def kind_of_config(fields: Mapping[str, Any]) -> ModelKind:
    """What kind of model a saved configuration is of, by the class that it names."""
    architecture = (fields.get("architectures") or [""])[0]
    if fields.get("is_encoder_decoder"):
        return "seq2seq"
    if "ForMaskedLM" in architecture:
        return "masked"
    if "ForPreTraining" in architecture:
        return "detector" if fields.get("model_type") == "electra" else "pairs"
    for ending, kind in _HEADS.items():
        if architecture.endswith(ending):
            return kind
    if architecture.endswith("Model") and not architecture.endswith("LMHeadModel"):
        return "encoder"
    return "causal"


_FAMILY_OF_PRESET = {"gpt": "llama"}
_FAMILY_OF_PUBLISHED = {"smollm2": "llama", "llama": "llama", "mistral": "mistral", "qwen3": "qwen3"}
_SIZES = ("tiny", "mini", "small", "base")


def with_default_model(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A `pretrain` section with the preset for its objective where it names no model."""
    model, goal = section.get("model", {}), OBJECTIVES.get(str(section.get("objective", "clm")))
    if goal is None or not isinstance(model, Mapping) or any(model.get(way) is not None for way in WAYS):
        return section
    return {**section, "model": {**model, "preset": DEFAULT_PRESETS[goal.model]}}


def family_of_preset(preset: str) -> str:
    """The architecture of a preset: `gpt-mini` and `llama-3.1-8b` -> `llama`, `bert-base` -> `bert`."""
    family, _, size = preset.rpartition("-")
    published = _FAMILY_OF_PUBLISHED.get(preset.split("-", 1)[0])
    if published is not None and size not in _SIZES:
        return published
    return _FAMILY_OF_PRESET.get(family, family or preset)


def preset_of_family(architecture: str, size: str) -> str:
    """The name of a family's preset: `llama`, `mini` -> `gpt-mini`."""
    prefix = next(
        (name for name, family in _FAMILY_OF_PRESET.items() if family == architecture), architecture
    )
    return f"{prefix}-{size}"


def family_of_config(fields: Mapping[str, Any]) -> str:
    """The architecture of a configuration: its `model_type`, llmkit's own by their names in a recipe."""
    for name, own in OWN.items():
        if own["model_type"] == fields.get("model_type") and own.get("cell", "lstm") == fields.get(
            "cell", "lstm"
        ):
            return name
    return str(fields.get("model_type"))


def misfit(objective: str, architecture: str, kinds: tuple[ModelKind, ...]) -> tuple[str, str] | None:
    """Why an architecture cannot learn an objective, and what would fit; None where it can.

    Args:
        objective: A registered objective.
        architecture: Its name.
        kinds: The kinds of model that it makes.
    """
    needed = OBJECTIVES[objective].model
    if needed in kinds:
        return None
    made = " or ".join(_IN_WORDS[kind] for kind in kinds) or "none of them"
    architectures = [name for name, has in KINDS.items() if needed in has and name != "ngram"]
    objectives = [name for name, goal in OBJECTIVES.items() if goal.model in kinds]
    hint = f"architectures that fit: {', '.join(architectures)}"
    if objectives:
        hint += f"; or with {architecture}: objective {', '.join(objectives)}"
    return f"objective {objective} needs {_IN_WORDS[needed]}, and {architecture} is {made}", hint
