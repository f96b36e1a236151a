"""Why a model says what it says of a text: how much each token adds to it, by integrated gradients.

Between the text and a baseline that says nothing (each token replaced by the mask), what the model says changes; that
change is shared out among the tokens, so that the shares sum to it. Whether they do is checked.

Shape suffixes: B rows, T positions, C classes, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from llmkit.errors import UsageError
from llmkit.evaluate.gradients import integrated_gradients, is_complete
from llmkit.evaluate.reading import Attribution, Reading, joined, read_text, with_scores

NEXT = "next"
"""Instead of a continuation: the likeliest token."""
_BASELINES = ("mask_token", "pad_token", "eos_token", "unk_token")


@dataclass(frozen=True)
class Explained:
    """What a model says of a text, and what makes it say so.

    Attributes:
        text: The text.
        other: The second of a pair.
        label: What is explained: a class, a continuation, or `score`.
        unit: What `value` is: `log probability`, `log odds` or `score`.
        value: What the model says of the text.
        probability: The same as a probability, where it is one.
        runner_up: What the model finds likeliest besides; empty where nothing is.
        baseline: The token that stands for nothing.
        baseline_value: What the model says of the baseline.
        delta: By how much the tokens' scores sum to more than `value - baseline_value`.
        steps: Points on the way from the baseline at which gradients were taken.
        tokens: What each token adds.
        words: The same by words.
        cut: Tokens that the model did not read, for the text is too long.
    """

    text: str
    other: str | None
    label: str
    unit: str
    value: float
    probability: float | None
    runner_up: str
    baseline: str
    baseline_value: float
    delta: float
    steps: int
    tokens: Sequence[Attribution]
    words: Sequence[Attribution]
    cut: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether the scores sum to what they should."""
        return is_complete(self.delta, self.value - self.baseline_value)


Said = Callable[[torch.Tensor], torch.Tensor]
"""Logits, [B, C] or [B, n, V] -> the number that is explained, [B]."""


@dataclass(frozen=True)
class _Asked:
    """What is explained of a model's answer.

    Attributes:
        label: Its name.
        unit: What the number is.
        said: The number.
        runner_up: The next best label.
        more: Token ids that are read after the text.
        positions: It is said at so many last positions; 0: of the text as a whole.
    """

    label: str
    unit: str
    said: Said
    runner_up: str = ""
    more: Sequence[int] = ()
    positions: int = 0


def explain_label(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    other: str | None = None,
    *,
    label: str | None = None,
    steps: int = 50,
    longest: int | None = None,
) -> Explained:
    """Why a model that judges texts gives a text a class, or its number.

    What is shared out is the class's log-probability, in nats; of classes that apply each by itself the log of the
    odds; of a regression the number.

    Args:
        model: One with a head for whole texts.
        tokenizer: Its tokenizer.
        text: The text, or the first of a pair.
        other: The second.
        label: The class; None: the likeliest.
        steps: Points to take gradients at; more where these are not enough.
        longest: Tokens that the model reads at most; None: no limit.

    Raises:
        UsageError: There is no such class, the text is empty, or the model cannot be explained.
        MissingError: captum is not installed.
    """
    read = read_text(tokenizer, text, other, longest, framed=True)
    with _quiet_evaluation(model):
        logits_C = _logits(model, _tensor(model, read.ids), _types(model, read))[0]
        asked = _class_asked(model, logits_C, label)
        return _explain(model, tokenizer, read, asked, steps)


def explain_next(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    *,
    token: str = NEXT,
    steps: int = 50,
    longest: int | None = None,
) -> Explained:
    """Why a model that predicts the next token goes on from a text as it does.

    What is shared out is the log-probability of the continuation, in nats.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        text: The text.
        token: How it goes on, with its blank: ` Paris`; `next`: by the likeliest token.
        steps: Points to take gradients at; more where these are not enough.
        longest: Tokens that the model reads at most; None: no limit.

    Raises:
        UsageError: The text is empty or too long, or the model cannot be explained.
        MissingError: captum is not installed.
    """
    read = read_text(tokenizer, text, None, None, framed=False)
    asked_ids = [] if token == NEXT else tokenizer(token, add_special_tokens=False)["input_ids"]
    if token != NEXT and not asked_ids:
        raise UsageError(f"--token {token!r} is no token", hint="--token next explains the likeliest one")
    num_read = len(read.ids) + len(asked_ids)
    if longest is not None and num_read > longest:
        raise UsageError(
            f"the text has {num_read:,} tokens with what follows, the model reads at most {longest:,}",
            hint="leave its beginning out",
        )
    with _quiet_evaluation(model):
        logits_V = _logits(model, _tensor(model, read.ids), None)[0, -1]
        best = logits_V.topk(2).indices.tolist()
        ids = asked_ids or best[:1]
        runner_up = next(number for number in best if [number] != ids)
        asked = _Asked(
            tokenizer.decode(ids),
            "log probability",
            _log_p_of(ids),
            tokenizer.decode([runner_up]),
            ids[:-1],
            positions=len(ids),
        )
        return _explain(model, tokenizer, read, asked, steps)


