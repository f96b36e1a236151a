"""`--smoke`: any recipe shrunk to about a minute on a laptop, as words laid over it."""

from collections.abc import Iterator

from llmkit.recipe.emit import scalar_text
from llmkit.recipe.schema import Pretrain, Recipe, Source, Tokenize, tokenize_of

_STEPS = 20
_VOCAB = 1000
_TEXT = 1_000_000
_CONTEXT = 128
_ROWS = 16


def smoke_words(recipe: Recipe) -> list[str]:
    """The overrides that make a recipe small; nothing in it becomes larger."""
    words = [f"name={scalar_text(recipe.name[:58] + '-smoke')}"]
    for section in ("tokenize", "pretrain", "eval"):
        block = getattr(recipe, section)
        words += _limits(section, block.data) if block is not None and block.data else []
    spec = tokenize_of(recipe)
    words += _tokenize(spec) if spec is not None else []
    words += _pretrain(recipe.pretrain) if recipe.pretrain is not None else []
    if recipe.eval is not None:
        words.append(f"eval.rows={min(recipe.eval.rows or _ROWS, _ROWS)}")
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


def _pretrain(block: Pretrain) -> Iterator[str]:
    train = block.train
    if block.model.name is None:
        yield "pretrain.model.preset=gpt-tiny"
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
