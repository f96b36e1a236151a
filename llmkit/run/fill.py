"""`llmkit fill`: a model's words for the gaps of a text."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmkit.errors import UsageError
from llmkit.run.folders import find_model


def fill(word: str, prompts: Sequence[str], *, top: int, runs: Path) -> list[dict[str, Any]]:
    """Fill the gaps of each text.

    Args:
        word: A run, its name, or a model folder.
        prompts: Texts with gaps.
        top: Tokens to give for each gap.
        runs: The folder of run folders.

    Returns:
        For each text `prompt`, `text` with the likeliest token in each gap, and `gaps`: `tokens` and `probabilities` of
        each, best first.

    Raises:
        UsageError: The model does not fill gaps, or a text has none or is too long.
        MissingError: There is no such model.
    """
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.data.tokenizers.vocabulary import Vocabulary
    from llmkit.evaluate.fill import GAP, split_at_gaps
    from llmkit.evaluate.fill import fill as write
    from llmkit.evaluate.model import load_model
    from llmkit.models.build import kind_of
    from llmkit.models.heads import choose_heads

    place = find_model(word, runs)
    kind = kind_of(str(place))
    if kind not in ("masked", "pairs"):
        raise _does_not_fill(place, kind)
    tokenizer = load_tokenizer(str(place))
    vocabulary = Vocabulary.of(tokenizer)
    without = next((text for text in prompts if len(split_at_gaps(vocabulary, text)) == 1), None)
    if without is not None:
        raise UsageError(f"no gap in {without[:40]!r}", hint=f"write {GAP} where a word is missing")
    model = load_model(place)
    choose_heads(model, kind)
    return [asdict(one) for one in write(model, tokenizer, prompts, top=top)]


def _does_not_fill(place: Path, kind: str) -> UsageError:
    if kind == "detector":
        generator = place.parent / "generator"
        hint = f"what was trained beside it does: llmkit fill {generator}" if generator.is_dir() else ""
        return UsageError(f"{place}: a model that finds replaced tokens fills no gaps", hint=hint)
    return UsageError(
        f"{place}: a model that writes text fills no gaps", hint=f"llmkit generate {place} PROMPT"
    )
