"""Exact match and F1 of answers, as the official scripts count them, in 0-100.

Three rules:

- `squad` (SQuAD 1.1): case, punctuation, the articles a/an/the and white space do not count; F1 is over words, whatever
  their order. An answer of which nothing is left has an F1 of 0.
- `squad2` (SQuAD 2.0): the same, and a question may have no answer: the right prediction is then the empty text.
- `cmrc` (CMRC 2018): every Han character is a token, runs of other text are cut into words, most signs do not count; F1
  is from the longest run of tokens that both share. A question without answer, which CMRC has not, is as in `squad2`.

Shape suffix: N questions.

**Source**: Rajpurkar et al. 2016 (SQuAD), section 6.1, and 2018 (SQuAD 2.0), with their evaluation scripts; Cui et al.,
"A Span-Extraction Dataset for Chinese Machine Reading Comprehension", 2019, section 3, with its script.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmkit.errors import DataError
from llmkit.metrics.inputs import Booleans, Floats, Integers, check_rows, finite
from llmkit.metrics.treebank import words_of

Rules = Literal["squad", "squad2", "cmrc"]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ASCII_SIGNS = str.maketrans("", "", string.punctuation)
_CMRC_SIGNS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_CMRC_ALONE = re.compile(r"[\u4e00-\u9fa5]")
"""The script's own range: rarer characters belong to the runs around them."""


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and spare white space.

    The order matters: punctuation goes first, so `the-` loses its article and `a.b` becomes a word.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_ASCII_SIGNS)).split())


def mixed_tokens(text: str) -> list[str]:
    """Han characters one by one, the runs between them as words, in lower case and without most signs."""
    text = "".join(character for character in text.lower().strip() if character not in _CMRC_SIGNS)
    tokens: list[str] = []
    start = 0
    for han in _CMRC_ALONE.finditer(text):
        tokens += (*words_of(text[start : han.start()]), han.group())
        start = han.end()
    return tokens + words_of(text[start:])


def exact_match(prediction: str, answer: str, rules: Rules = "squad") -> float:
    """1 where the two are the same by the rules, else 0."""
    if rules == "cmrc":
        first, second = (
            "".join(c for c in text.lower().strip() if c not in _CMRC_SIGNS) for text in (prediction, answer)
        )
        return float(first == second)
    return float(normalised(prediction) == normalised(answer))


