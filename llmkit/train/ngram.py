"""Pre-training an n-gram model: count the rows that a network would have learnt from, measure, export.

There are no steps, no gradients and no checkpoints: a run that was stopped counts from the beginning.
"""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmkit.data.order import RowOrder
from llmkit.data.rows import Rows
from llmkit.data.shards import TokenShards
from llmkit.data.tokenizers import special_ids
from llmkit.durable import write_json
from llmkit.errors import CtrlCError, InterruptedRunError
from llmkit.evaluate.complete import complete
from llmkit.evaluate.model import evaluate_model
from llmkit.launch.signals import StopSignal, describe_stop
from llmkit.models.configs import NGramConfig
from llmkit.models.kneser_ney import Estimate, Piece, count_ngrams, estimate
from llmkit.models.ngram import NGramForCausalLM
from llmkit.objectives.base import LossModule
from llmkit.objectives.make import make_objective
from llmkit.plan import Plan
from llmkit.plan.counted import order_of
from llmkit.report.console import Reporter
from llmkit.report.run_log import RunLog
from llmkit.train.build import Data, make_order, open_data, text_section
from llmkit.train.callbacks import Callback, ConsoleCallback, LogCallback
from llmkit.train.finish import finish
from llmkit.train.job import Job
from llmkit.train.state import TrainState

_PIECE_TOKENS = 1 << 22
_POSITIONS_AT_ONCE = 1 << 20


