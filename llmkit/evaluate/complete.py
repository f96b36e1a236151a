"""What a model makes of a text, by kind of model: it goes on, fills the gaps, or writes an answer."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmkit.evaluate.chat import asked
from llmkit.evaluate.fill import fill
from llmkit.evaluate.generate import generate
from llmkit.recipe.schema import Sampling
from llmkit.registry import ModelKind


def complete(
    model: PreTrainedModel,
    kind: ModelKind,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    seed: int,
    chat: bool = False,
) -> list[tuple[str, str]]:
    """Each prompt with what the model makes of it.

    A model that writes goes on by `sampling`; one that fills gaps puts the likeliest token in the place of each
    `[MASK]`, and a prompt without one is left out; one that only judges says nothing.

    Args:
        model: The model.
        kind: What it does.
        tokenizer: Its tokenizer.
        prompts: Texts.
        sampling: How to draw.
        seed: The draw is a function of this and the prompts.
        chat: A model that writes is asked the prompts by its tokenizer's chat template, instead of going on from them.
    """
    if kind in ("causal", "seq2seq"):
        given = asked(tokenizer, prompts) if chat else prompts
        written = generate(model, tokenizer, given, sampling, seed=seed)
        return [(prompt, one.text) for prompt, one in zip(prompts, written, strict=True)]
    if kind == "detector":
        return []
    filled = fill(model, tokenizer, prompts, top=1)
    return [(one.prompt, one.text) for one in filled if one.gaps]
