"""The recipe, schema version 1: what a person can ask for. Only `machine` says anything about hardware.

Every setting is declared once, here: name, type, range, unit, default, and its text (the docstring below it).
The loader, the messages, `llmkit recipe explain`, the docs and the published JSON Schema all read this file.
Rules that tie several settings together are in `checks.py`, and in `published.py` as JSON Schema.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmkit.recipe.architectures import with_default_model
from llmkit.recipe.block import Block, Files, as_list
from llmkit.recipe.compression import Calibration, Step, Target
from llmkit.recipe.evaluation import (
    Choices,
    Figure,
    FigureList,
    Gate,
    Generation,
    Harness,
    Noise,
    Retrieval,
    Speed,
)
from llmkit.recipe.labelled import Labelled
from llmkit.recipe.machine import Machine as Machine
from llmkit.recipe.objectives import (
    Denoise,
    Distil,
    Fim,
    Infill,
    Masked,
    Pairs,
    ReplacedTokens,
    Span,
    tokens_for,
)
from llmkit.recipe.parts import Adapter, Freeze, LayerDecay, Unfreeze
from llmkit.recipe.preparation import Prepare
from llmkit.recipe.tasks import (
    Answers,
    Augment,
    Classes,
    Conversations,
    Embeddings,
    Loss,
    Preferences,
    Tags,
    Written,
    with_task_defaults,
)
from llmkit.recipe.training import Checkpoint as Checkpoint
from llmkit.recipe.training import EvalDuring as EvalDuring
from llmkit.recipe.training import Optim as Optim
from llmkit.recipe.training import Sampling as Sampling
from llmkit.recipe.training import StopEarly as StopEarly
from llmkit.recipe.training import Train as Train
from llmkit.recipe.training import Tuning as Tuning
from llmkit.recipe.units import (
    Count,
    Part,
    Ratio,
    Several,
    Size,
    Whole,
    shown,
    unit_error,
)

Preset = Literal[
    "gpt-tiny", "gpt-mini", "gpt-small", "gpt-base", "gpt-medium", "gpt-large", "gpt-1b",
    "gpt2-tiny", "gpt2-mini", "gpt2-small", "gpt2-base",
    "qwen3-tiny", "qwen3-mini", "qwen3-small", "qwen3-base",
    "mamba2-tiny", "mamba2-mini", "mamba2-small", "mamba2-base",
    "bert-tiny", "bert-mini", "bert-small", "bert-base",
    "roberta-tiny", "roberta-mini", "roberta-small", "roberta-base",
    "modernbert-tiny", "modernbert-mini", "modernbert-small", "modernbert-base",
    "electra-tiny", "electra-mini", "electra-small", "electra-base",
    "t5-tiny", "t5-mini", "t5-small", "t5-base",
    "bart-tiny", "bart-mini", "bart-small", "bart-base",
    "rnn-tiny", "rnn-mini", "rnn-small", "rnn-base",
    "lstm-tiny", "lstm-mini", "lstm-small", "lstm-base",
    "gru-tiny", "gru-mini", "gru-small", "gru-base",
    "cnn-tiny", "cnn-mini", "cnn-small", "cnn-base",
    "smollm2-135m", "smollm2-360m", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b", "mistral-7b",
    "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b",
]  # fmt: skip


def _version(value: object) -> object:
    """Say that another version needs another llmkit, rather than that 2 is not 1."""
    if value == 1 and not isinstance(value, bool):
        return 1
    raise unit_error(
        f"`{shown(value)}` is not a version of the recipe's schema", "this llmkit reads `llmkit: 1`"
    )


class Columns(Block):
    """Which column of a table-like source holds what."""

    text: str = "text"
    """The column (or JSON key, dots for nested ones: `meta.body`) that holds the text."""


class Source(Block):
    """Where text comes from: files (globs, folders, `-` for stdin) or a data set by name."""

    name: str | None = None
    """What reports call this source; by default the name of its file or folder."""
    files: Files | None = None
    """Paths, globs (`data/**/*.jsonl.zst`), folders or URLs (`s3://bucket/*.parquet`), from the current folder or
    else the recipe's; `-` reads stdin, `stdlib:` is the Python standard library's own sources. txt, md, py, jsonl,
    csv, tsv, parquet, warc, each also .gz or .zst."""
    dataset: str | None = None
    """A data set on the Hub or in a folder, read with `datasets`: `owner/name` or `owner/name:config`."""
    split: str = "train"
    """Which split of `dataset` to read."""
    format: Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "warc"] = "auto"
    """The form of the files; `auto` goes by the name's ending."""
    columns: Columns = Columns()
    """Which column holds the text, for formats that have columns."""
    documents: Literal["auto", "file", "paragraph", "line"] = "auto"
    """What one document of a text file is: the file, a paragraph (blank lines between) or a line, the last two cut
    at 64 Ki characters. `auto`: a file, and one above 64 KiB is cut at paragraph or line ends into pieces of about
    32 KiB."""
    encoding: str = "utf-8"
    """The encoding of text files, such as `utf-8` or `gb18030`."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """This source's share of the training rows, relative to the other weights; by default its size."""
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    """With `weight`: read this source at most so many times over; what it then lacks goes to the others."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a row that is no text or a file that cannot be read: `stop` names it and ends, `skip` counts
    it, keeps an example and goes on."""
    limit: Size | None = None
    """Read at most so much text of this source, whole documents in their order; by default all of it."""


