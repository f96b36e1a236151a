"""How likely a model finds a text: the loss of every target, added up by document.

So models whose vocabularies differ can be compared, and figures have intervals.

What is found is gathered by the number of its micro-batch and added in that order: any number of processes gives the
same figures, to the last bit.

Shape suffixes: B rows, T positions, N positions in a line, D documents.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llmkit.data.loader import evaluation_rows
from llmkit.data.rows import Row, Rows, Stream, restarting_positions
from llmkit.errors import DataError
from llmkit.evaluate.sharing import ALONE, Share
from llmkit.models.heads import Scores
from llmkit.objectives.base import NOT_LEARNED, TARGETS, Batch, LossModule
from llmkit.registry import Goal

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Tokens that a model sees at once, and which of them are measured.

    Attributes:
        source: The number of their stream.
        start: The first one's position in it.
        stop: The position after the last.
        first: The first one that is measured.
    """

    source: int
    start: int
    stop: int
    first: int


def windows_of(streams: Sequence[Stream], context: int, stride: int | None) -> list[Window]:
    """All windows over some streams: every token but each stream's first is measured once.

    Without a stride the model reads `context` tokens and says the next one after each: windows do not overlap but for
    the one token that the last of them predicts. With it a window holds `context` tokens, moves on by `stride`, and
    what was measured in the one before is only read.

    Args:
        streams: Token streams.
        context: Tokens in a window.
        stride: Tokens by which it moves on; less than `context`.

    **Source**: the second way as in the documentation of transformers, "Perplexity of fixed-length models".
    """
    step, width = (context, context + 1) if stride is None else (stride, context)
    found = []
    for source, stream in enumerate(streams):
        measured = 1
        for start in range(0, max(stream.num_tokens - 1, 0), step):
            stop = min(start + width, stream.num_tokens)
            if stop > measured:
                found.append(Window(source, start, stop, measured))
            measured = stop
    return found


def read_window(stream: Stream, window: Window, *, isolate: bool) -> Row:
    """A window's tokens as a row for an objective; see `data.rows`."""
    row: Row = {"ids": stream.read(window.start, window.stop).astype(np.int64)}
    if isolate:
        starts = stream.document_starts(window.start, window.stop) - window.start
        row["positions"] = restarting_positions(starts, window.stop - window.start)
    return row


@dataclass(frozen=True)
class Part:
    """What was found of a micro-batch.

    Attributes:
        sums: As `Objective.summarise` takes them.
        documents: The number of the document, or else of the row, of each piece of text with targets.
        windows: The number of the window or row that each piece is in.
        nll: The sum of each piece's targets' losses in nats.
        targets: How many they are.
    """

    sums: Mapping[str, float]
    documents: Ints
    windows: Ints
    nll: Floats
    targets: Ints


@dataclass(frozen=True)
class Found:
    """What was found of a text, by pieces: what of a document lies in a window.

    Attributes:
        sums: As `Objective.summarise` takes them.
        documents_P: The document of each piece, or the row, where rows are no pieces of documents; empty where the
            objective's losses cannot be parted.
        windows_P: The window that it is in.
        nll_P: The sum of its targets' losses, in nats.
        targets_P: How many they are.
    """

    sums: Mapping[str, float]
    documents_P: Ints
    windows_P: Ints
    nll_P: Floats
    targets_P: Ints


def measure_windows(
    core: LossModule,
    streams: Sequence[Stream],
    windows: Sequence[Window],
    *,
    device: str,
    batch_size: int,
    isolate: bool,
    share: Share = ALONE,
) -> Found:
    """A model that predicts the next token over windows; the items are documents, in the streams' order.

    Args:
        core: The model and its objective, `clm`.
        streams: The text.
        windows: From `windows_of`, all or some.
        device: Where the model is.
        batch_size: Windows computed together.
        isolate: Whether documents in a window are kept apart.
        share: This process's part of the windows.
    """
    starts = [stream.document_starts(0, stream.num_tokens) for stream in streams]
    before = np.cumsum([0, *map(len, starts)])
    found: dict[int, Part] = {}
    for number, some in _shares(windows, batch_size, share):
        examples = []
        for window in some:
            row = read_window(streams[window.source], window, isolate=isolate)
            example = dict(core.objective.encode({**row, "seed": np.asarray(0)}))
            skipped = window.first - window.start - 1
            example["targets"] = example["targets"].copy()
            example["targets"][:skipped] = NOT_LEARNED
            examples.append(example)
        batch = core.objective.collate(examples)
        each = _Each()
        sums = _losses(core, _placed(batch, device), each)
        nll_BT, targets_BT = (tensor.reshape(len(some), -1) for tensor in each.only())
        found[number] = _by_document(sums, number * batch_size, some, nll_BT, targets_BT, starts, before)
    return _joined(share.gather(found))


