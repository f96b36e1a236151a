"""`task: choice`: which of some answers a language model finds likeliest, or whether it writes the right one."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmkit.errors import DataError, UsageError
from llmkit.evaluate.measurement import Items, Measurement
from llmkit.metrics.inputs import Integers
from llmkit.recipe.labelled import Labelled
from llmkit.run.folders import CACHE
from llmkit.run.measure.asked import Asked, Subject
from llmkit.run.measure.labels import naming_settings

if TYPE_CHECKING:
    from llmkit.evaluate.choices import Outcome, Question
    from llmkit.evaluate.requests import Answer, Scorer

_MOST_ERRORS = 50
_LONGEST_TEXT = 2000


def measure(subject: Subject, asked: Asked) -> Measurement:
    """Ask a language model questions with a choice of answers, or for the continuations of contexts.

    Raises:
        UsageError: Nothing says what is asked, or the model is of another kind.
        DataError: A row cannot be used, or there is none.
    """
    from llmkit.data.loader import evenly_spaced
    from llmkit.data.records.found import fingerprint
    from llmkit.evaluate.choices import outcome_of, pairs_of, read_questions
    from llmkit.evaluate.requests import encode_pairs

    data = _data(asked)
    cache = asked.options.runs / CACHE
    with naming_settings(asked.section):
        questions = read_questions(data, asked.base, cache=cache)
    questions = [questions[number] for number in evenly_spaced(len(questions), asked.section.rows).tolist()]
    scorer, tokenizer = scorer_of(subject, asked)
    pairs = pairs_of(questions, asked.section.choice.separator)
    requests = encode_pairs(tokenizer, pairs, encoder_decoder=scorer.encoder_decoder)
    if not requests:
        raise DataError("there is nothing to ask", hint="give rows: --data FILES")
    answers = scorer.score(requests, told(asked, len(requests)))
    outcome = outcome_of(questions, answers)
    cut = sum(len(one.context) + len(one.continuation) > scorer.longest + 1 for one in requests)
    items = _items(questions, outcome)
    return Measurement(
        subject=subject.word,
        model=str(subject.place),
        task="choice",
        data=fingerprint(data, asked.base, cache=cache),
        figures=dict(items.figures(_every(questions))),
        shown=("accuracy", "accuracy_norm") if _is_choice(questions) else ("accuracy", "perplexity"),
        best="accuracy",
        items=items,
        tables=_tables(questions, outcome),
        settings={
            "separator": asked.section.choice.separator,
            "precision": subject.precision,
            "longest": scorer.longest,
            "num_cut": cut,
        },
        predictions=_predictions(questions, answers, outcome),
        warnings=_warnings(questions, outcome, cut, scorer.longest),
    )


def scorer_of(subject: Subject, asked: Asked) -> "tuple[Scorer, Any]":
    """What asks the model, and its tokenizer.

    Raises:
        UsageError: The model does not say how likely texts are.
        MissingError: There is no model.
    """
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.evaluate.model import load_model
    from llmkit.evaluate.requests import Scorer
    from llmkit.models.build import kind_of

    model = load_model(subject.place, trusted=subject.trust_remote_code)
    kind = kind_of(str(subject.place))
    if kind not in ("causal", "seq2seq"):
        raise UsageError(
            f"{subject.place}: a model of the kind `{kind}` does not say how likely a text is",
            hint="give a causal or an encoder-decoder language model",
        )
    tokenizer = load_tokenizer(str(subject.place))
    bf16 = subject.precision == "bf16"
    return Scorer(model, tokenizer, device=asked.device, bf16=bf16), tokenizer


def told(asked: Asked, total: int | None) -> Any:
    """What is told of requests that were answered."""
    so_far = 0

    def more(done: int) -> None:
        nonlocal so_far
        so_far += done
        asked.reporter.progress("eval", so_far, total, unit="request")

    return more


def _data(asked: Asked) -> Labelled:
    """Where the questions are.

    Raises:
        UsageError: Nothing says so, or several sources do.
    """
    section = asked.section
    if section.labelled is not None:
        return section.labelled
    if not section.data:
        raise UsageError(
            "nothing says which questions to ask",
            hint="--data FILE, with rows of `query, choices, gold` or `context, continuation`",
        )
    if len(section.data) > 1:
        raise UsageError("questions come from one source", hint="name all files in one: `files: [a, b]`")
    source = section.data[0]
    return Labelled(
        name=source.name,
        files=source.files,
        dataset=source.dataset,
        split=source.split,
        encoding=source.encoding,
        on_error=source.on_error,
    )


def _is_choice(questions: "Sequence[Question]") -> bool:
    return len(questions[0].options) > 1


def _every(questions: "Sequence[Question]") -> Integers:
    import numpy as np

    return np.arange(len(questions))


def _items(questions: "Sequence[Question]", outcome: "Outcome") -> Items:
    import numpy as np

    if _is_choice(questions):
        columns = {
            "accuracy": outcome.right_N,
            "accuracy_norm": outcome.by_chars_N,
            "accuracy_bytes": outcome.by_bytes_N,
        }
    else:
        columns = {"accuracy": outcome.right_N}
    means_NF = np.stack(list(columns.values()), axis=1).astype(np.float64)
    gold_N = outcome.gold_N

    def figures(rows: Integers) -> Mapping[str, float]:
        found = dict(zip(columns, means_NF[rows].mean(axis=0).tolist(), strict=True))
        if not _is_choice(questions):
            found["perplexity"] = float(np.exp(-gold_N[rows].mean()))
        return found

    return Items([question.key for question in questions], figures, outcome.right_N.tolist())


def _tables(questions: "Sequence[Question]", outcome: "Outcome") -> dict[str, Any]:
    import numpy as np

    if not _is_choice(questions):
        wrong = np.flatnonzero(~outcome.right_N)
        order = wrong[np.argsort(outcome.gold_N[wrong], kind="stable")]
        return {"errors": [_error(questions[n], "", float(outcome.gold_N[n])) for n in order[:_MOST_ERRORS]]}
    wrong = np.flatnonzero(~outcome.right_N)
    order = wrong[np.argsort(-outcome.confidence_N[wrong], kind="stable")]
    return {
        "errors": [
            _error(questions[n], questions[n].options[outcome.chosen_N[n]], float(outcome.confidence_N[n]))
            for n in order[:_MOST_ERRORS]
        ]
    }


def _error(question: "Question", prediction: str, score: float) -> dict[str, Any]:
    return {
        "place": question.place,
        "text": question.context[-_LONGEST_TEXT:],
        "target": question.options[question.gold],
        "prediction": prediction,
        "score": score,
    }


def _predictions(
    questions: "Sequence[Question]", answers: "Sequence[Answer]", outcome: "Outcome"
) -> list[dict[str, Any]]:
    """A line for each question."""
    lines, start = [], 0
    for number, question in enumerate(questions):
        some = answers[start : start + len(question.options)]
        start += len(question.options)
        line: dict[str, Any] = {"place": question.place, "input": question.context}
        if len(some) > 1:
            line |= {
                "choices": list(question.options),
                "target": question.gold,
                "prediction": int(outcome.chosen_N[number]),
                "score": float(outcome.confidence_N[number]),
            }
        else:
            line |= {
                "target": question.options[0],
                "prediction": question.options[0] if some[0].greedy else None,
                "score": some[0].loglikelihood,
            }
        lines.append({**line, "loglikelihoods": [answer.loglikelihood for answer in some]})
    return lines


def _warnings(questions: "Sequence[Question]", outcome: "Outcome", cut: int, longest: int) -> list[str]:
    from llmkit.evaluate.choices import always_same

    said = []
    same = always_same(questions, outcome) if _is_choice(questions) else None
    if same is not None:
        said.append(f"the model chose option {same} of every question: it does not tell them apart")
    if cut:
        said.append(
            f"{cut:,} of the questions' options do not fit the model's {longest:,} tokens; their beginnings were cut"
        )
    return said