Sources = Annotated[list[Source], BeforeValidator(as_list, json_schema_input_type=Source | list[Source])]


class TextForm(Block):
    """What a tokenizer does to text before it looks for its pieces; anything but the defaults loses something."""

    unicode: Literal["keep", "nfc", "nfkc"] = "keep"
    """Unicode form: `nfc` joins letters and accents, `nfkc` also makes full-width forms and ligatures plain."""
    lowercase: bool = False
    """Make capitals small."""
    strip_accents: bool = False
    """Take accents away."""


class Tokenize(Block):
    """Make a tokenizer from text (or take an existing one) and turn the text into token shards."""

    algorithm: Literal["bpe", "wordpiece", "unigram", "chars", "words"] = "bpe"
    """How the vocabulary is learnt: `bpe` (byte-level pair encoding), `wordpiece` (BERT's), `unigram`
    (SentencePiece's), `chars` (one token a Han character, pieces for the rest), `words` (whole words, Chinese ones
    as a dictionary cuts them). Each can spell any text."""
    vocab_size: Several = 16_000
    """Entries of the vocabulary, special tokens included."""
    tokenizer: str | None = None
    """An existing tokenizer, by folder or Hub name; nothing is trained then."""
    sample: Size = 100_000_000
    """How much text the tokenizer learns from: a deterministic sample of the training documents."""
    special_tokens: list[str] = []
    """Further special tokens, after the algorithm's own."""
    normalise: TextForm = TextForm()
    """What the tokenizer does to text before it looks for its pieces; by default nothing, so decoding is exact."""
    byte_fallback: bool = True
    """Spell what the vocabulary lacks by its bytes; `false` makes it `[UNK]`. `bpe` always spells by bytes."""
    chat_template: str | None = None
    """How a conversation becomes text: `chatml`, or a file with a Jinja template; kept with the tokenizer."""
    data: Sources | None = None
    """The text; by default what `pretrain.data` names."""
    prepare: Prepare = Prepare()
    """What is done to the text before it is learnt from, by tokenizer and model; by default nothing."""
    held_out: Part | None = None
    """The share of documents kept out of training, by document hash; by default `pretrain.held_out`."""


class Model(Block):
    """The network: one of `preset`, `architecture`, `name` or `config`; by default what suits the objective."""

    preset: Preset | None = None
    """A shape that ships with llmkit: a family and a size, without embeddings about 1 (`tiny`), 6 (`mini`), 25
    (`small`) or 90 million (`base`) parameters; `gpt` goes on to a billion. Or the shape of a published model, without
    its weights (`llama-3.1-8b`). By default the `mini` of `gpt`, `bert`, `t5` or `electra`, as the objective needs."""
    architecture: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] | None = None
    """The kind of network: a `model_type` of `transformers`, or `rnn`, `lstm`, `gru`, `cnn`, `ngram`. `config` holds
    its fields; those left out are as in the family's `mini` preset, and without presets as `transformers` has them."""
    name: str | None = None
    """A pretrained model, by folder or Hub name; training goes on from its weights."""
    config: dict[str, Any] | None = None
    """Fields of the `architecture`; or a `transformers` configuration written out, with its `model_type`."""
    context: Several = 512
    """Tokens in one training row; also the longest text the model is made for."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout probability wherever the architecture has dropout; by default the architecture's own."""
    embeddings: str | None = None
    """A file of word vectors (word2vec, GloVe or fastText, as text or word2vec's binary form, also .gz): the embeddings
    of tokens that are words of it begin there."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for code you have read."""