def measure_rows(
    core: LossModule,
    rows: Rows,
    goal: Goal,
    *,
    device: str,
    batch_size: int,
    isolate: bool,
    max_rows: int | None = None,
    share: Share = ALONE,
) -> Found:
    """A model of any other objective over rows; the items are the rows, where the objective has one loss.

    Args:
        core: The model and its objective.
        rows: The text, with `partial=True`.
        goal: What is known of the objective.
        device: Where the model is.
        batch_size: Rows computed together.
        isolate: Whether documents in a row are kept apart.
        max_rows: At most so many rows, evenly spaced; None takes all.
        share: This process's part of the rows.
    """
    batches = evaluation_rows(
        rows,
        micro_batch_size=batch_size,
        max_rows=max_rows,
        world_size=share.world_size,
        rank=share.rank,
        isolate=isolate or goal.positions,
        other=goal.other,
    )
    found: dict[int, Part] = {}
    for turn, some in enumerate(batches):
        number = share.rank + turn * share.world_size
        batch = core.objective.collate(list(map(core.objective.encode, some)))
        each = _Each()
        sums = _losses(core, _placed(batch, device), each)
        nll_B, targets_B = each.by_row(len(some))
        items = np.arange(number * batch_size, number * batch_size + len(nll_B))
        found[number] = Part(sums, items, items, nll_B, targets_B)
    return _joined(share.gather(found))


class _Each:
    """A criterion that keeps the loss of each target."""

    def __init__(self) -> None:
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, scores: Scores, targets_N: torch.Tensor) -> torch.Tensor:
        nll_N = scores.each(targets_N)
        self._seen.append((nll_N.double().cpu(), (targets_N != NOT_LEARNED).cpu()))
        return nll_N.sum()

    def only(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the one loss there is: each position's, and whether it has a target."""
        ((nll_N, is_target_N),) = self._seen
        return nll_N, is_target_N

    def by_row(self, num_rows: int) -> tuple[Floats, Ints]:
        """Each row's sum and count; empty where there is more than one loss, or rows have no place in it."""
        if len(self._seen) != 1 or len(self._seen[0][0]) % num_rows:
            return np.zeros(0), np.zeros(0, np.int64)
        nll_N, is_target_N = self.only()
        return nll_N.view(num_rows, -1).sum(1).numpy(), is_target_N.view(num_rows, -1).sum(1).numpy()


def _shares(
    windows: Sequence[Window], batch_size: int, share: Share
) -> Iterator[tuple[int, Sequence[Window]]]:
    """This process's micro-batches with their numbers; what is in each does not depend on how many share them."""
    starts = range(0, len(windows), batch_size)
    for number in range(share.rank, len(starts), share.world_size):
        yield number, windows[starts[number] : starts[number] + batch_size]


def _placed(batch: Batch, device: str) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.inference_mode()
def _losses(core: LossModule, batch: Batch, each: _Each) -> dict[str, float]:
    with torch.autocast(batch["targets"].device.type, dtype=torch.bfloat16, enabled=core.bf16):
        loss = core.objective.loss(core.model, batch, each)
    counts = {name: count for name, count in batch.items() if name.startswith("num_")}
    sums = {**loss.sums, "total": loss.totals[TARGETS], **counts}
    return {name: float(value) for name, value in sums.items()}


def _by_document(
    sums: Mapping[str, float],
    first: int,
    windows: Sequence[Window],
    nll_BT: torch.Tensor,
    is_target_BT: torch.Tensor,
    starts: Sequence[Ints],
    before: Ints,
) -> Part:
    """A micro-batch's losses, added up by the document that each target belongs to."""
    documents, numbers, nll, targets = [], [], [], []
    rows = zip(windows, nll_BT.numpy(), is_target_BT.numpy(), strict=True)
    for number, (window, nll_T, is_target_T) in enumerate(rows, first):
        positions = window.start + 1 + np.flatnonzero(is_target_T)
        within = np.searchsorted(starts[window.source], positions, side="right") - 1
        known, places = np.unique(within, return_inverse=True)
        documents.append(known + before[window.source])
        numbers.append(np.full(len(known), number))
        nll.append(np.bincount(places, weights=nll_T[is_target_T], minlength=len(known)))
        targets.append(np.bincount(places, minlength=len(known)))
    return Part(sums, *map(np.concatenate, (documents, numbers, nll, targets)))


def _joined(parts: Mapping[int, Part]) -> Found:
    """All parts, added in the order of their numbers.

    Raises:
        DataError: There are none.
    """
    if not parts:
        raise DataError("no text to measure on: nothing was held out", hint="give other text: --data FILES")
    line = [parts[number] for number in sorted(parts)]
    sums: dict[str, float] = {}
    for part in line:
        for name, value in part.sums.items():
            sums[name] = sums.get(name, 0.0) + value
    kept = line if all(len(part.nll) for part in line) else []
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
    if not kept:
        return Found(sums, *empty)
    return Found(
        sums,
        np.concatenate([part.documents for part in kept]),
        np.concatenate([part.windows for part in kept]),
        np.concatenate([part.nll for part in kept]),
        np.concatenate([part.targets for part in kept]),
    )
