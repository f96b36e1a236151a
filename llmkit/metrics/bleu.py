"""BLEU and chrF, computed by sacrebleu, in 0-100, with the signature that makes the figure comparable.

How a text is cut into tokens decides BLEU. It follows the language of what is written: `zh` for Chinese (every Han
character a token), `ja-mecab`, `ko-mecab`, and `13a`, the rules of the WMT campaigns, elsewhere. Cut by `13a`, a
Chinese sentence is one token, and BLEU next to 0 whatever the model: that is refused.

Shape suffixes: N rows, K counts.

**Source**: Papineni et al., "BLEU", 2002; Popović, "chrF: character n-gram F-score", 2015; Post, "A Call for Clarity in
Reporting BLEU Scores", 2018.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from llmkit.errors import MissingError, UsageError
from llmkit.metrics.inputs import Integers, check_rows
from llmkit.metrics.scripts import shares_of

_CUT_BY_LANGUAGE = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
_MOSTLY = 0.5


@dataclass(frozen=True)
class Figure:
    """A figure and how it was made.

    Attributes:
        value: In 0-100.
        signature: sacrebleu's, to be given with the figure.
    """

    value: float
    signature: str


def tokenisation_of(texts: Sequence[str], language: str | None = None) -> str:
    """How to cut these texts, by sacrebleu's name.

    Args:
        texts: The references.
        language: Theirs, such as `zh` or `pt-BR`; None looks at the texts' script: `zh` where most letters are Han.

    Raises:
        UsageError: The language is written without Han characters, and most letters are Han.
    """
    mostly_han = shares_of(texts)[0] > _MOSTLY
    if language is None:
        return "zh" if mostly_han else "13a"
    cut = _CUT_BY_LANGUAGE.get(language.split("-")[0], "13a")
    _refuse_uncut(cut, mostly_han, f"the language is {language!r}")
    return cut


def _refuse_uncut(cut: str, mostly_han: bool, why: str) -> None:
    if cut == "13a" and mostly_han:
        raise UsageError(
            f"{why}, but most letters of the references are Han: cut at spaces (13a), "
            "a sentence would be one token, and BLEU next to 0",
            hint="say the language of what the model writes: language: zh",
        )


def bleu(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    language: str | None = None,
    tokenize: str | None = None,
) -> Figure:
    """BLEU of the whole, with up to 4-grams and sacrebleu's default smoothing.

    Args:
        predictions: One text a row.
        references: The right ones of each row, one or several.
        language: That of the references; None looks at their script.
        tokenize: sacrebleu's name for how to cut, instead of what the language says.

    Raises:
        DataError: There are no rows.
        MissingError: sacrebleu, or what it needs for the language, is not installed.
        UsageError: Chinese text would be cut at spaces.
    """
    return bleu_rows(predictions, references, language=language, tokenize=tokenize).figure()


def _bleu_of(references: Sequence[Sequence[str]], language: str | None, tokenize: str | None) -> Any:
    """BLEU by sacrebleu, cutting as it should."""
    texts = [text for row in references for text in row]
    if tokenize is None:
        tokenize = tokenisation_of(texts, language)
    else:
        _refuse_uncut(tokenize, shares_of(texts)[0] > _MOSTLY, f"the text is to be cut by {tokenize!r}")
    metrics = _sacrebleu()
    try:
        return metrics.BLEU(tokenize=tokenize)
    except (ImportError, RuntimeError) as error:
        raise MissingError(
            f"BLEU of this language needs a further package ({str(error).strip().splitlines()[0]})",
            hint=f"pip install 'sacrebleu[{tokenize.split('-')[0]}]'",
        ) from error


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]], *, word_order: int = 0) -> Figure:
    """The chrF of the whole: F2 of character n-grams up to 6; needs no tokens, so it suits every language.

    Args:
        predictions: One text a row.
        references: The right ones of each row, one or several.
        word_order: Longest word n-gram that counts too; 2 is chrF++.

    Raises:
        DataError: There are no rows.
        MissingError: sacrebleu is not installed.
    """
    return chrf_rows(predictions, references, word_order=word_order).figure()


@dataclass(frozen=True)
class OverlapRows:
    """n-grams of each row, counted once, so that the figure of any rows is quick.

    Attributes:
        metric: sacrebleu's BLEU or chrF.
        counts_NK: What each row contributes, as the metric counts it.
    """

    metric: Any
    counts_NK: Integers

    def value(self, items: Integers) -> float:
        """In 0-100, of some rows, one of them several times if it is named so."""
        return float(self.metric._compute_score_from_stats(self.counts_NK[items].sum(axis=0).tolist()).score)

    def figure(self) -> Figure:
        """Of all rows, with the signature."""
        return Figure(self.value(np.arange(len(self.counts_NK))), str(self.metric.get_signature()))


def bleu_rows(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    language: str | None = None,
    tokenize: str | None = None,
) -> OverlapRows:
    """See `bleu`, which raises the same.

    Raises:
        DataError: There are no rows.
    """
    check_rows(references, predictions)
    return _counted(_bleu_of(references, language, tokenize), predictions, references)


def chrf_rows(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, word_order: int = 0
) -> OverlapRows:
    """See `chrf`, which raises the same.

    Raises:
        DataError: There are no rows.
    """
    check_rows(references, predictions)
    return _counted(_sacrebleu().CHRF(word_order=word_order), predictions, references)


def _counted(metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> OverlapRows:
    # sacrebleu wants the first references of all rows, then the second ones; None where a row has fewer.
    most = max(map(len, references))
    columns = [[row[place] if place < len(row) else None for row in references] for place in range(most)]
    # What `corpus_score` does, in its two halves; tests see that they still make the same figure.
    counts = metric._extract_corpus_statistics(list(predictions), columns)
    return OverlapRows(metric, np.array(counts, dtype=np.int64))


def _sacrebleu() -> ModuleType:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise MissingError(
            f"BLEU and chrF need sacrebleu ({error})", hint="pip install 'llmkit[metrics]'"
        ) from error
    return metrics
