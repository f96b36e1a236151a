"""What is made of a training row when its text or its tokens are changed first."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmkit.data.augment import characters, words
from llmkit.data.augment.thesaurus import Thesaurus, load_thesaurus
from llmkit.errors import UsageError
from llmkit.recipe.tasks import Augment

TEXTS: Mapping[str, tuple[str, ...]] = {
    "cls": ("text", "other"),
    "regression": ("text", "other"),
    "seq2seq": ("source",),
    "embed": ("anchor", "positive"),
}
"""By task: what of a row may be changed without what is learned of it becoming untrue."""

_LETTERS = {"typos": characters.typos, "similar": characters.similar}
_USES = ("synonyms", "insert")

Encode = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Augmented:
    """Encodes rows that are changed first; a function of the row and its seed alone.

    Args:
        encode: The task's.
        steps: The changes, one after the other.
        task: Whose rows they are.
        tokenizer: The model's, for what hides tokens.
        language: The recipe's.
        paraphrases: Of each `back_translate` among the steps, what stands for a text.

    Raises:
        UsageError: Tokens are to be hidden, and the tokenizer has no mask.
        MissingError: A file of words is not there.
    """

    def __init__(
        self,
        encode: Encode,
        steps: Sequence[Augment],
        *,
        task: str,
        tokenizer: Any,
        language: str,
        paraphrases: Sequence[Callable[[str], str]] = (),
    ) -> None:
        self._encode = encode
        self._steps = list(steps)
        given = iter(paraphrases)
        self._paraphrases = {
            number: next(given) for number, step in enumerate(steps) if step.method == "back_translate"
        }
        self._texts = TEXTS.get(task, ())
        self._mask = tokenizer.mask_token_id
        self._special = np.asarray(sorted(tokenizer.all_special_ids), dtype=np.int64)
        if self._mask is None and any(step.method == "mask" for step in steps):
            raise UsageError(
                "augment: `mask` hides tokens behind the tokenizer's mask, and it has none",
                hint="leave it out, or take a model that was trained to fill gaps, such as bert or roberta",
            )
        self._thesauri = [
            load_thesaurus(step.thesaurus, language) if step.method in _USES else Thesaurus()
            for step in steps
        ]

    def __call__(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The example of the row, or of what it becomes."""
        row = dict(row)
        masks: list[tuple[float, np.random.Generator]] = []
        for number, (step, thesaurus) in enumerate(zip(self._steps, self._thesauri, strict=True)):
            chance = np.random.default_rng([int(row["seed"]), number])
            if chance.random() >= step.rows:
                continue
            if step.method == "mask":
                masks.append((step.ratio, chance))
            for name in self._texts if step.method != "mask" else ():
                if name not in row:
                    continue
                if number in self._paraphrases:  # these steps come first
                    row[name] = self._paraphrases[number](row[name])
                else:
                    row[name] = _changed(row[name], step, chance, thesaurus)
        example = self._encode(row)
        for ratio, chance in masks:
            example = {**example, "input_ids": self._hidden(example["input_ids"], ratio, chance)}
        return example

    def _hidden(self, input_ids_T: Any, ratio: float, chance: np.random.Generator) -> Any:
        """The tokens with a share of them hidden, but none of the tokenizer's own."""
        places = np.flatnonzero(~np.isin(input_ids_T, self._special))
        count = max(1, round(ratio * len(places))) if len(places) > 1 else 0
        after_T = input_ids_T.copy()
        after_T[chance.permutation(places)[:count]] = self._mask
        return after_T


def _changed(text: str, step: Augment, chance: np.random.Generator, thesaurus: Thesaurus) -> str:
    if step.method in _LETTERS:
        after = _LETTERS[step.method](text, step.ratio, chance)
        return after if after.strip() else text
    return words.changed(text, words.CHANGES[step.method], step.ratio, chance, thesaurus)