# --- what is explained


def _class_asked(model: PreTrainedModel, logits_C: torch.Tensor, label: str | None) -> _Asked:
    names = {int(number): str(name) for number, name in model.config.id2label.items()}
    if len(logits_C) == 1:
        if label not in (None, "score"):
            raise UsageError(f"--label {label!r}: this model gives one number", hint="leave --label out")
        return _Asked("score", "score", lambda logits_BC: logits_BC[:, 0])
    number = int(logits_C.argmax()) if label is None else _number_of(label, names)
    others = logits_C.clone()
    others[number] = -torch.inf
    runner_up = names[int(others.argmax())]
    if model.config.problem_type == "multi_label_classification":
        return _Asked(names[number], "log odds", lambda logits_BC: logits_BC[:, number], runner_up)
    return _Asked(
        names[number],
        "log probability",
        lambda logits_BC: functional.log_softmax(logits_BC, 1)[:, number],
        runner_up,
    )


def _number_of(label: str, names: dict[int, str]) -> int:
    from llmkit.registry import nearest

    found = [number for number, name in names.items() if name == label]
    if found:
        return found[0]
    guess = nearest(label, names.values())
    known = ", ".join(list(names.values())[:20]) + (", ..." if len(names) > 20 else "")
    raise UsageError(
        f"--label {label!r} is no class of this model; it has {known}",
        hint=f"did you mean {guess!r}?" if guess else "",
    )


def _log_p_of(ids: Sequence[int]) -> Said:
    """The log-probability of tokens that the last positions predict."""

    def said(logits_BTV: torch.Tensor) -> torch.Tensor:
        log_p = functional.log_softmax(logits_BTV[:, -len(ids) :], 2)
        return log_p[:, range(len(ids)), list(ids)].sum(1)

    return said


# --- how much each token adds


def _explain(model: PreTrainedModel, tokenizer: Any, read: Reading, asked: _Asked, steps: int) -> Explained:
    name, nothing = _baseline(tokenizer)
    base = [number if span is None else nothing for number, span in zip(read.ids, read.spans, strict=True)]
    types_BT = _types(model, read)
    shared = integrated_gradients(
        model,
        lambda given_BT: asked.said(
            _logits(
                model,
                given_BT,
                None if types_BT is None else types_BT.expand_as(given_BT),
                keep=asked.positions,
            )
        ),
        _tensor(model, [*read.ids, *asked.more]),
        _tensor(model, [*base, *asked.more]),
        steps,
    )
    tokens = with_scores(read, shared.scores.tolist())
    return Explained(
        text=read.texts[0],
        other=read.texts[1] if len(read.texts) > 1 else None,
        label=asked.label,
        unit=asked.unit,
        value=shared.value,
        probability=_probability(asked.unit, shared.value),
        runner_up=asked.runner_up,
        baseline=name,
        baseline_value=shared.baseline_value,
        delta=float(shared.scores.sum()) - (shared.value - shared.baseline_value),
        steps=shared.steps,
        tokens=[one for one, _ in tokens],
        words=joined(tokens, read.texts),
        cut=read.cut,
    )


def _probability(unit: str, value: float) -> float | None:
    if unit == "log odds":
        return float(torch.tensor(value).sigmoid())
    return float(torch.tensor(value).exp()) if unit == "log probability" else None


def _baseline(tokenizer: Any) -> tuple[str, int]:
    """The token that says least, and its id."""
    for name in _BASELINES:
        token, number = getattr(tokenizer, name, None), getattr(tokenizer, f"{name}_id", None)
        if token is not None and number is not None:
            return str(token), int(number)
    raise UsageError(
        "the tokenizer has no token that stands for nothing", hint="give it a padding token (pad_token)"
    )


# --- the model


@contextmanager
def _quiet_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode; and gradients of recurrent layers, which cuDNN has only while training, are torch's own."""
    training = model.training
    model.eval()
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        model.train(training)


def _logits(
    model: PreTrainedModel, ids_BT: torch.Tensor, types_BT: torch.Tensor | None, keep: int = 0
) -> torch.Tensor:
    """What the model says, in float32; of each position, the last `keep` only, where it is one that can."""
    words: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    if types_BT is not None:
        words["token_type_ids"] = types_BT
    if hasattr(model.config, "use_cache"):
        words["use_cache"] = False
    if keep and "logits_to_keep" in signature(model.forward).parameters:
        words["logits_to_keep"] = keep
    logits: torch.Tensor = model(**words).logits
    return logits.float()


def _tensor(model: PreTrainedModel, numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(numbers)], device=model.device)


def _types(model: PreTrainedModel, read: Reading) -> torch.Tensor | None:
    return None if read.type_ids is None else _tensor(model, read.type_ids)
