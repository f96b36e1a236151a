"""Extractive question answering: where in a text the answer stands, or that it has none.

A text that is longer than the model reads is read in windows. In a window without the answer "none" is learned. The
answer to a question is the best of all its windows.

Shape suffixes: B rows (windows), T positions, L tokens of an answer at most, K candidates of a window.

**Source**: Devlin et al., "BERT", 2019, sections 4.2 and 4.3 (no answer); windows as in its published code.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from llmkit.data.records.answers import IMPOSSIBLE
from llmkit.metrics.answers import AnswerRows, Rules
from llmkit.metrics.scripts import shares_of
from llmkit.models.heads import Scores
from llmkit.objectives.base import (
    NOT_LEARNED,
    TARGETS,
    Batch,
    Criterion,
    Example,
    Loss,
    Material,
    cross_entropy,
    padded,
)
from llmkit.objectives.cls import all_one
from llmkit.objectives.detail import Detail, Recording
from llmkit.objectives.texts import CUT, stack_texts
from llmkit.objectives.windows import Window, Windows
from llmkit.recipe.schema import Finetune
from llmkit.recipe.tasks import Answers

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

WINDOW, WINDOWS = "window", "windows"
"""In a row: which window of its text it is, and how many there are."""
_MOSTLY = 0.5


def build(section: Finetune, material: Material) -> "Answering":
    """The task as the recipe wants it.

    Raises:
        UsageError: The tokenizer does not say where its tokens stand.
    """
    return Answering(section.qa, material)


class Answering:
    """The mean over windows of the mean of -log p(first token) and -log p(last token)."""

    sums = ()

    def __init__(self, settings: Answers, material: Material) -> None:
        self._settings = settings
        self._tokenizer = material.tokenizer
        self._language = material.language
        self._windows = Windows(material.tokenizer, material.max_length, settings.stride)
        self._unanswerable = bool(material.facts.get("counts", {}).get(IMPOSSIBLE))

    def expand(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The windows of the row's text."""
        count = len(self._windows.of(self._windows.question(row["question"])[0], row["context"]))
        return [{**row, WINDOW: number, WINDOWS: count} for number in range(count)]

    def encode(self, row: Mapping[str, Any]) -> Example:
        """`input_ids`, `token_type_ids` where the model knows them, `begins` and `ends` in characters, all [T].

        And `targets` [2], the first and the last token of the answer; `none`, the position that says "no answer".

        Args:
            row: `question`, `context`, `window`, and `answers`, if they are known; the first is learned.
        """
        question, cut = self._windows.question(row["question"])
        window = self._windows.of(question, row["context"])[row.get(WINDOW, 0)]
        return {
            **window.inputs,
            "begins": window.begins_T,
            "ends": window.ends_T,
            "none": np.asarray(window.none),
            "targets": _targets(window, row),
            CUT: np.asarray(cut if row.get(WINDOW, 0) == 0 else 0),
        }

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack to [B, T]; `targets` [B, 2], `none` [B]."""
        batch = stack_texts(self._tokenizer, examples)
        batch |= padded(examples, {"begins": -1, "ends": -1})
        batch["targets"] = torch.from_numpy(np.stack([example["targets"] for example in examples]))
        batch["none"] = torch.tensor([int(example["none"]) for example in examples])
        batch[TARGETS] = (batch["targets"][:, 0] != NOT_LEARNED).sum()
        return batch

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the windows' negative log-likelihood; what the batch is filled up with takes no part."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        output = model(**{name: batch[name] for name in names if name in batch})
        is_read_BT = batch["attention_mask"].bool()
        sides = (output.start_logits.float(), output.end_logits.float())
        total = sum(
            (
                _nll(logits_BT, is_read_BT, targets_B, criterion)
                for logits_BT, targets_B in zip(sides, batch["targets"].unbind(1), strict=True)
            ),
            torch.zeros((), device=is_read_BT.device),
        )
        found = [] if model.training else self._found(*sides, batch)
        return Loss({TARGETS: total / 2}, found=found)

    def _found(
        self, start_BT: torch.Tensor, end_BT: torch.Tensor, batch: Batch
    ) -> list[tuple[float, list[list[float]]]]:
        """Of each window the score of "none", and its best answers: score, first and last character, the best first.

        All pairs of a first and a last token of the text are looked at.
        """
        none_B1 = batch["none"].unsqueeze(1)
        nones = (start_BT.gather(1, none_B1) + end_BT.gather(1, none_B1)).squeeze(1).tolist()
        longest = min(self._settings.longest, start_BT.shape[1])
        lowest = torch.finfo(start_BT.dtype).min / 4  # two of them can be added
        is_text_BT = batch["begins"] >= 0
        end_BT = functional.pad(end_BT.masked_fill(~is_text_BT, lowest), (0, longest - 1), value=lowest)
        pairs_BTL = start_BT.masked_fill(~is_text_BT, lowest).unsqueeze(2) + end_BT.unfold(1, longest, 1)
        scores_BK, places_BK = pairs_BTL.flatten(1).topk(
            min(self._settings.candidates, pairs_BTL[0].numel()), dim=1
        )
        firsts_BK = places_BK // longest
        lasts_BK = (firsts_BK + places_BK % longest).clamp(max=start_BT.shape[1] - 1)
        columns = (scores_BK, batch["begins"].gather(1, firsts_BK), batch["ends"].gather(1, lasts_BK))
        best = torch.stack([column.double() for column in columns], dim=2).tolist()
        return [
            (none, [[score, int(begin), int(end)] for score, begin, end in some if score > lowest])
            for none, some in zip(nones, best, strict=True)
        ]

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats a window."""
        return {"loss": sums["total"] / sums[TARGETS], TARGETS: sums[TARGETS]}

    def measure(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> dict[str, float]:
        """Exact match and F1 in 0-100 of the questions of which all windows were measured."""
        questions = _questions(rows)
        return self._scored(rows, questions, found)[0].figures(np.arange(len(questions))) if questions else {}

    def detail(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Detail:
        """The questions that were answered worst, the surest first."""
        questions = _questions(rows)
        owner = [-1] * len(rows)
        for number, some in enumerate(questions):
            for place in some:
                owner[place] = number
        if not questions:
            return Detail((), owner, lambda _: {}, ())
        scored, best = self._scored(rows, questions, found)
        f1, exact = (scored.given(scores_N).tolist() for scores_N in (scored.f1_N, scored.exact_N))
        lines = []
        for some, (candidates, over), score, hit in zip(questions, best, f1, exact, strict=True):
            row = rows[some[0]]
            refused = not candidates or (scored.no_answer_N is not None and over > scored.threshold)
            line = {
                "input": {"question": row["question"], "context": row["context"]},
                "target": [answer["text"] for answer in row["answers"]],
                "prediction": "" if refused else candidates[0]["text"],
                "score": score,
            }
            lines.append({"id": row["id"], **line, "exact_match": hit, "no_answer": over})
        sure = [-abs(1e9 if not candidates else over) for candidates, over in best]
        order = sorted((n for n in range(len(lines)) if f1[n] < 1), key=lambda n: (f1[n], sure[n]))
        return Detail(
            keys=[f"{rows[some[0]].get('place')} {rows[some[0]]['id']}" for some in questions],
            owner=owner,
            figures=scored.figures,
            lines=lines,
            errors=order,
            warnings=all_one(
                {line["prediction"] for line in lines}, {tuple(line["target"]) for line in lines}
            ),
        )

    def whole(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The question, without the window."""
        return {name: value for name, value in parts[0].items() if name not in (WINDOW, WINDOWS)}

    def _scored(
        self, rows: Sequence[Mapping[str, Any]], questions: Sequence[Sequence[int]], found: Sequence[Any]
    ) -> tuple[AnswerRows, list[tuple[list[dict[str, Any]], float]]]:
        """The scores of each question, and its best answers."""
        answers = [[answer["text"] for answer in rows[some[0]]["answers"]] for some in questions]
        best = [
            self._best(rows[some[0]]["context"], [found[number] for number in some]) for some in questions
        ]
        rules = self._rules(rows, answers)
        may_refuse = rules == "squad2" or self._unanswerable or not all(answers)
        scored = AnswerRows.of(
            [candidates[0]["text"] if candidates else "" for candidates, _ in best],
            answers,
            rules=rules,
            no_answer_N=np.array([over for _, over in best]) if may_refuse else None,
            threshold=self._settings.no_answer_threshold if may_refuse else 1.0,
        )
        return scored, best

    def _rules(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]]) -> Rules:
        if self._settings.rules != "auto":
            return self._settings.rules
        if self._language.startswith("zh") or shares_of(row["context"] for row in rows)[0] > _MOSTLY:
            return "cmrc"
        return "squad2" if self._unanswerable or not all(answers) else "squad"

    def _best(self, context: str, windows: Sequence[Any]) -> tuple[list[dict[str, Any]], float]:
        """The best answers of all windows, and how far the score of "none" is above the best of them."""
        texts: dict[str, dict[str, Any]] = {}
        for score, begin, end in sorted(
            (one for _, some in windows for one in some), key=lambda one: -one[0]
        ):
            begin, end = _trimmed(context, int(begin), int(end))
            if begin < end:
                texts.setdefault(
                    context[begin:end], {"text": context[begin:end], "start": begin, "score": score}
                )
        candidates = list(texts.values())[: self._settings.candidates]
        none = min(score for score, _ in windows)
        return candidates, none - (candidates[0]["score"] if candidates else -1e9)

    def join(self, found: Sequence[Any]) -> tuple[float, list[list[float]]]:
        """The best answers of all windows of a text, as of one."""
        return min(none for none, _ in found), [one for _, some in found for one in some]

    def predict(self, row: Mapping[str, Any], found: Any) -> dict[str, Any]:
        """What the model says of a question, for people: the best answer, where it stands, and further candidates.

        `no_answer` is how far the score of "none" is above that of the best answer.
        """
        candidates, over = self._best(row["context"], [found])
        refused = not candidates or (self._unanswerable and over > self._settings.no_answer_threshold)
        best = {"text": "", "start": None} if refused else candidates[0]
        return {"answer": best["text"], "start": best["start"], "no_answer": over, "candidates": candidates}


def _questions(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The numbers of the windows of each question of which all are there."""
    questions: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        questions.setdefault((row.get("place"), row["id"]), []).append(number)
    return [some for some in questions.values() if len(some) == rows[some[0]].get(WINDOWS, 1)]


def _targets(window: Window, row: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    if "answers" not in row:
        return np.full(2, NOT_LEARNED)
    if not row["answers"]:
        return np.array([window.none, window.none])
    answer = row["answers"][0]
    return np.array(window.positions(answer["start"], answer["start"] + len(answer["text"])))


def _nll(
    logits_BT: torch.Tensor, is_read_BT: torch.Tensor, targets_B: torch.Tensor, criterion: Criterion
) -> torch.Tensor:
    if criterion is cross_entropy or isinstance(criterion, Recording):
        return criterion(Scores(logits_BT.masked_fill(~is_read_BT, -torch.inf)), targets_B)
    # Label smoothing spreads over all positions that there are, so each row has only its own.
    rows = zip(logits_BT, is_read_BT, targets_B.split(1), strict=True)
    each = [criterion(Scores(logits_T[read_T].unsqueeze(0)), target_1) for logits_T, read_T, target_1 in rows]
    return torch.stack(each).sum()


def _trimmed(text: str, begin: int, end: int) -> tuple[int, int]:
    """Without white space at either end, which some tokenizers count to a token."""
    found = text[begin:end]
    return begin + len(found) - len(found.lstrip()), end - (len(found) - len(found.rstrip()))
