"""What happened, from a run folder's files: `report.json` (every number) and `report.html` (to look at)."""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from llmkit.durable import write_file, write_json
from llmkit.errors import CorruptError
from llmkit.report.environment import mask_command, mask_text
from llmkit.report.formatting import jsonable
from llmkit.report.html import render
from llmkit.report.run_log import read_metrics, read_samples
from llmkit.report.spikes import find_spikes

SCHEMA = 1
Records = Sequence[Mapping[str, Any]]


def write_report(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write `report.json` and `report.html` into `folder` from whatever files it holds.

    Args:
        folder: The run folder; metrics.jsonl, samples.jsonl, plan.json, data.json, environment.json and
            resolved.yaml (else recipe.yaml) are read where they exist: a run killed early has a report too.
        facts: What the files do not say, all optional: `name`; `kind` (the verb, such as `pretrain`);
            `status` (`done`, `interrupted`, `failed`); `error`; `command` (text or words; secrets masked);
            `next_command`; `tokenizer` (facts to show, `example` a list of pieces); `final` (metric name to
            value, such as `eval/loss`); `timings` (part of the work to seconds); `references` (label to nats:
            lines in the loss chart); `figures` (of an evaluation: each figure's `value`, `low`, `high`);
            `preparation` and `dropped_examples` (as `llmkit tokenize` leaves them: what each step did to the text,
            and some of what it took out). Others are kept in report.json.

    Returns:
        What report.json holds.
    """
    report = jsonable(collect(folder, facts))
    write_json(folder / "report.json", report)
    write_file(folder / "report.html", render(report).encode("utf-8", "replace"))
    return report


def collect(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the report says; a damaged file is named under `damaged` and otherwise left out."""
    damaged: list[str] = []
    metrics = _try(lambda: read_metrics(folder), [], damaged)
    samples = _try(lambda: read_samples(folder), [], damaged)
    plan, data, environment = (
        _try(lambda path=folder / name: _read_object(path), {}, damaged)  # type: ignore[misc]
        for name in ("plan.json", "data.json", "environment.json")
    )
    final = dict(facts.get("final") or {})
    return {
        "schema": SCHEMA,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "name": facts.get("name") or folder.absolute().parent.name,
        "kind": facts.get("kind") or folder.absolute().name,
        "status": facts.get("status") or "unknown",
        "headline": {
            **headline(metrics, final, data, facts.get("timings") or {}),
            **text_headline(facts),
        },
        **_rest(facts),
        "references": {**default_references(plan, data), **(facts.get("references") or {})},
        "plan": plan,
        "data": data,
        "environment": environment,
        "recipe": _recipe_text(folder),
        "spikes": [asdict(spike) for spike in find_spikes(metrics)],
        "metrics": metrics,
        "samples": samples,
        "damaged": damaged,
    }


def headline(
    metrics: Records, final: Mapping[str, Any], data: Mapping[str, Any], timings: Mapping[str, Any]
) -> dict[str, Any]:
    """The few numbers a reader looks for first; those that nobody measured are absent."""
    # A model that is counted has no loss of its training, but the same figures else.
    training = [r for r in metrics if "train/loss" in r] or [r for r in metrics if "tokens" in r]
    evaluations = [r for r in metrics if "eval/loss" in r]
    # The first record holds the time that compiling took, so it says nothing about speed.
    steady = training[1:] or training
    found = {
        "eval_loss": _last([*evaluations, final], "eval/loss"),
        "eval_loss_first": _numbers(evaluations, "eval/loss")[0] if len(evaluations) > 1 else None,
        "perplexity": _last([*evaluations, final], "eval/perplexity"),
        "bits_per_byte": _last([*evaluations, final], "eval/bits_per_byte"),
        "train_loss": _last([*training, final], "train/loss"),
        "num_steps": max(_numbers(training, "step"), default=None),
        "num_tokens": max(_numbers(training, "tokens"), default=None),
        "seconds": _seconds(metrics, timings),
        "tokens_per_s": _middle(_numbers(steady, "tokens_per_s")),
        "mfu": _middle(_numbers(steady, "mfu")),
        "peak_memory_bytes": max(_numbers([*metrics, final], "memory_bytes"), default=None),
        "data_tokens": data.get("num_tokens"),
        "data_documents": data.get("num_documents"),
        "data_bytes": data.get("num_bytes"),
        "bytes_per_token": _bytes_per_token(data),
    }
    return {key: value for key, value in found.items() if value is not None}


def text_headline(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of a tokenizer its vocabulary, of preparation the share of documents that it kept; what is known."""
    tokenizer, preparation = (
        value if isinstance(value, Mapping) else {}
        for value in (facts.get("tokenizer"), facts.get("preparation"))
    )
    read, kept = ((preparation.get(key) or {}).get("documents") for key in ("read", "kept"))
    found = {
        "vocab_size": tokenizer.get("vocab_size"),
        "kept_ratio": kept / read if read and isinstance(kept, int) else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def default_references(plan: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, float]:
    """Losses to compare with, in nats: guessing among the whole vocabulary, or by each token's frequency."""
    if data.get("task"):
        return _class_references(data.get("classes") or {})
    lines: dict[str, float] = {}
    vocab_size, entropy = plan.get("vocab_size"), data.get("unigram_entropy")
    if isinstance(vocab_size, int) and vocab_size > 1:
        lines["guessing at random"] = math.log(vocab_size)
    if isinstance(entropy, int | float):
        lines["guessing by token frequency (unigram)"] = float(entropy)
    return lines


def _class_references(classes: Mapping[str, int]) -> dict[str, float]:
    """The loss of guessing by how common each class is; nothing where there are no classes."""
    total = sum(classes.values())
    if len(classes) < 2 or not total:
        return {}
    entropy = -sum(count / total * math.log(count / total) for count in classes.values() if count)
    return {"guessing by how common each label is": entropy}


def _rest(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that go in as they are; a command line without its secrets."""
    taken = ("name", "kind", "status", "references")
    rest = {key: value for key, value in facts.items() if key not in taken}
    command = facts.get("command")
    if isinstance(command, str):
        rest["command"] = " ".join(mask_command(command.split(" ")))
    elif command:
        rest["command"] = shlex.join(mask_command([str(word) for word in command]))
    if isinstance(rest.get("error"), str):
        rest["error"] = mask_text(rest["error"])
    if rest.get("dropped_examples"):
        rest["dropped_examples"] = [
            {**one, "text": mask_text(str(one.get("text", "")))} for one in rest["dropped_examples"]
        ]
    return rest


def _try(read: Callable[[], Any], otherwise: Any, damaged: list[str]) -> Any:
    try:
        return read()
    except CorruptError as error:
        damaged.append(error.message)
        return otherwise


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{path}: not a JSON object")
    return value


def _recipe_text(folder: Path) -> str:
    for name in ("resolved.yaml", "recipe.yaml"):
        if (folder / name).exists():
            return mask_text((folder / name).read_text(encoding="utf-8", errors="replace"))
    return ""


def _numbers(records: Records, key: str) -> list[float]:
    """The finite values of `key`, in order."""
    values = (record.get(key) for record in records)
    numbers = (v for v in values if isinstance(v, int | float) and not isinstance(v, bool))
    return [v for v in numbers if math.isfinite(v)]


def _last(records: Records, key: str) -> float | None:
    """The last value of `key`; None also where the last record that has it holds no number: it diverged."""
    having = [record for record in records if key in record][-1:]
    return next(iter(_numbers(having, key)), None)


def _seconds(metrics: Records, timings: Mapping[str, Any]) -> float | None:
    """The run's time, by its own records, else the sum of what was timed."""
    parts = [{"seconds": value} for value in timings.values()]
    return max(_numbers(metrics, "elapsed_s"), default=None) or sum(_numbers(parts, "seconds")) or None


def _middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _bytes_per_token(data: Mapping[str, Any]) -> float | None:
    tokens, size = data.get("num_tokens"), data.get("num_bytes")
    return size / tokens if isinstance(tokens, int) and isinstance(size, int) and tokens else None
