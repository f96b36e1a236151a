"""The settings of each task: blocks of the `finetune` section, and what a task has where nothing is said."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from llmkit.recipe.block import Block
from llmkit.recipe.units import Count, Whole
from llmkit.registry import TASKS


class Classes(Block):
    """How texts are sorted into classes."""

    labels: list[str] = []
    """The classes in the order of their numbers; by default those that the training rows have: numbers as numbers,
    else as texts sort."""
    multiple: bool = False
    """Whether a text may have several labels, or none: each is then judged by itself."""
    balance: Literal["none", "root", "classes"] = "none"
    """How often rows of a class are learned from: as often as there are such rows, as the `root` of their number, or
    all `classes` alike. Rare rows then come several times in an epoch, and not all of the others."""


class Tags(Block):
    """How words are tagged."""

    labels: list[str] = []
    """The tags in the order of their numbers; by default those of the training rows, `O` first."""
    pieces: Literal["first", "all"] = "first"
    """Which tokens of a word learn its tag: the `first`, or `all`, those after the first then `I-X` for `B-X`. A word
    is always tagged by its first."""
    overlap: Annotated[Whole, Field(ge=0)] = 32
    """Tokens that two windows of a sentence share, where it is longer than the model reads; each word is learned and
    tagged in one window."""


class Loss(Block):
    """What is lowered in training, where that is not the plain loss of the task; evaluations measure the plain one."""

    weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0)]] = "none"
    """With `cls` and `tag`: how much a row of a class weighs. `balanced`: the rows of each class the same together; or
    by label, `{spam: 5}`, others 1. They are scaled so that a row weighs 1 on average."""
    focal: Annotated[float, Field(ge=0)] = 0.0
    """With `cls` and `tag`: gamma of the focal loss, which multiplies a row's loss by `(1 - p) ** gamma`, so that what
    is right already counts less; 2 is common."""
    r_drop: Annotated[float, Field(ge=0)] = 0.0
    """With `cls` and `tag`: alpha of R-Drop. Each row is computed twice, dropout differs, and how far the two lie apart
    is lowered too. 1 to 5 are common; it takes twice the time and a model with dropout."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """With `cls` and `regression`: alpha of mixup. Each row is mixed with another one, drawn for it, in shares from
    Beta(alpha, alpha): the embeddings of their tokens, and their losses. 0.2 mixes most rows little, 1 evenly."""
    custom: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """A loss of your own, `my_package:MyLoss`: a function, or a class without arguments whose objects are called, of
    logits [N, C] and targets [N], which gives the sum of their losses. With `cls`, `tag`, `seq2seq` and `sft`."""
    trust_custom_code: bool = False
    """Run the code that `custom` names. Only for code you have read."""


class Augment(Block):
    """One way in which rows are changed while they are learned from, each time otherwise; those held out never are."""

    method: Literal["synonyms", "swap", "delete", "insert", "typos", "similar", "mask", "back_translate"]
    """`synonyms` puts words of the same meaning in, `insert` adds such words, `swap` exchanges two words, `delete`
    leaves words out (the four of EDA); `typos` hits a neighbouring key, leaves a letter out or doubles it; `similar`
    writes Chinese characters that sound or look alike; `mask` hides tokens from the model; `back_translate` takes
    what two runs of yours make of a text, one there and one back. Where words are not parted by spaces, each character
    is one."""
    through: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    """With `back_translate`: two runs of `task: seq2seq`, one that translates there and one that translates back. All
    texts are translated once, before training, as the runs write (beams, prefix), and kept."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The share of a text's words that are changed, of its characters for `typos` and `similar`, of its tokens for
    `mask`; one at least."""
    rows: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The share of rows that are changed; the others are learned as they are."""
    thesaurus: str | None = None
    """With `synonyms` and `insert`: a file with words of the same meaning on each line, `big, large, huge`; by default
    a small one of English or Chinese, as the recipe's `language` says."""


AUGMENTED: Mapping[str, tuple[str, ...]] = {
    "text": ("cls", "regression", "seq2seq", "embed"),
    "mask": ("cls", "regression", "tag"),
}
"""The tasks whose rows may be changed in their text, or in their tokens: what is learned does not depend on these."""
CRITERION = ("cls", "tag", "seq2seq", "sft")
"""The tasks whose loss is the cross-entropy of logits and targets."""
UNPROMPTED: Mapping[str, str] = {
    "qa": "a question is asked of a text, and a prompt has none",
    "embed": "a vector shows a person nothing",
}
"""The tasks whose models cannot be tried with a prompt while they train, and why."""

