"""What watches a run and never changes it."""

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmkit.report.console import Reporter
from llmkit.report.run_log import RunLog

Record = Mapping[str, float | str]


class Callback(Protocol):
    """Three methods; called on the first process only."""

    def on_record(self, record: Record, *, num_steps: int) -> None:
        """New figures; `record["step"]` says from when, `train/` or `eval/` in the names from what."""
        ...

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        """The model went on from `prompt`."""
        ...

    def on_save(self, step: int) -> None:
        """A checkpoint of `step` is about to become visible; called by the thread that writes it."""
        ...


@dataclass(frozen=True)
class LogCallback:
    """Writes every record and sample into the run folder."""

    log: RunLog

    def on_record(self, record: Record, *, num_steps: int) -> None:
        """Append to metrics.jsonl."""
        self.log.metrics(record)

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        """Append to samples.jsonl."""
        self.log.sample(step, prompt, text)

    def on_save(self, step: int) -> None:
        """Bring the records to the disk before the checkpoint that follows them."""
        self.log.sync()


@dataclass(frozen=True)
class ConsoleCallback:
    """Shows figures and samples to the person who waits."""

    reporter: Reporter
    verb: str = "pretrain"
    told: Sequence[str] = ("perplexity",)
    shown: Sequence[str] = ("train/loss", "train/lr", "tokens_per_s")

    def on_record(self, record: Record, *, num_steps: int) -> None:
        """A progress line for training figures, a note for an evaluation."""
        step = int(record["step"])
        if "eval/loss" in record:
            figures = [
                f"{name} {record[f'eval/{name}']:.5g}" for name in self.told if f"eval/{name}" in record
            ]
            self.reporter.note(", ".join([f"step {step}: held-out loss {record['eval/loss']:.4f}", *figures]))
            return
        if "train/loss" not in record:
            return
        values = {key: record[key] for key in self.shown if key in record}
        self.reporter.progress(self.verb, step, num_steps, values)

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        """Show the sample."""
        self.reporter.sample(step, prompt, text)

    def on_save(self, step: int) -> None:
        """Nothing a person waits for."""


@dataclass(frozen=True)
class KillAt:
    """Ends this process by SIGKILL once it has recorded a step: how `llmkit verify-resume` makes a crash."""

    step: int

    def on_record(self, record: Record, *, num_steps: int) -> None:
        """Die, when it is time."""
        if "train/loss" in record and int(record["step"]) >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        """Nothing."""

    def on_save(self, step: int) -> None:
        """Nothing."""