def answer_f1(prediction: str, answer: str, rules: Rules = "squad") -> float:
    """How much of the two is the same, 0 to 1."""
    if rules == "cmrc":
        found, wanted = mixed_tokens(prediction), mixed_tokens(answer)
        shared = _longest_run(found, wanted)
    else:
        found, wanted = normalised(prediction).split(), normalised(answer).split()
        shared = sum((Counter(found) & Counter(wanted)).values())
        if rules == "squad2" and not (found and wanted):
            return float(found == wanted)
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def _longest_run(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest run of tokens that stands in both."""
    longest, above = 0, [0] * (len(second) + 1)
    for token in first:
        lengths = [0]
        for place, other in enumerate(second):
            lengths.append(above[place] + 1 if token == other else 0)
        longest, above = max(longest, *lengths), lengths
    return longest


def score_answers(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], rules: Rules = "squad"
) -> tuple[Floats, Floats]:
    """Exact match and F1 of each question, [N] each, 0 to 1: the best over its answers.

    Args:
        predictions: One text a question; empty for "no answer".
        answers: The right ones; several are alternatives, none means that the question has no answer.
        rules: How to compare.

    Raises:
        DataError: There are no questions, or one has no answer where the rules know none.
        ValueError: There are more or fewer predictions than questions.
    """
    check_rows(answers, predictions)
    scores = [
        _best(prediction, _usable(alternatives, rules, number), rules)
        for number, (prediction, alternatives) in enumerate(zip(predictions, answers, strict=True), 1)
    ]
    exact_N, f1_N = np.array(scores, dtype=np.float64).T
    return exact_N, f1_N


def _usable(alternatives: Sequence[str], rules: Rules, number: int) -> Sequence[str]:
    if not alternatives and rules == "squad":
        raise DataError(
            f"question {number} has no answer, and the rules of SQuAD 1.1 know no such question",
            hint="measure by the rules of SQuAD 2.0 (squad2), or leave such questions out",
        )
    if rules == "squad2":  # an answer of which nothing is left, such as "the", is none
        alternatives = [text for text in alternatives if normalised(text)]
    return alternatives or [""]


def _best(prediction: str, alternatives: Sequence[str], rules: Rules) -> tuple[float, float]:
    if rules == "cmrc" and list(alternatives) == [""]:
        none = float(not prediction.strip())
        return none, none
    exact = max(exact_match(prediction, answer, rules) for answer in alternatives)
    return exact, max(answer_f1(prediction, answer, rules) for answer in alternatives)


def answer_metrics(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    rules: Rules = "squad",
    no_answer_N: Any = None,
    threshold: float = 1.0,
) -> dict[str, float]:
    """Exact match and F1 in 0-100 over all questions and, where some have no answer, over both kinds apart.

    Args:
        predictions: The best text that the model finds for each question; empty for "no answer".
        answers: The right ones; several are alternatives, none means that the question has no answer.
        rules: How to compare.
        no_answer_N: How much each question seems to have no answer (a probability, or a difference of scores).
        threshold: A question above it counts as answered with the empty text.

    Returns:
        `exact_match`, `f1`; with questions of both kinds also `has_answer_*` and `no_answer_*`; with `no_answer_N` also
        `best_exact_match`, `best_f1` and the thresholds, `best_*_threshold`, that give them.

    Raises:
        DataError: There are no questions, or one has no answer where the rules know none.
        RunError: A number of `no_answer_N` is not finite.
    """
    scored = AnswerRows.of(predictions, answers, rules=rules, no_answer_N=no_answer_N, threshold=threshold)
    return scored.figures(np.arange(len(scored.has_N)))


@dataclass(frozen=True)
class AnswerRows:
    """The scores of each question, made once, so that the figures of any of them are quick.

    Attributes:
        exact_N: Its exact match, 0 or 1, were it answered.
        f1_N: Its F1, 0 to 1, likewise.
        has_N: Whether it has an answer.
        answered_N: Whether the prediction is not empty.
        no_answer_N: How much it seems to have none; None: that was not asked.
        threshold: A question above it counts as answered with the empty text.
    """

    exact_N: Floats
    f1_N: Floats
    has_N: Booleans
    answered_N: Booleans
    no_answer_N: Floats | None
    threshold: float

    @classmethod
    def of(
        cls,
        predictions: Sequence[str],
        answers: Sequence[Sequence[str]],
        *,
        rules: Rules = "squad",
        no_answer_N: Any = None,
        threshold: float = 1.0,
    ) -> "AnswerRows":
        """See `answer_metrics`.

        Raises:
            DataError: There are no questions, or one has no answer where the rules know none.
            RunError: A number of `no_answer_N` is not finite.
        """
        exact_N, f1_N = score_answers(predictions, answers, rules)
        return cls(
            exact_N,
            f1_N,
            np.array([bool(alternatives) for alternatives in answers]),
            np.array([bool(text) for text in predictions]),
            None if no_answer_N is None else finite(no_answer_N, "the no-answer scores"),
            threshold,
        )

    def given(self, raw_N: Floats) -> Floats:
        """Each question's score where those above the threshold are not answered."""
        if self.no_answer_N is None:
            return raw_N
        return np.where(self.no_answer_N > self.threshold, ~self.has_N, raw_N).astype(np.float64)

    def figures(self, items: Integers) -> dict[str, float]:
        """As `answer_metrics`, of some questions, one of them several times if it is named so."""
        has_N = self.has_N[items]
        result: dict[str, float] = {}
        for name, raw_N in (("exact_match", self.exact_N), ("f1", self.f1_N)):
            scores_N = self.given(raw_N)[items]
            result[name] = 100 * float(scores_N.mean())
            if has_N.any() and not has_N.all():
                result[f"has_answer_{name}"] = 100 * float(scores_N[has_N].mean())
                result[f"no_answer_{name}"] = 100 * float(scores_N[~has_N].mean())
            if self.no_answer_N is not None:
                doubts_N, answered_N = self.no_answer_N[items], self.answered_N[items]
                best, place = best_threshold(raw_N[items], has_N, doubts_N, answered_N)
                result[f"best_{name}"], result[f"best_{name}_threshold"] = best, place
        return result


def best_threshold(scores_N: Any, has_N: Any, no_answer_N: Any, answered_N: Any) -> tuple[float, float]:
    """The best score that a threshold gives, in 0-100, and the threshold.

    As the official script searches: from "no question has an answer", questions are answered one after the other by
    rising `no_answer_N`. Of equal thresholds the script sees each alone, so with ties the score can be one that no
    threshold reaches; it is kept, for the figure to be the script's.

    Args:
        scores_N: Each question's score when it is answered, 0 to 1.
        has_N: Whether it has an answer.
        no_answer_N: How much it seems to have none.
        answered_N: Whether the prediction is not empty.

    Raises:
        ValueError: The four are not of one length.
    """
    scores_N, has_N, answered_N = np.asarray(scores_N), np.asarray(has_N, bool), np.asarray(answered_N, bool)
    no_answer_N = np.asarray(no_answer_N, dtype=np.float64)
    if not len(scores_N) == len(has_N) == len(answered_N) == len(no_answer_N):
        raise ValueError("scores, kinds, no-answer scores and predictions are not of one length")
    order = np.argsort(no_answer_N, kind="stable")
    gains_N = np.where(has_N, scores_N, -answered_N.astype(np.float64))[order]
    totals_N = float((~has_N).sum()) + np.cumsum(gains_N)
    best = int(np.argmax(totals_N))
    if totals_N[best] <= (~has_N).sum():
        return 100 * float((~has_N).mean()), 0.0
    return 100 * float(totals_N[best]) / len(scores_N), float(no_answer_N[order][best])
