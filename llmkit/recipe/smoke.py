"""`--smoke`: any recipe shrunk to about a minute on a laptop, as words laid over it."""

from collections.abc import Iterator
from typing import get_args

from llmkit.recipe.architectures import (
    DEFAULT_PRESETS,
    family_of_config,
    family_of_preset,
    preset_of_family,
)
from llmkit.recipe.emit import scalar_text
from llmkit.recipe.schema import Compress, Finetune, Preset, Pretrain, Recipe, Source, Tokenize, tokenize_of
from llmkit.registry import TASKS, goal_of

_STEPS = 20
_VOCAB = 1000
_TEXT = 1_000_000
_CONTEXT = 128
_ROWS = 16
_LABELLED = 400
_BATCH = 8


def smoke_words(recipe: Recipe) -> list[str]:
    """The overrides that make a recipe small; nothing in it becomes larger."""
    words = [f"name={scalar_text(recipe.name[:58] + '-smoke')}"]
    for section in ("tokenize", "pretrain", "eval", "compress"):
        block = getattr(recipe, section)
        words += _limits(section, block.data) if block is not None and block.data else []
    spec = tokenize_of(recipe)
    words += _tokenize(spec) if spec is not None else []
    words += _pretrain(recipe.pretrain) if recipe.pretrain is not None else []
    words += _finetune(recipe.finetune) if recipe.finetune is not None else []
    if recipe.eval is not None and recipe.eval.harness is None and recipe.eval.speed is None:
        words.append(f"eval.rows={min(recipe.eval.rows or _ROWS, _ROWS)}")
    words += _compress(recipe.compress) if recipe.compress is not None else []
    return words


def _limits(section: str, sources: list[Source]) -> Iterator[str]:
    share = max(1, _TEXT // len(sources))
    for number, source in enumerate(sources):
        yield f"{section}.data.{number}.limit={min(source.limit or share, share)}"


def _tokenize(block: Tokenize) -> Iterator[str]:
    room = _VOCAB + len(block.special_tokens)
    if block.tokenizer is None:
        yield f"tokenize.vocab_size={min(block.vocab_size, room)}"
    yield f"tokenize.sample={min(block.sample, _TEXT)}"


def _compress(block: Compress) -> Iterator[str]:
    yield f"compress.rows={min(block.rows or _ROWS, _ROWS)}"
    yield f"compress.calibration.rows={min(block.calibration.rows, _ROWS)}"
    if block.speed is not None:
        yield "compress.speed.rounds=1"
        yield "compress.speed.length=[16]"
    for number, step in enumerate(block.steps):
        train = step.recover.train if step.recover is not None else None
        if train is not None and not (train.length.unit == "steps" and train.length.value <= _STEPS):
            yield f"compress.steps.{number}.recover.train.length={_STEPS} steps"
        if train is not None and not (train.batch.unit == "samples" and train.batch.value <= _BATCH):
            yield f"compress.steps.{number}.recover.train.batch={_BATCH} samples"


def _tiny(block: Pretrain) -> str:
    """The smallest preset of the model's family, or of one that can learn the objective."""
    model = block.model
    default = DEFAULT_PRESETS[goal_of(block.objective).model]
    family = family_of_preset(model.preset or default)
    if model.architecture is not None or model.config is not None:
        family = model.architecture or family_of_config(model.config or {})
    tiny = preset_of_family(family, "tiny")
    return tiny if tiny in get_args(Preset) else preset_of_family(family_of_preset(default), "tiny")


def _finetune(block: Finetune) -> Iterator[str]:
    for name, source in (("data", block.data), ("validation", block.validation)):
        if source is not None and block.task in TASKS:  # text has no rows to count
            yield f"finetune.{name}.limit={min(source.limit or _LABELLED, _LABELLED)}"
    train = block.train
    yield f"finetune.model.context={min(block.model.context, _CONTEXT)}"
    if not (train.length.unit == "steps" and train.length.value <= _STEPS):
        yield f"finetune.train.length={_STEPS} steps"
    if train.batch.unit != "samples" or train.batch.value > _BATCH:
        yield f"finetune.train.batch={_BATCH} samples"
    yield "finetune.checkpoint.every=50%"
    yield "finetune.eval.every=50%"
    yield f"finetune.eval.rows={min(block.eval.rows or _ROWS, _ROWS)}"
    yield f"finetune.sampling.max_new_tokens={min(block.sampling.max_new_tokens, 16)}"


def _pretrain(block: Pretrain) -> Iterator[str]:
    train = block.train
    if block.model.name is None and block.model.architecture != "ngram":
        yield f"pretrain.model.preset={_tiny(block)}"
    if block.model.embeddings is not None:
        yield "pretrain.model.embeddings=null"  # they are as wide as another model
    yield f"pretrain.model.context={min(block.model.context, _CONTEXT)}"
    if not (train.length.unit == "steps" and train.length.value <= _STEPS):
        yield f"pretrain.train.length={_STEPS} steps"
    if not (train.batch.unit == "samples" and train.batch.value <= 8):
        yield "pretrain.train.batch=8 samples"
    yield "pretrain.train.optim.warmup=10%"
    yield "pretrain.checkpoint.every=50%"
    yield "pretrain.eval.every=50%"
    yield f"pretrain.eval.rows={min(block.eval.rows or _ROWS, _ROWS)}"
    yield f"pretrain.sampling.max_new_tokens={min(block.sampling.max_new_tokens, 16)}"