TAUGHT = (*CRITERION, "qa", "regression")
"""The tasks that a teacher can help with: what both models say of a row can be compared."""

MIXED = ("cls", "regression")
"""The tasks whose rows can be mixed: a model says one thing of a whole text."""

WEIGHTED = ("cls", "tag")
"""The tasks whose targets are a few classes."""


class Answers(Block):
    """How answers are found in a text."""

    stride: Count = 128
    """Tokens that two windows of a text share, where it is longer than the model reads beside the question; at most
    half of a window."""
    longest: Count = 30
    """Tokens that an answer has at most, when it is looked for. Longer ones are learned all the same."""
    candidates: Count = 20
    """How many answers of each window are kept, the best ones, with their scores."""
    no_answer_threshold: float = 0.0
    """Where some questions have no answer: by how much the score of "none" must be above that of the best answer. Each
    evaluation also says which threshold would have been best (`best_f1_threshold`)."""
    rules: Literal["auto", "squad", "squad2", "cmrc"] = "auto"
    """How answers are compared: as SQuAD 1.1, SQuAD 2.0 (some questions have no answer) or CMRC 2018 (Chinese, by
    characters); `auto` goes by the rows."""


class Written(Block):
    """How a text is written to another."""

    prefix: str = ""
    """What stands before each source, such as `"translate English to Chinese: "`; kept with the model, which is used
    with it from then on."""
    separator: str | None = None
    """What stands between source and target in the rows of a decoder whose tokenizer has no chat template; by default a
    new line."""
    max_target: Count = 128
    """Tokens that are written at most, in training and evaluation; a longer target is cut, and its end is not learned
    then."""
    target_language: str | None = None
    """The language that is written, by which BLEU and ROUGE cut words; by default the recipe's, or what the script of
    the targets says."""
    write: bool = True
    """Whether each evaluation lets the model write, for BLEU, chrF and ROUGE; `false` measures the loss alone, which is
    many times as fast."""
    num_beams: Count = 1
    """How many ways of writing on are kept in view at each token: 1 takes the likeliest token each time, 4 or 5 write a
    little better and slower. Kept with the model."""


_Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
TemplateOptions = Annotated[
    dict[_Variable, StrictBool | StrictInt | StrictFloat | str],
    Field(json_schema_extra={"additionalProperties": False}),
]


class Conversations(Block):
    """What is learned of conversations."""

    learn: Literal["all", "last"] = "all"
    """Which turns of the assistant: `all` of a conversation, or the `last` alone, which is exact with every template,
    also with one that changes earlier turns when later ones come."""
    pack: bool = True
    """Put conversations behind each other in a line, where none sees another, so that nothing is computed for
    padding; `false` fills them up to the longest."""
    template_options: TemplateOptions = {}
    """Variables of the chat template, such as `{enable_thinking: false}`; the saved template has them as defaults."""


class Preferences(Block):
    """How a better answer is told from a worse one."""

    loss: Literal["dpo", "ipo", "orpo", "simpo", "kto"] = "dpo"
    """`dpo` and `ipo` compare with the model as it was at first (`ipo` draws each pair to a fixed distance, which
    overfits less), `simpo` and `orpo` do without it (`orpo` also learns the chosen answer). `kto` needs no pairs: its
    rows are answers that are good or bad, and of a pair it makes one of each."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """How near the model stays to what it was: lower goes further away. By default 0.1, for `simpo` 2. For `orpo` the
    weight of the comparison beside the chosen answer."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """With `dpo` and `simpo`: the share of pairs that are thought to be labelled the wrong way round."""
    margin: Annotated[float, Field(ge=0)] | None = None
    """With `simpo`: by how much the chosen answer is to be better, as `beta` times nats a token; by default 1."""
    desirable_weight: Annotated[float, Field(gt=0)] | None = None
    """With `kto`: how much a good answer counts. By default 1, or more where there are so few that all of them together
    would count less than all bad ones."""
    undesirable_weight: Annotated[float, Field(gt=0)] | None = None
    """With `kto`: how much a bad answer counts. By default 1, or more where all good ones together would count more
    than 4/3 times as much as all bad ones."""
    template_options: TemplateOptions = {}
    """Variables of the chat template, such as `{enable_thinking: false}`; the saved template has them as defaults."""

    @property
    def beta_or_default(self) -> float:
        """`beta`, or what is usual with the loss."""
        return (2.0 if self.loss == "simpo" else 0.1) if self.beta is None else self.beta

    @property
    def margin_or_default(self) -> float:
        """`margin`, or what is usual."""
        return 1.0 if self.margin is None else self.margin

    @property
    def needs_reference(self) -> bool:
        """Whether the model as it was at first is asked too."""
        return self.loss in ("dpo", "ipo", "kto")

    def weights(self, good: int, bad: int) -> tuple[float, float]:
        """How much a good and a bad answer count, of so many of each.

        What is not set is 1, or as much more as brings the weight of all good answers to between 1 and 4/3 of that of
        all bad ones.

        **Source**: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", section 4.2.
        """
        own, other = self.desirable_weight or 1.0, self.undesirable_weight or 1.0
        if not good or not bad:
            return own, other
        ratio = own * good / (other * bad)
        if ratio < 1 and self.desirable_weight is None:
            own /= ratio
        elif ratio > _MOST_GOOD and self.undesirable_weight is None:
            other *= ratio / _MOST_GOOD
        return own, other


_MOST_GOOD = 4 / 3
"""The weight of all good answers, as a share of that of all bad ones, at most."""
PREFERRED: Mapping[str, tuple[str, ...]] = {
    "margin": ("simpo",),
    "label_smoothing": ("dpo", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Settings of `dpo` that only some of its losses have."""