Form = Literal["onnx", "gguf", "torch"]
Forms = Annotated[list[Form], BeforeValidator(as_list, json_schema_input_type=Form | list[Form])]
"""Forms of other runtimes, as `compress` has them for `to`."""


class Pretrain(Block):
    """Train a model on raw text."""

    objective: Literal["clm", "mlm", "mlm+nsp", "electra", "span", "denoise", "infill", "fim"] = "clm"
    """What the model learns: `clm` predicts the next token, `mlm` tells hidden tokens from both sides, `mlm+nsp` also
    whether one text goes on from another, `electra` finds tokens that a small generator replaced, `span` writes
    spans that were taken out of a text (T5), `denoise` repairs a damaged text (BART), `infill` fills gaps after
    reading the text around them (GLM), `fim` predicts the next token, also of middles that were moved to the end."""
    mlm: Masked = Masked()
    """With `mlm` and `mlm+nsp`: what is hidden."""
    nsp: Pairs = Pairs()
    """With `mlm+nsp`: how pairs of texts are made."""
    electra: ReplacedTokens = ReplacedTokens()
    """With `electra`: what is replaced, and by what."""
    span: Span = Span()
    """With `span`: what is taken out."""
    denoise: Denoise = Denoise()
    """With `denoise`: how text is damaged."""
    infill: Infill = Infill()
    """With `infill`: what is taken out."""
    fim: Fim = Fim()
    """With `fim`: which documents are rearranged, and how."""
    model: Model = Model()
    """The network."""
    distil: Distil | None = None
    """Learn from another model too, with any objective."""
    tokenizer: str | None = None
    """A tokenizer by folder or Hub name; by default the `tokenize` section's, else the model's own."""
    data: Sources | None = None
    """The text; by default what `tokenize.data` names."""
    held_out: Part = 0.01
    """The share of documents kept out of training for evaluation, chosen by document hash. The pieces that a long
    text file is cut into (see `documents`) count as documents: parts of one file may be on both sides."""
    isolate_documents: bool = False
    """Keep documents that share a row from seeing each other."""
    train: Train
    """How long and how."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving."""
    eval: EvalDuring = EvalDuring()
    """Evaluation on held-out text."""
    prompts: list[str] = []
    """Texts the model goes on from at each evaluation, so that progress can be read."""
    sampling: Sampling = Sampling()
    """How those samples are drawn."""
    export_check: Forms = []
    """Before the first step the new model is exported to these forms, run there, and removed: `[onnx, gguf]`. What
    cannot be exported ends the run before it has begun."""

    @model_validator(mode="before")
    @classmethod
    def _default_model(cls, data: Any) -> Any:
        """A section that names no model means a preset that its objective can use."""
        return with_default_model(data) if isinstance(data, dict) else data


Augments = Annotated[list[Augment], BeforeValidator(as_list, json_schema_input_type=Augment | list[Augment])]


