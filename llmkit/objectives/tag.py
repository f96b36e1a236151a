"""Tagging: a tag for each word of a sentence, such as the names of persons and places in it.

A word is tagged by its first token. A sentence that is longer than the model reads is read in windows, and each of its
words is learned and tagged in one of them.

Shape suffixes: B rows, T positions, C tags, W words of a row.

**Source**: Devlin et al., "BERT", 2019, section 5.3.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from llmkit.metrics.classification import averages, class_table, confusion_matrix, counts_of
from llmkit.metrics.entities import EntityRows, entity_metrics, spans_of
from llmkit.models.heads import Scores
from llmkit.objectives.base import (
    NOT_LEARNED,
    TARGETS,
    Batch,
    Criterion,
    Example,
    Ints,
    Loss,
    Material,
    cross_entropy,
    padded,
)
from llmkit.objectives.cls import all_one, confusion_tables, head_logits
from llmkit.objectives.detail import Detail, worst_first
from llmkit.objectives.losses import agreeing, doubled
from llmkit.objectives.pieces import Pieces, WordPieces, windows, words_of
from llmkit.objectives.texts import CUT, pad_id
from llmkit.recipe.schema import Finetune

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

_MARK = re.compile(r"[BIESLUM]-.")
_SHARE = "share"
"""In a row that is a window: the numbers of the first word that it says something of, and of the one after the last."""
_WHERE = "begins"
"""In such a row: the number, within the sentence, of the first word that it says something of."""


def build(section: Finetune, material: Material) -> "Tagging":
    """The task as the recipe wants it."""
    return Tagging(
        material,
        overlap=section.tag.overlap,
        all_pieces=section.tag.pieces == "all",
        r_drop=section.loss.r_drop,
    )


class Tagging:
    """The mean over words of -log p(tag | sentence).

    Args:
        material: What it is made of.
        overlap: Tokens that two windows of a sentence share.
        all_pieces: Whether further tokens of a word learn its tag too.
        r_drop: As `Classification` has it.
    """

    sums = ()

    def __init__(self, material: Material, *, overlap: int, all_pieces: bool, r_drop: float) -> None:
        self._r_drop = r_drop
        tokenizer = material.tokenizer
        self._pieces = WordPieces(tokenizer)
        self._pad = pad_id(tokenizer)
        self._has_types = "token_type_ids" in tokenizer.model_input_names
        self._room = material.max_length - self._pieces.num_own
        self._overlap = overlap
        self._all_pieces = all_pieces
        self._labels = material.labels
        self._number = {label: number for number, label in enumerate(material.labels)}
        self._marked = any(_MARK.match(label) for label in material.labels)

    def expand(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The row itself, or windows of a sentence that is too long."""
        words = _words(row)
        lengths_W = self._pieces.lengths(words)
        if int(lengths_W.sum()) <= self._room:
            return [dict(row)]
        whole: dict[str, Any] = {**row, "tokens": words}
        whole.pop("text", None)
        found: list[dict[str, Any]] = []
        for window in windows(lengths_W, self._room, min(self._overlap, self._room // 2)):
            part: dict[str, Any] = {
                name: whole[name][window.start : window.stop] for name in ("tokens", "tags") if name in whole
            }
            share = [window.first - window.start, window.last - window.start]
            found.append({**whole, **part, _SHARE: share, _WHERE: window.first})
        return found

    def encode(self, row: Mapping[str, Any]) -> Example:
        """`input_ids` [T], `token_type_ids` [T] where the model knows them, `targets` [T] and `starts` [T].

        `starts` is 1 at the first token of each word that something is said of.

        Args:
            row: `tokens`, or a plain `text`; and `tags`, if they are known.
        """
        words = _words(row)
        made, cut = self._fitting(self._pieces(words))
        first, last = row.get(_SHARE, (0, len(words)))
        mine_T = (made.words_T >= first) & (made.words_T < last)
        example = {
            "input_ids": made.input_ids_T,
            "targets": self._targets(made, row["tags"], mine_T)
            if "tags" in row
            else np.full_like(made.words_T, NOT_LEARNED),
            "starts": (mine_T & made.starts).astype(np.int64),
            CUT: np.asarray(cut),
        }
        return {**example, "token_type_ids": made.type_ids_T} if self._has_types else example

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack all to [B, T]."""
        fills = {"input_ids": self._pad, "token_type_ids": 0, "targets": NOT_LEARNED, "starts": 0}
        batch = padded(examples, {**fills, "attention_mask": 0})
        batch["attention_mask"] = padded(
            [{"attention_mask": np.ones_like(example["input_ids"])} for example in examples],
            {"attention_mask": 0},
        )["attention_mask"]
        batch[TARGETS] = (batch["targets"] != NOT_LEARNED).sum()
        return batch

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the words' negative log-likelihood."""
        if model.training and self._r_drop:
            twice = doubled(batch)
            logits_NC = head_logits(model, twice).flatten(0, 1)
            return Loss({TARGETS: agreeing(logits_NC, twice["targets"].flatten(), criterion, self._r_drop)})
        logits_BTC = head_logits(model, batch)
        total = criterion(Scores(logits_BTC.flatten(0, 1)), batch["targets"].flatten())
        if model.training:
            return Loss({TARGETS: total})
        likeliest = logits_BTC.argmax(2).cpu().numpy(), batch["starts"].cpu().numpy()
        return Loss({TARGETS: total}, found=[_tags(*row) for row in zip(*likeliest, strict=True)])

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats a word."""
        return {"loss": sums["total"] / sums[TARGETS], TARGETS: sums[TARGETS]}

    def measure(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> dict[str, float]:
        """Precision, recall and F1 of whole entities; see `metrics.entities`. Windows are joined to sentences.

        Of tags that mark no beginning and inside, such as parts of speech, those of single words: the means over tags.
        """
        wanted, said, _ = self._sentences(rows, found)
        if self._marked:
            return entity_metrics(wanted, said)
        return _of_words(self._words_tagged(wanted, said))

    def detail(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Detail:
        """By type or tag, and the sentences with the most wrong tags."""
        wanted, said, owner = self._sentences(rows, found)
        parts: list[list[Mapping[str, Any]]] = [[] for _ in wanted]
        for row, number in zip(rows, owner, strict=True):
            parts[number].append(row)
        wrong = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in zip(wanted, said, strict=True)]
        figures, tables = self._counted(wanted, said)
        lines = [
            {"input": _words(self.whole(some)), "target": true, "prediction": tags, "score": count}
            for some, true, tags, count in zip(parts, wanted, said, wrong, strict=True)
        ]
        predicted = {tag for tags in said for tag in tags}
        return Detail(
            keys=[some[0]["place"] for some in parts],
            owner=owner,
            figures=figures,
            lines=lines,
            errors=worst_first(wrong, [count > 0 for count in wrong]),
            tables=tables,
            warnings=all_one(predicted, {tag for tags in wanted for tag in tags}),
        )

    def whole(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The sentence that these windows are of."""
        if _SHARE not in parts[0]:
            return dict(parts[0])
        more = {name: value for name, value in parts[0].items() if name not in (_SHARE, _WHERE)}
        for name in ("tokens", "tags"):
            if name in more:
                more[name] = [one for part in parts for one in part[name][slice(*part[_SHARE])]]
        return more

    def _sentences(
        self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]
    ) -> tuple[list[list[str]], list[list[str]], list[int]]:
        """The true and the predicted tags of each sentence, and the number of the sentence that each row is of."""
        wanted: list[list[str]] = []
        said: list[list[str]] = []
        owner: list[int] = []
        before: Mapping[str, Any] = {}
        for row, tags_W in zip(rows, found, strict=True):
            first, last = row.get(_SHARE, (0, len(row["tags"])))
            if not _follows(before, row):
                wanted.append([])
                said.append([])
            wanted[-1] += row["tags"][first:last]
            said[-1] += self._names(tags_W, last - first)
            owner.append(len(wanted) - 1)
            before = row
        return wanted, said, owner

    def _counted(
        self, wanted: Sequence[Sequence[str]], said: Sequence[Sequence[str]]
    ) -> tuple[Callable[[Ints], dict[str, float]], dict[str, Any]]:
        """The figures of any sentences, and tables of all."""
        everything = np.arange(len(wanted))
        if self._marked:
            entities = EntityRows.of(wanted, said)
            return entities.figures, {"classes": class_table(entities.counts(everything), entities.types)}
        cells = [self._cells(*pair) for pair in zip(wanted, said, strict=True)]
        owner_W = np.repeat(everything, [len(some) for some in cells])
        cells_W, size = np.concatenate(cells), len(self._labels)

        def matrix(items: Ints) -> Ints:
            times_S = np.bincount(items, minlength=len(cells))
            flat = np.bincount(cells_W, weights=times_S[owner_W], minlength=size**2)
            return flat.astype(np.int64).reshape(size, size)

        tables, _ = confusion_tables(matrix(everything), self._labels)
        return lambda items: _of_words(matrix(items)), tables

    def _cells(self, wanted: Sequence[str], said: Sequence[str]) -> Ints:
        """The place of each word in the matrix of truth and prediction."""
        pairs = [
            self._number[a] * len(self._labels) + self._number[b] for a, b in zip(wanted, said, strict=True)
        ]
        return np.array(pairs, dtype=np.int64)

    def _words_tagged(self, wanted: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> Ints:
        """The matrix of truth and prediction of single words."""
        true, found = ([self._number[tag] for tags in some for tag in tags] for some in (wanted, said))
        return confusion_matrix(true, found, len(self._labels))

    def join(self, found: Sequence[Any]) -> list[int]:
        """The tags of all words of a sentence, from those of its windows."""
        return [number for tags_W in found for number in tags_W]

    def predict(self, row: Mapping[str, Any], found: Any) -> dict[str, Any]:
        """What the model says of a sentence, for people: its words, their tags, and the entities these spell."""
        words = _words(row)
        first, last = row.get(_SHARE, (0, len(words)))
        words = words[first:last]
        tags = self._names(found, len(words))
        entities = [
            {
                "type": span.type,
                "text": " ".join(words[span.start : span.end]),
                "start": span.start,
                "end": span.end,
            }
            for span in (spans_of(tags) if self._marked else ())
        ]
        return {"tokens": words, "tags": tags, "entities": entities}

    def _names(self, tags_W: Any, num_words: int) -> list[str]:
        """The tags of so many words; those that were cut off are outside, or have the first tag where none is."""
        names = [self._labels[number] for number in tags_W]
        outside = "O" if "O" in self._number else self._labels[0]
        return names + [outside] * (num_words - len(names))

    def _fitting(self, made: Pieces) -> tuple[Pieces, int]:
        """The tokens without those of the end that do not fit, and how many these are."""
        of_words = np.flatnonzero(made.words_T >= 0)
        cut = max(0, len(of_words) - self._room)
        if not cut:
            return made, 0
        kept = np.setdiff1d(np.arange(len(made.words_T)), of_words[-cut:])
        return Pieces(made.input_ids_T[kept], made.type_ids_T[kept], made.words_T[kept]), cut

    def _targets(
        self, made: Pieces, tags: Sequence[str], mine_T: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        numbers_W = np.array([self._number[tag] for tag in tags])
        inside_W = np.array([self._number[_inside(tag, self._number)] for tag in tags])
        starts_T = made.starts
        further = inside_W[made.words_T] if self._all_pieces else np.full_like(made.words_T, NOT_LEARNED)
        return np.where(mine_T, np.where(starts_T, numbers_W[made.words_T], further), NOT_LEARNED)


def _of_words(matrix_CC: Ints) -> dict[str, float]:
    """The means over tags, and the share of words with the right one."""
    counts = counts_of(matrix_CC)
    figures = averages(counts.of((counts.found > 0) | (counts.true > 0)))
    means = {name: figures[f"macro_{name}"] for name in ("precision", "recall", "f1")}
    return {**means, **figures, "accuracy": float(np.trace(matrix_CC) / matrix_CC.sum())}


def _words(row: Mapping[str, Any]) -> list[str]:
    """The words of a row; a plain text without any has one that is unknown."""
    return words_of(row["text"]) or ["?"] if "text" in row else list(row["tokens"])


def _inside(tag: str, known: Mapping[str, int]) -> str:
    """The tag of the tokens of a word after the first: `I-X` for `B-X`, where there is one."""
    inside = f"I-{tag[2:]}"
    return inside if tag.startswith("B-") and inside in known else tag


def _tags(likeliest_T: npt.NDArray[np.int64], starts_T: npt.NDArray[np.int64]) -> list[int]:
    """The tags of a row's words, in their order."""
    return likeliest_T[starts_T > 0].tolist()


def _follows(before: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a row is the window after another of the same sentence."""
    if _SHARE not in before or _SHARE not in row or before["place"] != row["place"]:
        return False
    first, last = before[_SHARE]
    return bool(before[_WHERE] + last - first == row[_WHERE])
