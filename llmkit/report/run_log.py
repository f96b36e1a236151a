"""The run's records, one JSON object a line: `metrics.jsonl` and `samples.jsonl`.

A resumed run takes back what lies after its checkpoint: its records are those of an uninterrupted run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from llmkit.durable import make_folders, open_log, sync_log, write_file
from llmkit.errors import CorruptError
from llmkit.report.formatting import jsonable

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of `folder/metrics.jsonl` in order; empty when there are none."""
    return _read(folder / METRICS)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The records of `folder/samples.jsonl` in order, each with `step`, `prompt` and `text`."""
    return _read(folder / SAMPLES)


def _read(path: Path) -> list[dict[str, Any]]:
    """Parse a file of JSON lines; a last line that a crash cut short is left out.

    Raises:
        CorruptError: A line that was written completely is not a JSON object.
    """
    if not path.exists():
        return []
    # Bytes, cut at \n alone: str.splitlines would also cut at U+2028, which generated text may hold.
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise CorruptError(
                f"{path}:{number}: not a JSON object", hint=f"remove line {number} and run again"
            )
    return records


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # bad JSON and bad UTF-8
        return None
    return record if isinstance(record, dict) else None


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False) + "\n"


class RunLog:
    """Appends records to a run folder; each line is handed to the system at once.

    `resume_step` is the step of the checkpoint that the run goes on from: records of later steps are removed,
    and a line that a crash cut short with them. What was measured at that step itself is measured again, so of its
    records only those of the training stay. 0 is a fresh start, which keeps nothing.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        make_folders(folder)
        self._files = {name: _reopen(folder / name, resume_step) for name in (METRICS, SAMPLES)}

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl; it needs a `step`. NaN and infinities are written as null."""
        self._append(METRICS, record)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Append what the model wrote after `prompt` at `step`, without the prompt."""
        self._append(SAMPLES, {"step": step, "prompt": prompt, "text": text})

    def sync(self) -> None:
        """Bring every record to the disk: call before a checkpoint of the same step becomes visible."""
        for file in self._files.values():
            sync_log(file)

    def close(self) -> None:
        """Bring every record to the disk and close the files; nothing can be appended afterwards."""
        for file in self._files.values():
            with file:
                sync_log(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if "step" not in record:
            raise ValueError(f"a record of {name} needs a step: {record!r}")
        file = self._files[name]
        file.write(_line(record))
        file.flush()


def _reopen(path: Path, resume_step: int) -> TextIO:
    """Open `path` for appending, holding the records up to `resume_step`, and of that step its training's."""
    if path.exists():
        kept = [
            r
            for r in _read(path)
            if resume_step > 0
            and r.get("step", 0) <= resume_step
            and (r.get("step") != resume_step or "train/loss" in r)
        ]
        wanted = "".join(map(_line, kept)).encode("utf-8", "backslashreplace")
        if wanted != path.read_bytes():
            write_file(path, wanted)
    return open_log(path)