class Finetune(Block):
    """Train a model for a task, on labelled rows."""

    task: Literal[
        "cls", "regression", "tag", "qa", "seq2seq", "sft", "dpo", "embed",
        "mlm", "mlm+nsp", "electra", "span", "denoise", "infill", "fim", "clm",
    ]  # fmt: skip
    """What the model learns: `cls` classes of texts, `regression` a number for a text, `tag` a tag for each word, `qa`
    where a text answers a question, `seq2seq` to write a text for a text, `sft` to answer in conversations, `dpo` to
    prefer the better of two answers, `embed` vectors that are near where texts belong together. An objective of
    `pretrain`, such as `clm` or `mlm`, goes on with pre-training on text."""
    cls: Classes = Classes()
    """With `cls`: the classes."""
    tag: Tags = Tags()
    """With `tag`: the tags."""
    qa: Answers = Answers()
    """With `qa`: how long texts are read."""
    seq2seq: Written = Written()
    """With `seq2seq`: what is read and written."""
    sft: Conversations = Conversations()
    """With `sft`: what of a conversation is learned."""
    dpo: Preferences = Preferences()
    """With `dpo`: the loss."""
    embed: Embeddings = Embeddings()
    """With `embed`: the loss."""
    loss: Loss = Loss()
    """What is lowered, where it is not the plain loss of the task."""
    distil: Distil | None = None
    """Learn from another model too, one that was trained for the same task with the same labels."""
    augment: Augments = []
    """How rows are changed while they are learned from, one way after the other:
    `[{method: synonyms}, {method: typos}]`."""
    model: Model = Model()
    """The model to start from: a `name` (a folder, a run or a Hub name); by default what `pretrain` made."""
    tokenizer: str | None = None
    """A tokenizer by folder or Hub name; by default the model's own."""
    chat_template: str | None = None
    """How a conversation becomes text, where the model's tokenizer does not say or says it otherwise: `chatml`, or a
    file with a Jinja template; kept with the model."""
    adapter: Adapter | None = None
    """Learn an adapter instead of the whole model: `{method: lora}`."""
    freeze: Freeze | None = None
    """What of the model does not learn: `{layers: 6}`, `{all_but: head}`."""
    unfreeze: Unfreeze | None = None
    """Let layers begin to learn one after the other, from the top."""
    lr_decay: LayerDecay | None = None
    """The learning rate of each layer as a share of that of the layer above: 0.9 is common."""
    data: Labelled
    """The rows to learn from."""
    validation: Labelled | None = None
    """Rows to measure on; by default a part of `data` is held out."""
    held_out: Part = 0.1
    """Without `validation`: the share of rows kept out of training, of each class alike."""
    too_long: Literal["cut", "drop", "stop"] = "cut"
    """What to do with a row that is longer than `model.context`: `cut` its end, `drop` it, or `stop`. What is cut or
    dropped is counted and shown before training."""
    train: Tuning = Tuning()
    """How long and how."""
    stop_early: StopEarly | None = None
    """End when the model no longer becomes better."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving."""
    eval: EvalDuring = EvalDuring(rows=None)
    """Evaluation on the held-out rows; by default on all of them each time."""
    prompts: list[str] = []
    """Inputs that the model answers at each evaluation, so that progress can be read."""
    sampling: Sampling = Sampling()
    """How those answers are drawn."""
    export_check: Forms = []
    """Before the first step the model is exported to these forms, run there, and removed: `[onnx, gguf]`. What cannot
    be exported ends the run before it has begun."""

    @property
    def objective(self) -> str:
        """The task, by the name that other sections have for it."""
        return self.task

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, data: Any) -> Any:
        """What is not said is as the task has it."""
        return with_task_defaults(data) if isinstance(data, dict) else data


Section = Pretrain | Finetune
"""What trains a model."""


class Eval(Block):
    """Measure a model on data that it did not learn from."""

    model: str | None = None
    """The model: a run, a checkpoint or a model folder; by default what this recipe trained."""
    task: Literal[
        "auto", "text", "cls", "regression", "tag", "qa", "seq2seq", "sft", "dpo", "embed", "choice", "generation",
        "retrieval",
    ] = "auto"  # fmt: skip
    """What the model is asked: how likely a `text` is; a task that it was fine-tuned for; which of some answers is
    likeliest (`choice`); to write (`generation`), to find passages (`retrieval`). `auto`: what it was trained for."""
    data: Sources | None = None
    """Other data to measure on, all of it; by default what was held out. Rows of a task are read in the form and by
    the columns of the run's own."""
    labelled: Labelled | None = None
    """Rows of a task, of a form and columns of their own."""
    metrics: FigureList = []
    """What to report; by default all that is measured."""
    rows: Count | None = None
    """At most so many rows; `null` takes all."""
    context: Several | None = None
    """With text: tokens that the model sees at once; by default those that it was trained with."""
    stride: Count | None = None
    """With text: by how many tokens the window moves on; only these are measured, each seen with those before it in
    the window. By default windows do not overlap, as in training."""
    reference: list[Literal["unigram", "ngram"]] = ["unigram"]
    """With text: simple models counted on the run's training text, to compare with."""
    resamples: Annotated[Whole, Field(ge=0)] = 1000
    """Draws from which the intervals are made; 0: none."""
    choice: Choices = Choices()
    """With `choice`: how choices are scored."""
    generation: Generation = Generation()
    """With `generation`: how the model writes."""
    retrieval: Retrieval = Retrieval()
    """With `retrieval`: what is searched."""
    harness: Harness | None = None
    """Tasks of lm-evaluation-harness, instead of `task`."""
    noise: Noise = Noise()
    """How well the model bears damaged text; for tasks on rows."""
    speed: Speed | None = None
    """Time the model, instead of asking it."""
    gate: Gate = Gate()
    """What must hold."""


