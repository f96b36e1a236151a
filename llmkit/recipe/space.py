"""What `llmkit sweep` searches: settings with a range or a choice of values, one word each.

finetune.train.optim.lr=1e-5..1e-3:log     any number between, even in the logarithm
finetune.train.batch=16 samples|32 samples one of these
finetune.adapter.rank=4..64:4              4, 8, 12, ...
finetune.freeze.layers=0..6                whole numbers, as both ends are
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.errors import UsageError

_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?::(log|{_NUMBER}))?")
_DIGITS = 4
Value = float | int | str


@dataclass(frozen=True)
class Axis:
    """A setting, and the values it may have.

    Attributes:
        key: Its dotted key in the recipe.
        values: The choices, as typed; empty for a range.
        low: The least number of a range.
        high: The largest.
        whole: Whether its numbers are whole.
        log: Whether they are spread evenly in the logarithm.
        step: The distance between two of them; None: any.
    """

    key: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False
    step: float | None = None

    @property
    def ends(self) -> tuple[Any, ...]:
        """All choices, or both ends of the range: what the recipe must be able to take."""
        return self.values or (self.rounded(self.low), self.rounded(self.high))

    def __str__(self) -> str:
        if self.values:
            return " | ".join(self.values)
        low, high = self.ends
        step = "" if self.step is None else f", {self.step:g} apart"
        return f"{low:g} to {high:g}" + (", even in the logarithm" if self.log else "") + step

    def rounded(self, number: float) -> Value:
        """A number of the range as it is typed: whole, or of four digits that count."""
        if self.whole:
            return round(number)
        return min(self.high, max(self.low, float(f"{number:.{_DIGITS}g}")))


def word_of(key: str, value: Value) -> str:
    """The override that gives a setting a value."""
    return f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"


def parse_axes(words: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """Tell what is searched from what is only set.

    Args:
        words: `KEY=SPACE` and plain `KEY=VALUE`.

    Returns:
        The axes, and the other words.

    Raises:
        UsageError: A range or a choice is none; a key is there twice; or nothing is searched.
    """
    axes: list[Axis] = []
    others: list[str] = []
    for word in words:
        key, _, space = word.partition("=")
        if _RANGE.fullmatch(space) is not None:
            axes.append(_range(key, space))
        elif "|" in space:
            axes.append(_choice(key, space))
        elif re.fullmatch(rf"{_NUMBER}\.\..*", space):
            raise UsageError(
                f"{word}: not a range", hint=f"{key}=1e-5..1e-3:log, {key}=1..8 or {key}=0..1:0.1"
            )
        else:
            others.append(word)
    keys = [axis.key for axis in axes]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is searched twice", hint="one word for each setting")
    if not axes:
        raise UsageError(
            "nothing to search: no setting has a range or several values",
            hint="finetune.train.optim.lr=1e-5..1e-3:log, or finetune.adapter.rank='4|8|16'",
        )
    return axes, others


def _range(key: str, space: str) -> Axis:
    found = _RANGE.fullmatch(space)
    assert found is not None
    low, high, how = found.groups()
    whole = not re.search(r"[.eE]", low + high + (how if how not in (None, "log") else ""))
    axis = Axis(
        key,
        low=float(low),
        high=float(high),
        whole=whole,
        log=how == "log",
        step=float(how) if how not in (None, "log") else None,
    )
    if axis.low >= axis.high:
        raise UsageError(f"{key}={space}: {low} is not below {high}", hint=f"{key}={high}..{low}")
    if axis.log and axis.low <= 0:
        raise UsageError(f"{key}={space}: a logarithm needs numbers above 0", hint=f"{key}=1e-5..{high}:log")
    if axis.step is not None and not 0 < axis.step <= axis.high - axis.low:
        raise UsageError(f"{key}={space}: steps of {how} do not fit between {low} and {high}")
    return axis


def _choice(key: str, space: str) -> Axis:
    values = tuple(part.strip() for part in space.split("|"))
    if not all(values) or len(set(values)) < len(values):
        raise UsageError(
            f"{key}={space}: a value is empty or there twice",
            hint=f"{key}='4|8|16'; a pattern with | in it belongs into the recipe",
        )
    return Axis(key, values=values)
