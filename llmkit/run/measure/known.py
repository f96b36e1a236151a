"""Which figures a measurement can give, as far as that is known before anything is measured."""

import re
from collections.abc import Sequence

from llmkit.errors import UsageError
from llmkit.recipe.evaluation import AVERAGES, FURTHER
from llmkit.recipe.schema import Eval
from llmkit.registry import EVALUATIONS, TASKS, direction_of, goal_of, nearest
from llmkit.run.measure.asked import Subject

_AT_K = re.compile(r"(recall|ndcg)_at_[1-9][0-9]*")
_DISTINCT = re.compile(r"distinct_[1-9]")
_SHARE = re.compile(
    r"((macro|micro|weighted|samples|pair)_)?(accuracy|precision|recall|f1)|accuracy_(norm|bytes)|exact_match"
    r"|ece|mcc|mrr|pearson|spearman|rouge\w+|repetition|(recall|ndcg)_at_\d+|distinct_\d"
)
"""Figures between 0 and 1 (correlations from -1 on) ..."""
_IN_HUNDRED = re.compile(r"f1|exact_match")
"""... and those of them that are between 0 and 100 where answers are compared, as SQuAD's rules have it."""
_ANSWERING = ("qa", "generation", "retrieval")


def check_asked(everyone: Sequence[Subject], section: Eval, way: str) -> None:
    """Refuse figures that no measurement of this kind gives, and limits that they cannot reach, before hours are spent.

    Args:
        everyone: The models.
        section: The recipe's `eval` section.
        way: Which of `registry.EVALUATIONS` is meant.

    Raises:
        UsageError: There are such.
    """
    gate = section.gate
    names = [(name, "eval.metrics") for name in section.metrics]
    names += [(name, "eval.gate.fail_under") for name in gate.fail_under]
    names += [(gate.metric, "eval.gate.metric")] if gate.metric is not None else []
    for subject in everyone if names else ():
        asked = _asked(subject, section, way)
        for name, asked_by in names:
            _check_name(name, asked_by, subject, asked, way)
    if names:
        _check_limits(section, _asked(everyone[0], section, way))


def _asked(subject: Subject, section: Eval, way: str) -> str:
    """The task, of what is asked on labelled rows; the objective, of text; else the way."""
    if way == "labelled":
        own = subject.task.section.task if subject.task is not None else ""
        return own if section.task == "auto" else section.task
    if way == "text":
        from llmkit.run.measure.text import learned_by

        return learned_by(subject).objective
    return way


def _check_name(name: str, asked_by: str, subject: Subject, asked: str, way: str) -> None:
    known = _names(asked, way)
    if name in known or name.startswith("num_") or not asked or _is_counted(name, asked):
        return
    guess = nearest(name, known)
    hint = f"did you mean `{guess}`? " if guess else ""
    hint += f"it can have {', '.join(known)}"
    if way == "harness":
        hint = f"its figures are called TASK/METRIC, such as `my_task/{name}`"
    fits = "does not fit" if direction_of(name) else "is no figure of"
    said = way if way == "text" else asked
    raise UsageError(f"{asked_by}: `{name}` {fits} {said} of {subject.word}", hint=hint)


def _is_counted(name: str, asked: str) -> bool:
    """Whether it is a figure that has a number of the recipe's in its name; those of the harness its tasks know."""
    if asked == "harness":
        return "/" in name
    at_k = asked in ("embed", "retrieval") and _AT_K.fullmatch(name)
    return bool(at_k or (asked in ("generation", "retrieval") and _DISTINCT.fullmatch(name)))


def _names(asked: str, way: str) -> list[str]:
    """The figures that can be, the usual ones first."""
    if way == "labelled":
        averages = AVERAGES if asked in ("cls", "tag") else ()
        goal = TASKS.get(asked)
        return list(dict.fromkeys([*(goal.metrics if goal else ()), *averages, *FURTHER.get(asked, ())]))
    if way == "text":
        chars = ("char_perplexity",) if asked == "clm" else ()
        return [*goal_of(asked).metrics, *chars, *FURTHER.get(asked, ())]
    more = EVALUATIONS["generation"].metrics if way == "retrieval" else ()  # of a reader
    return list(dict.fromkeys([*EVALUATIONS[way].metrics, *more]))


def _check_limits(section: Eval, asked: str) -> None:
    for name, limit in section.gate.fail_under.items():
        in_hundred = asked in _ANSWERING and _IN_HUNDRED.fullmatch(name)
        if not _SHARE.fullmatch(name) or in_hundred or -1 <= limit <= 1:
            continue
        meant = f"did you mean {limit / 100:g} or {limit:g}%?" if 1 < limit <= 100 else "give a share of 1"
        raise UsageError(f"eval.gate.fail_under: {name} is 1 at most, and its limit is {limit:g}", hint=meant)