Steps = Annotated[list[Step], BeforeValidator(as_list, json_schema_input_type=Step | list[Step])]


class Compress(Block):
    """Make a model smaller or faster, and measure what that costs."""

    model: str | None = None
    """The model: a run or a model folder; by default what this recipe trained."""
    steps: Steps = []
    """What is done, one after the other:
    `[{method: prune, what: layers, share: 20%}, {method: quantize, format: int8}]`."""
    target: Target | None = None
    """What must be reached, instead of `steps`: methods are tried, and the best that holds `max_drop` is kept."""
    task: Literal[
        "auto", "text", "cls", "regression", "tag", "qa", "seq2seq", "sft", "dpo", "embed",
    ] = "auto"  # fmt: skip
    """What the model is for; `auto`: what it was trained for."""
    calibration: Calibration = Calibration()
    """What the steps look at."""
    learn: Sources | None = None
    """What steps look at and recovery learns from, where the model's run has no such data, or other is wanted."""
    data: Sources | None = None
    """What the model is measured on before and after, all of it; by default what its run held out."""
    rows: Count | None = None
    """At most so many rows of that; `null` takes all."""
    metric: Figure | None = None
    """The figure that `max_drop` is about; by default the one that tells better models of the task: of text,
    `perplexity`."""
    max_drop: Ratio | None = None
    """How much of that figure may be lost, as a share of its value before; more ends with exit code 4."""
    speed: Speed | None = Speed(length=[64], new_tokens=16, rounds=3)
    """How the models are timed; `null`: they are not."""


class Recipe(Block):
    """One file, one section per command; a recipe with one section is a recipe for one command."""

    llmkit: Annotated[Literal[1], BeforeValidator(_version)]
    """The schema's version."""
    name: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/[A-Za-z0-9][A-Za-z0-9._-]{0,63})?$")
    ] = "run"
    """What the run and its folder under `runs/` are called: letters, digits, `.`, `_` and `-`; one `/` may stand
    between a group of runs and its member."""
    extends: str | None = None
    """Another recipe (a path, or the name of a shipped one) whose settings this one starts from."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 42
    """Everything random follows from it."""
    language: Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z]+)?$")] = "en"
    """The text's main language, by its code: `en`, `zh`, `pt-BR`."""
    tokenize: Tokenize | None = None
    """The tokenizer and the shards."""
    pretrain: Pretrain | None = None
    """Training from raw text."""
    finetune: Finetune | None = None
    """Training for a task."""
    eval: Eval | None = None
    """Measuring."""
    compress: Compress | None = None
    """Making it smaller."""
    machine: Machine = Machine()
    """How the work is done here."""
    variants: dict[str, Any] | None = None
    """Runs of this recipe that differ in a few settings, by name: `{small: {pretrain: {model: {preset: gpt-tiny}}}}`.
    `llmkit run` does them one after the other and compares them; each has its folder in that of the recipe."""
    variant: str | None = None
    """Which of `variants` is meant; as a word it chooses one for any command: `variant=small`."""


def tokenize_of(recipe: Recipe) -> Tokenize | None:
    """The `tokenize` section; where a tokenizer is learnt, with the special tokens that the objective needs."""
    spec = recipe.tokenize
    if spec is None or spec.tokenizer is not None or recipe.pretrain is None:
        return spec
    tokens = tokens_for(recipe.pretrain.objective, spec.algorithm, spec.special_tokens)
    return spec if tokens == spec.special_tokens else spec.model_copy(update={"special_tokens": tokens})
