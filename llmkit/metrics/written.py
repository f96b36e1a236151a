"""How good texts are that a model wrote: what each contributes is counted once, so that figures of any rows are quick.

Exact match, F1, BLEU and chrF are in 0-100, ROUGE, distinct-n and repetition in 0-1, as in the modules that count them.

Shape suffix: N rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

import numpy as np

from llmkit.errors import UsageError
from llmkit.metrics.answers import Rules, score_answers
from llmkit.metrics.bleu import OverlapRows, bleu_rows, chrf_rows
from llmkit.metrics.inputs import Booleans, Floats, Integers, check_rows
from llmkit.metrics.repetition import distinct, repetition
from llmkit.metrics.rouge import rouge_rows
from llmkit.metrics.scripts import shares_of

Cutting = Literal["auto", "13a", "zh", "char", "intl", "none"]

_MOSTLY = 0.5
_ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class WrittenRows:
    """What each text contributes to the figures.

    Attributes:
        means: By the name of a figure that is a mean over rows, each row's value [N].
        overlaps: By the name of a figure of the whole (`bleu`, `chrf`), its counts.
        wholes: Figures that are of these very texts and of no other selection of them: the share of different n-grams
            falls as texts are added, and a draw with a text in it twice has fewer different ones by that alone.
        right_N: Whether each text is a reference, by the rules of answers; None: there are no references.
        settings: How was counted: language, rules, signatures.
    """

    means: Mapping[str, Floats]
    overlaps: Mapping[str, OverlapRows] = field(default_factory=dict)
    wholes: Mapping[str, float] = field(default_factory=dict)
    right_N: Booleans | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def figures(self, rows: Integers) -> dict[str, float]:
        """The figures of some rows, one of them several times if it is named so; `wholes` are not among them."""
        means = {name: float(values_N[rows].mean()) for name, values_N in self.means.items()}
        return means | {name: counts.value(rows) for name, counts in self.overlaps.items()}

    def all_figures(self) -> dict[str, float]:
        """The figures of all rows, `wholes` among them."""
        num_rows = len(next(iter(self.means.values())))
        return {**self.figures(np.arange(num_rows)), **self.wholes}


def written_rows(
    texts: Sequence[str],
    references: Sequence[Sequence[str]] | None,
    *,
    language: str,
    bleu_tokenizer: Cutting = "auto",
) -> WrittenRows:
    """Count what a model wrote.

    Args:
        texts: One a row.
        references: The right ones of each row, one or several; the best counts. None: there are none, and only how
            varied the texts are is counted.
        language: The recipe's. What is written in another script is counted by that: by characters, where most letters
            of the references (without these, of the texts) are Han.
        bleu_tokenizer: sacrebleu's name for how BLEU cuts; `auto`: by the language.

    Raises:
        DataError: There are no rows, or one has no reference.
        MissingError: sacrebleu lacks what the language needs.
        UsageError: Chinese would be cut at spaces.
    """
    check_rows(texts, texts)
    given = texts if references is None else [text for row in references for text in row]
    language = language_of(given, language)
    repeated_N = np.array([repetition([text], language=language) for text in texts])
    wholes = {f"distinct_{n}": distinct(texts, n, language=language) for n in (1, 2)}
    settings = {"counted_as": language}
    if references is None:
        return WrittenRows({"repetition": repeated_N}, wholes=wholes, settings=settings)
    rules: Rules = "cmrc" if language.split("-")[0] == "zh" else "squad"
    exact_N, f1_N = score_answers(texts, references, rules)
    shared = rouge_rows(texts, references, language=language)
    overlaps = _overlaps(texts, references, language, bleu_tokenizer)
    signatures = {f"{name}_signature": counts.figure().signature for name, counts in overlaps.items()}
    means = {"exact_match": 100 * exact_N, "f1": 100 * f1_N, **{name: shared[name] for name in _ROUGE}}
    return WrittenRows(
        {**means, "repetition": repeated_N},
        overlaps,
        wholes,
        exact_N > 0,
        {**settings, "answer_rules": rules, **signatures},
    )


def language_of(texts: Sequence[str], language: str) -> str:
    """What is written: as the recipe says; Chinese or English by the letters, where its own does not fit them."""
    han, ascii_ = shares_of(texts)
    if han > _MOSTLY and language.split("-")[0] not in ("zh", "ja"):
        return "zh"
    if language.split("-")[0] == "zh" and han <= _MOSTLY:
        return "en" if ascii_ > _MOSTLY else "other"
    return "other" if language.split("-")[0] == "en" and ascii_ < _MOSTLY else language


def _overlaps(
    texts: Sequence[str], references: Sequence[Sequence[str]], language: str, cutting: Cutting
) -> dict[str, OverlapRows]:
    """BLEU and chrF, where the package that counts them is there."""
    if cutting == "13a" and shares_of(text for row in references for text in row)[0] > _MOSTLY:
        raise UsageError(
            "most letters of the references are Han, and BLEU is to cut at spaces (13a): a sentence would be one "
            "token, and BLEU next to 0 whatever the model writes",
            hint="eval.generation.bleu_tokenizer=zh, or leave it out",
        )
    if find_spec("sacrebleu") is None:
        return {}
    tokenize = None if cutting == "auto" else cutting
    return {
        "bleu": bleu_rows(texts, references, language=language, tokenize=tokenize),
        "chrf": chrf_rows(texts, references),
    }