class Embeddings(Block):
    """How texts become vectors."""

    pooling: Literal["mean", "cls", "last"] = "mean"
    """A text's vector: the `mean` of its tokens' vectors, that of its first token (`cls`), or of its `last`, for
    decoders."""
    temperature: Annotated[float, Field(gt=0)] = 0.05
    """What cosines are divided by: lower looks more at the nearest wrong documents."""
    anchor_prefix: str = ""
    """What stands before each anchor, such as `"query: "`."""
    document_prefix: str = ""
    """What stands before each document (positive or negative), such as `"passage: "`."""
    scored: Literal["cosent", "cosine"] = "cosent"
    """What is learned of scored pairs: `cosent` their order by score, whatever the scale; `cosine` that the cosine is
    the score, which lies between -1 and 1."""


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cls": {"lr": 5e-5},
    "regression": {"lr": 5e-5},
    "tag": {"lr": 5e-5},
    "qa": {"lr": 5e-5, "length": "2 epochs"},
    "seq2seq": {"lr": 3e-4, "eval_rows": 200},
    "sft": {"lr": 2e-5},
    "dpo": {"lr": 1e-6, "length": "1 epochs"},
    "embed": {"lr": 2e-5, "length": "1 epochs", "batch": "64 samples"},
}
"""By task: the peak learning rate of AdamW for the whole model, a length and batch other than the usual, and how many
rows an evaluation takes before the last, which takes all."""

LENGTH, BATCH = "3 epochs", "32 samples"
ADAPTER_LR_RATIO = 10
"""An adapter starts from nothing and is small: it learns at so many times the rate of the whole model."""

_OPTIM: Mapping[str, Any] = {
    "warmup": "6%",
    "schedule": "linear",
    "min_lr_ratio": 0.0,
    "betas": [0.9, 0.999],
    "weight_decay": 0.01,
}
_ANY_OPTIMIZER = ("warmup", "schedule", "min_lr_ratio")


def with_task_defaults(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A `finetune` section with the task's length, batch and optimizer settings where it says nothing of them."""
    defaults = DEFAULTS.get(str(section.get("task")))
    train = section.get("train", {})
    if defaults is None or not isinstance(train, Mapping):
        return section
    optim = train.get("optim", {})
    if not isinstance(optim, Mapping):
        return section
    is_adamw = optim.get("name", "adamw") == "adamw"
    rate = defaults["lr"] * (ADAPTER_LR_RATIO if section.get("adapter") else 1)
    usual = {
        key: value
        for key, value in {"lr": rate, **_OPTIM}.items()
        if is_adamw or (key in _ANY_OPTIMIZER and optim.get("name") != "schedule_free")
    }
    filled = {
        "length": defaults.get("length", LENGTH),
        "batch": defaults.get("batch", BATCH),
        **train,
        "optim": {**usual, **optim},
    }
    measured = section.get("eval") or {}
    if isinstance(measured, Mapping) and (measured or "eval_rows" in defaults):
        section = {**section, "eval": {"rows": defaults.get("eval_rows"), **measured}}
    return {**section, "train": filled}


def other_task_sections(task: str) -> set[str]:
    """The blocks of the `finetune` section that are settings of other tasks only."""
    own = TASKS[task].sections if task in TASKS else ()
    return {name for goal in TASKS.values() for name in goal.sections} - set(own)


Task = Literal["cls", "regression", "tag", "qa", "seq2seq", "sft", "dpo", "embed"]
