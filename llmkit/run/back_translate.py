"""`augment: back_translate`: each text to learn from translated there and back once, before training, by own runs.

Texts are translated in parts of fixed size, and each part is kept as soon as it is done: after a stop the same command
goes on with the next, and the file is the same to the last byte.

**Source**: Sennrich, Haddow and Birch, "Improving Neural Machine Translation Models with Monolingual Data", 2016,
section 3; for classification Edunov et al. 2018 and Xie et al., "Unsupervised Data Augmentation", 2020, section 3.1.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.data.augment.paraphrases import FILE, as_lines, texts_of
from llmkit.data.samples import Samples
from llmkit.data.tokenizers import fingerprint as tokenizer_fingerprint
from llmkit.durable import (
    discard,
    hash_file,
    naming_full_disks,
    one_at_a_time,
    sweep_beside,
    verify_folder,
    write_file,
    write_folder,
)
from llmkit.errors import CorruptError, UsageError
from llmkit.recipe.schema import Finetune
from llmkit.recipe.tasks import Augment
from llmkit.report.console import Reporter
from llmkit.run.folders import CACHE, Options, find_model
from llmkit.run.tasks import TaskRun, load_core, task_run, writing
from llmkit.train.places import teacher_weights

if TYPE_CHECKING:
    from llmkit.objectives.base import LossModule

PART = 64
"""Texts that are translated before they are kept."""
_VERSION = 1
_SAME, _EMPTY, _CUT = "as it was", "empty", "too long"
_WHY = {
    _SAME: "came back as they were",
    _EMPTY: "came back empty",
    _CUT: "are longer than the runs read or write",
}


def translators(step: Augment, runs: Path) -> list[TaskRun]:
    """The runs that translate there and back.

    Raises:
        MissingError: There is no such run.
        UsageError: One was not trained to write a text for a text.
    """
    found = []
    for word in step.through or ():
        place = find_model(word, runs)
        run = task_run(place)
        if run is None or run.section.task != "seq2seq":
            what = (
                "a model that no run of llmkit fine-tuned"
                if run is None
                else f"trained for {run.section.task}"
            )
            raise UsageError(
                f"finetune.augment: back_translate goes through {word}, which is {what}",
                hint="name two runs with `task: seq2seq`: one that translates there, and one back",
            )
        found.append(writing(run))
    return found


def paraphrase(section: Finetune, rows: Path, options: Options, reporter: Reporter) -> list[Path]:
    """The folders with the paraphrases of each `back_translate` step, made where they are not there yet.

    Raises:
        MissingError: There is no such run.
        UsageError: One was not trained to write a text for a text.
    """
    steps = [step for step in section.augment if step.method == "back_translate"]
    return [_made(section.task, translators(step, options.runs), rows, options, reporter) for step in steps]


def _made(task: str, runs: Sequence[TaskRun], rows: Path, options: Options, reporter: Reporter) -> Path:
    folder = options.runs / CACHE / "paraphrases" / _address(task, runs, rows)
    with naming_full_disks(folder), one_at_a_time(folder.with_name(f".{folder.name}.lock")):
        sweep_beside(folder)
        try:
            counts = verify_folder(folder)["facts"]
        except CorruptError:
            counts = _translate(task, runs, rows, folder, reporter)
    reporter.note(_told(counts))
    return folder


def _address(task: str, runs: Sequence[TaskRun], rows: Path) -> str:
    """All that decides what is written: the texts, both models, and how each reads and writes."""
    content = {
        "version": _VERSION,
        "part": PART,
        "task": task,
        "rows": rows.name,
        "through": [
            {
                "weights": teacher_weights(str(run.place)),
                "config": hash_file(run.place / "config.json"),
                "tokenizer": tokenizer_fingerprint(run.material().tokenizer),
                "settings": run.section.seq2seq.model_dump(mode="json"),
                "context": run.section.model.context,
                "precision": run.precision,
            }
            for run in runs
        ],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _translate(
    task: str, runs: Sequence[TaskRun], rows: Path, folder: Path, reporter: Reporter
) -> dict[str, int]:
    """Translate part by part, then put the parts together."""
    texts = texts_of(Samples(rows, "train"), task)
    parts = [texts[start : start + PART] for start in range(0, len(texts), PART)]
    kept = folder.with_name(f"{folder.name}.parts")
    places = [kept / f"part-{number:06d}.jsonl" for number in range(len(parts))]
    cores: list[tuple[Any, TaskRun]] = []
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        if place.is_file():  # written whole or not at all
            continue
        cores = cores or [(load_core(run)[0], run) for run in runs]
        reporter.phase("rows", f"translating there and back, {number * PART:,} of {len(texts):,} texts")
        write_file(place, as_lines(part, _there_and_back(cores, part)))
    whole = b"".join(place.read_bytes() for place in places)
    why = Counter(json.loads(line)["why"] for line in whole.splitlines())
    counts = {"texts": len(texts), **{name: why[name] for name in _WHY}}
    with write_folder(folder, facts={"kind": "paraphrases", "facts": counts}) as temporary:
        write_file(temporary / FILE, whole)
    discard(kept)
    return counts


def _there_and_back(
    cores: Sequence[tuple["LossModule", TaskRun]], texts: Sequence[str]
) -> list[tuple[str | None, str]]:
    """Of each text its paraphrase, or None and why there is none."""
    said, is_cut = list(texts), [False] * len(texts)
    for core, run in cores:
        fits = [not int(core.objective.encode({"source": text, "seed": 0})["cut"]) for text in said]
        said = _written(core, said)
        is_cut = [
            cut or not whole or _fills_up(run, text)
            for cut, whole, text in zip(is_cut, fits, said, strict=True)
        ]
    return [_judged(*one) for one in zip(texts, said, is_cut, strict=True)]


def _written(core: "LossModule", texts: Sequence[str]) -> list[str]:
    from llmkit.evaluate.predict import predict

    return [one["text"] for one in predict(core, [{"source": text} for text in texts])]


def _fills_up(run: TaskRun, text: str) -> bool:
    """Whether what was written has no room for its end: then it was cut off."""
    ids = run.material().tokenizer(text_target=text, verbose=False)["input_ids"]
    return len(ids) >= run.section.seq2seq.max_target


def _judged(text: str, said: str, is_cut: bool) -> tuple[str | None, str]:
    if is_cut:
        return None, _CUT
    if not said.strip():
        return None, _EMPTY
    return (None, _SAME) if said.strip() == text.strip() else (said, "")


def _told(counts: dict[str, int]) -> str:
    left = [f"{counts[name]:,} {words}" for name, words in _WHY.items() if counts[name]]
    made = counts["texts"] - sum(counts[name] for name in _WHY)
    more = f"; these stay: {', '.join(left)}" if left else ""
    return f"back-translation: {made:,} of {counts['texts']:,} texts are said otherwise{more}"