def count(job: Job, reporter: Reporter) -> None:
    """Do the whole job, in this process; model and report are left in the run folder.

    Raises:
        InterruptedRunError: A signal or the time limit stopped it; nothing is left of the count.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal(job.deadline))
        section, plan, folder = text_section(job), job.checked_plan(), Path(job.folder)
        data, order = open_data(job), order_of(section.model)
        reporter.phase("pretrain", f"counting n-grams of up to {order} tokens")
        started = time.perf_counter()
        text = Text.of(data.train, make_order(job, data), plan, isolate=section.isolate_documents)

        def between(number: int) -> None:
            leave_if_asked(stop)
            reporter.progress("pretrain", number, order, unit="order")

        vocab_size = len(data.tokenizer)
        levels = count_ngrams(
            text.pieces, text.num_tokens, order=order, vocab_size=vocab_size, between=between
        )
        estimates = estimate(levels, vocab_size)
        model = _model(data, estimates)
        seconds = time.perf_counter() - started
        _tell(reporter, estimates)
        core = LossModule(model, make_objective(section, data.tokenizer), bf16=False)
        plan = replace(plan, num_parameters=model.num_parameters())
        write_json(folder / "plan.json", plan.to_dict())
        leave_if_asked(stop)
        log = stack.enter_context(RunLog(folder))
        state = TrainState(step=plan.num_steps or 0, tokens=text.num_tokens, elapsed_s=seconds)
        figures = _record(job, plan, data, model, state, [LogCallback(log), ConsoleCallback(reporter)])
        leave_if_asked(stop)
        reporter.phase("export", f"{folder}/model")
        finish(job, plan, core, data.tokenizer, state, figures)


@dataclass(frozen=True)
class Text:
    """The training text: the rows that a run reads, each once, however often it reads them.

    Attributes:
        rows: All rows of the data.
        spans: Runs of consecutive rows, as (source, first row, row after the last).
        isolate: Whether documents are kept apart.
    """

    rows: Rows
    spans: npt.NDArray[np.int64]
    isolate: bool

    @classmethod
    def of(cls, rows: Rows, order: RowOrder, plan: Plan, *, isolate: bool) -> "Text":
        """The rows of a run as long as planned."""
        assert plan.num_steps is not None
        return cls(rows, spans_read(order, plan.num_steps * plan.rows_per_step), isolate)

    @property
    def num_tokens(self) -> int:
        """The tokens of all spans."""
        lengths = self.spans[:, 2] - self.spans[:, 1]
        return int(lengths.sum()) * self.rows.stride + len(self.spans) * self.rows.overlap

    def pieces(self) -> Iterator[Piece]:
        """The tokens in pieces of some millions; a span begins anew, where isolated also a document."""
        waiting: list[Piece] = []
        size = 0
        for source, first, after in self.spans.tolist():
            start, stop = first * self.rows.stride, after * self.rows.stride + self.rows.overlap
            for at in range(start, stop, _PIECE_TOKENS):
                piece = self._piece(source, at, min(at + _PIECE_TOKENS, stop), begins=at == start)
                waiting.append(piece)
                size += len(piece.ids_N)
                if size >= _PIECE_TOKENS:
                    yield _joined(waiting)
                    waiting, size = [], 0
        if waiting:
            yield _joined(waiting)

    def _piece(self, source: int, start: int, stop: int, *, begins: bool) -> Piece:
        stream = self.rows.streams[source]
        starts_N = np.zeros(stop - start, dtype=np.bool_)
        if self.isolate:
            starts_N[stream.document_starts(start, stop) - start] = True
        starts_N[0] |= begins
        return Piece(stream.read(start, stop), starts_N)


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        np.concatenate([piece.ids_N for piece in pieces]),
        np.concatenate([piece.starts_N for piece in pieces]),
    )


def spans_read(order: RowOrder, num_rows: int) -> npt.NDArray[np.int64]:
    """Which rows the first `num_rows` positions of training read, as runs of consecutive ones.

    Returns:
        For each run (source, first row, row after the last), in the data's order.
    """
    read = [np.zeros(size + 1, dtype=np.int8) for size in order.sizes]  # one more: 0, so that every run ends
    for start in range(0, num_rows, _POSITIONS_AT_ONCE):
        sources, rows = order.locate(np.arange(start, min(start + _POSITIONS_AT_ONCE, num_rows)))
        for source, marks in enumerate(read):
            marks[rows[sources == source]] = 1
        if all(marks[:-1].all() for marks in read):
            break
    found = []
    for source, marks in enumerate(read):
        steps = np.diff(marks, prepend=np.int8(0))
        first, after = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
        found.append(np.stack([np.full_like(first, source), first, after], axis=1))
    return np.concatenate(found)


def _model(data: Data, estimates: list[Estimate]) -> NGramForCausalLM:
    ids = special_ids(data.tokenizer)
    ends = {name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in ids}
    config = NGramConfig(vocab_size=len(data.tokenizer), **ends)
    return NGramForCausalLM.of(estimates, config).eval()


def _tell(reporter: Reporter, estimates: list[Estimate]) -> None:
    sizes = ", ".join(f"{len(one.keys_G):,} of {number}" for number, one in enumerate(estimates, 1))
    reporter.note(f"different n-grams by their tokens: {sizes}")
    unusual = [str(number) for number, one in enumerate(estimates, 1) if not one.estimated]
    if unusual:
        reporter.note(
            f"the counts give no discounts for order {', '.join(unusual)}: 0.5, 1 and 1.5 are taken there"
        )


def _record(
    job: Job,
    plan: Plan,
    data: Data,
    model: NGramForCausalLM,
    state: TrainState,
    callbacks: list[Callback],
) -> Mapping[str, float]:
    """Measure on all held-out rows and draw samples; everything is recorded as of a network's last step."""
    section = text_section(job)
    record = {
        "step": state.step,
        "tokens": state.tokens,
        "elapsed_s": round(state.elapsed_s, 3),
        "tokens_per_s": round(state.tokens / max(state.elapsed_s, 1e-9), 1),
    }
    figures: dict[str, float] = {}
    if len(data.held_out):
        measured = evaluate_model(
            model,
            [TokenShards.open(Path(folder)).split("held_out") for folder in job.shards],
            section=section,
            tokenizer=data.tokenizer,
            device="cpu",
            batch_size=plan.micro_batch_size,
        )
        figures = {f"eval/{name}": value for name, value in measured.items()}
    samples = complete(model, "causal", data.tokenizer, section.prompts, section.sampling, seed=job.seed)
    for callback in callbacks:
        callback.on_record(record, num_steps=state.step)
        if figures:
            callback.on_record({"step": state.step, **figures}, num_steps=state.step)
        for prompt, written in samples:
            callback.on_sample(state.step, prompt, written)
    return figures


def leave_if_asked(stop: StopSignal) -> None:
    """End here if a signal or the time limit asks for it.

    Raises:
        InterruptedRunError: It does.
    """
    reason = stop.asked()
    if reason:
        kind = CtrlCError if reason == signal.SIGINT else InterruptedRunError
        raise kind(
            f"stopped by {describe_stop(reason)} while counting; nothing was saved",
            hint="The same command counts from the beginning.",
        )
