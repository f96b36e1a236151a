"""A recipe's labelled rows, read, checked, divided and encoded once; kept by what made them."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmkit.data.chat import prepare_tokenizer
from llmkit.data.records import Found, count_classes, fingerprint, num_shared, read_rows, split_rows
from llmkit.data.records.tags import completed
from llmkit.data.samples import LabelledRow, Measured, write_samples
from llmkit.data.tokenizers import fingerprint as tokenizer_fingerprint
from llmkit.data.tokenizers import load_tokenizer, save_tokenizer
from llmkit.durable import naming_full_disks, one_at_a_time, sweep_beside, verify_folder, write_folder
from llmkit.errors import CorruptError, DataError, MissingError, UsageError
from llmkit.models.build import kind_of
from llmkit.models.tasks import in_order_of_model, labels_of_model, longest_input
from llmkit.objectives.base import Counts, Example, Expands, Material, Objective, Relates, size_of
from llmkit.objectives.make import make_task
from llmkit.objectives.texts import CUT, PASSED_OVER
from llmkit.plan import PlanError
from llmkit.recipe import Loaded
from llmkit.recipe.architectures import in_words
from llmkit.recipe.schema import Finetune
from llmkit.registry import TASKS, ModelKind
from llmkit.report.console import Reporter
from llmkit.run.folders import CACHE, Options, base_of, find_adapter
from llmkit.train.places import NEW_TOKENS, model_folder

_VERSION = 7
"""Part of every address: raised when the same rows come to be encoded otherwise."""
_MOST_CLASSES_SHOWN = 20
_LATER = ("desirable_weight", "undesirable_weight", "separator")
"""Settings of tasks that came after rows had been kept without them."""
_LABELLED = {"cls": "label", "tag": "tags"}
"""The tasks with classes, and where a row has its own."""


@dataclass(frozen=True)
class Prepared:
    """Rows as training takes them.

    Attributes:
        folder: Where they are kept; an empty path where nothing was written.
        facts: What is known of them: `train`, `held_out` (as of `Measured.facts`), `said`, `classes`, ...
        labels: Names of classes or tags, in the order of their numbers.
        context: Tokens that the model reads at most.
        tokenizer: Its folder or name.
        vocab_size: Its entries.
        new_tokens: How many of these, the last ones, the model does not know yet.
    """

    folder: Path
    facts: Mapping[str, Any]
    labels: tuple[str, ...]
    context: int
    tokenizer: str
    vocab_size: int
    new_tokens: int = 0


@dataclass(frozen=True)
class _Task:
    """What rows are encoded with."""

    section: Finetune
    tokenizer_name: str
    tokenizer: Any
    context: int
    language: str
    new_tokens: tuple[str, ...] = ()
    changed: bool = False
    kind: ModelKind | None = None

    def objective(self, labels: Sequence[str], facts: Mapping[str, Any]) -> Objective:
        material = Material(self.tokenizer, self.context, tuple(labels), self.language, facts)
        return make_task(self.section, material)

    def prepared(self, folder: Path, facts: Mapping[str, Any]) -> Prepared:
        return Prepared(
            folder,
            facts,
            tuple(facts["labels"]),
            self.context,
            self.tokenizer_name,
            len(self.tokenizer),
            len(self.new_tokens),
        )

    def keeping_tokenizer(self, cache: Path) -> "_Task":
        """The same with a tokenizer that the recipe has changed written to a folder, where it can be named."""
        if not self.changed:
            return self
        content = [tokenizer_fingerprint(self.tokenizer), self.tokenizer.chat_template, self.new_tokens]
        folder = cache / "chat" / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
        with naming_full_disks(folder), one_at_a_time(folder.with_name(f".{folder.name}.lock")):
            try:
                verify_folder(folder)
            except CorruptError:
                facts = {"kind": "tokenizer", "of": self.tokenizer_name, NEW_TOKENS: list(self.new_tokens)}
                with write_folder(folder, facts=facts) as temporary:
                    save_tokenizer(self.tokenizer, temporary)
        return replace(self, tokenizer_name=str(folder))


def prepare_rows(loaded: Loaded, options: Options, reporter: Reporter) -> Prepared:
    """The rows in the cache, made where the same files and settings have not made them yet.

    Raises:
        DataError: A row is wrong, or there is nothing to learn.
        UsageError: Model, tokenizer and task do not fit together.
    """
    task = _task(loaded).keeping_tokenizer(options.runs / CACHE)
    folder = options.runs / CACHE / "rows" / _address(loaded, options, task)
    with naming_full_disks(folder), one_at_a_time(folder.with_name(f".{folder.name}.lock")):
        sweep_beside(folder)
        try:
            facts = verify_folder(folder)["facts"]
        except CorruptError:
            reporter.phase("rows", f"reading for {task.section.task}")
            parts, facts = _read(loaded, options, task, reporter.note)
            write_samples(folder, parts, {"kind": "rows", "facts": facts})
        else:
            for line in _words(facts):
                reporter.note(line)
    return task.prepared(folder, facts)


def read_and_measure(loaded: Loaded, options: Options, note: Callable[[str], None]) -> Prepared:
    """The same without writing anything, for a plan."""
    task = _task(loaded)
    _, facts = _read(loaded, options, task, note)
    return task.prepared(Path(), facts)


def _task(loaded: Loaded) -> _Task:
    section = loaded.recipe.finetune
    assert section is not None
    folder = model_folder(str(section.model.name))
    _check_there(folder)
    longest = longest_input(folder, trusted=section.model.trust_remote_code)
    context = section.model.context
    if longest is not None and longest < context:
        if loaded.origins["finetune.model.context"].kind != "default":
            raise PlanError(
                f"model.context is {context} tokens, but this model reads at most {longest}",
                hint=f"finetune.model.context={longest}",
            )
        context = longest
    name = section.tokenizer or folder
    tokenizer = load_tokenizer(name)
    new, changed = tuple[str, ...](), False
    goal = TASKS[section.task]
    if goal.chats or goal.also:
        kind = _check_kind(folder, section.task, (goal.model, *goal.also))
    if goal.chats:
        own = getattr(section, TASKS[section.task].sections[0])
        new, changed = prepare_tokenizer(
            tokenizer, section.chat_template, base_of(loaded), own.template_options
        )
    return _Task(
        section, name, tokenizer, context, loaded.recipe.language, new, changed, kind if goal.also else None
    )


def _check_kind(folder: str, task: str, needed: Sequence[ModelKind]) -> ModelKind:
    """The kind of a model that writes, one that the task needs; another could be made to, and would go wrong.

    Raises:
        UsageError: It is another.
    """
    found = kind_of(folder)
    if found not in needed:
        other = {"causal": "sft, with a prompt and a completion", "seq2seq": "seq2seq"}.get(found)
        raise UsageError(
            f"{folder} is {in_words(found)}; `{task}` needs {' or '.join(map(in_words, needed))}",
            hint="name such a model" + (f", or for this one the task {other}" if other else ""),
        )
    return found


def _check_there(name: str) -> None:
    """Say that a folder is not there, before it is taken for a name on the Hub; or that it has an adapter alone.

    Raises:
        MissingError: It is not.
        UsageError: It has.
    """
    if (Path(name).expanduser() / "config.json").is_file():
        return
    with suppress(MissingError):
        adapter = find_adapter(name, Path())
        raise UsageError(
            f"finetune.model.name: {name} has an adapter and no model ({adapter})",
            hint=f"make a model of it first: llmkit merge {name} --name NAME; to go on with the adapter itself, "
            "name its base and `adapter.start`",
        )
    if not Path(name).expanduser().is_dir() and (
        name.count("/") != 1 or name.startswith((".", "/", "~", "runs/"))
    ):
        raise MissingError(
            f"finetune.model.name: {name!r} is no folder with a model, and no run that has one",
            hint="give a run, a folder with config.json and model.safetensors, or OWNER/NAME on the Hub",
        )


def _address(loaded: Loaded, options: Options, task: _Task) -> str:
    """Where the rows are kept: a hash of all that decides what is in them."""
    section, cache = task.section, options.runs / CACHE
    sources = {"data": section.data, "validation": section.validation}
    content = {
        "version": _VERSION,
        "task": section.task,
        "settings": {
            name: _without_later(getattr(section, name).model_dump(mode="json"))
            for name in TASKS[section.task].sections
        },
        "sources": {
            name: fingerprint(source, base_of(loaded), cache=cache)
            for name, source in sources.items()
            if source is not None
        },
        "held_out": section.held_out,
        "too_long": section.too_long,
        "context": task.context,
        "language": task.language,
        "tokenizer": tokenizer_fingerprint(task.tokenizer),
        "frame": _frame(task.tokenizer),
        # The order of labels may be the model's.
        "labels of the model": labels_of_model(
            model_folder(str(section.model.name)), trusted=section.model.trust_remote_code
        )
        if section.task in _LABELLED
        else None,
        "chat_template": getattr(task.tokenizer, "chat_template", None),
        **({"kind": task.kind} if task.kind not in (None, TASKS[section.task].model) else {}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _without_later(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that came later and are not set: rows that were kept before there were such do."""
    return {name: value for name, value in settings.items() if name not in _LATER or value is not None}


def _frame(tokenizer: Any) -> Any:
    """What a tokenizer puts around texts, which its fingerprint leaves out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["post_processor"]


def _read(
    loaded: Loaded, options: Options, task: _Task, note: Callable[[str], None]
) -> tuple[dict[Any, Measured], dict[str, Any]]:
    """Both parts, encoded and measured, and what is known of them."""
    section = task.section
    found = _found(loaded, options, section, note)
    if section.validation is None:
        train, held_out = split_rows(found.rows, section.task, section.held_out)
    else:
        train = found.rows
        held_out = read_rows(
            section.validation,
            section.task,
            base=base_of(loaded),
            cache=options.runs / CACHE,
            note=lambda text: note(f"validation: {text}"),
            training=False,
        ).rows
    own = getattr(section, TASKS[section.task].sections[0]) if TASKS[section.task].sections else None
    labels = tuple(getattr(own, "labels", ()))
    if not labels and section.task in _LABELLED:
        labels = in_order_of_model(
            found.labels, model_folder(str(section.model.name)), trusted=section.model.trust_remote_code
        )
    labels = labels or tuple(found.labels)
    if section.task == "tag" and not section.tag.labels and len(completed(labels)) > len(labels):
        labels = completed(labels)
    facts: dict[str, Any] = {
        "task": section.task,
        **({"kind": task.kind} if task.kind else {}),
        "form": found.form,
        "said": found.said,
        "labels": list(labels),
        "classes": dict(found.classes),
        "counts": dict(found.counts),
        "context": task.context,
        "reads": longest_input(
            model_folder(str(section.model.name)), trusted=section.model.trust_remote_code
        ),
    }
    check_labels([*train, *held_out], labels, section.task)
    objective = task.objective(labels, facts)
    parts = {
        "train": measured(objective, train, section.too_long, skip=section.data.on_error == "skip"),
        "held_out": measured(
            objective,
            held_out,
            section.too_long,
            skip=(section.validation or section.data).on_error == "skip",
        ),
    }
    facts |= {name: part.facts() for name, part in parts.items()}
    facts["dropped"] = sum(part.num_dropped for part in parts.values())
    facts["unusable"] = sum(part.num_unusable for part in parts.values())
    facts["train_classes"] = count_classes(parts["train"].rows, _LABELLED.get(section.task, ""))
    if isinstance(objective, Counts):
        facts["train_classes"] = objective.count(parts["train"].rows)
        facts["counted"] = objective.told(facts["train_classes"])
    facts["shared"] = num_shared(train, held_out, section.task)
    if parts["train"].rows and not facts["train"]["num_targets"]:
        raise DataError(
            f"not one of {len(parts['train'].rows):,} rows has anything to learn",
            hint="look at the rows and what is learned of them: llmkit show RECIPE --sample 3",
        )
    for line in _words(facts)[1:]:
        note(line)
    return parts, facts


def _found(loaded: Loaded, options: Options, section: Finetune, note: Callable[[str], None]) -> Found:
    return read_rows(section.data, section.task, base=base_of(loaded), cache=options.runs / CACHE, note=note)


def check_labels(rows: Sequence[LabelledRow], labels: Sequence[str], task: str) -> None:
    """Every label is one that the model can say.

    Raises:
        DataError: One is not, because the training rows or the recipe do not have it.
    """
    known, key = set(labels), _LABELLED.get(task)
    for row in rows if known and key else ():
        value = row[key or ""]
        wrong = next(
            (one for one in ([value] if isinstance(value, str) else value) if one not in known), None
        )
        if wrong is not None:
            shown = ", ".join(list(labels)[:_MOST_CLASSES_SHOWN]) + (
                ", ..." if len(labels) > _MOST_CLASSES_SHOWN else ""
            )
            raise DataError(
                f"{row['place']}: the label {wrong!r} is not among those to learn: {shown}",
                hint=f"mend the row, or name all labels: finetune.{task}.labels=[...]",
            )


def measured(
    objective: Objective, rows: Sequence[LabelledRow], too_long: str, *, skip: bool = False
) -> Measured:
    """Each row encoded once: how long it is, what of it is learned, what did not fit.

    Args:
        objective: The task.
        rows: The rows.
        too_long: The recipe's word for rows that are longer than the model reads.
        skip: Count what the task cannot use, instead of stopping there.

    Raises:
        DataError: A row cannot be used, or it is too long and the recipe says to stop then.
    """
    rows = objective.relate(rows) if isinstance(objective, Relates) else rows
    kept: list[LabelledRow] = []
    lengths, targets, cuts, groups = list[int](), list[int](), list[int](), list[int]()
    dropped = unusable = passed_over = 0
    for number, row in enumerate(rows):
        try:
            made = _examples(objective, row)
        except DataError:
            if not skip:
                raise
            unusable += 1
            continue
        for one, example in made:
            cut = int(example.get(CUT, 0))
            if cut and too_long == "stop":
                raise DataError(
                    f"{one['place']}: the row is {cut:,} tokens longer than the model reads",
                    hint="set `too_long: cut` or `too_long: drop`, or a larger `model.context`",
                )
            if cut and too_long == "drop":
                dropped += 1
                continue
            kept.append(one)
            lengths.append(size_of(objective, example))
            targets.append(int(objective.collate([example])["num_targets"]))
            cuts.append(cut)
            passed_over += int(example.get(PASSED_OVER, 0))
            groups.append(number)
    return Measured(kept, lengths, targets, cuts, groups, dropped, unusable, passed_over)


def _examples(objective: Objective, row: LabelledRow) -> list[tuple[LabelledRow, Example]]:
    """What the task makes of a row: itself, or its windows, each encoded.

    Raises:
        DataError: It cannot be used; says where it is.
    """
    try:
        parts = objective.expand(row) if isinstance(objective, Expands) else [row]
        return [(part, objective.encode({**part, "seed": 0})) for part in parts]
    except DataError as error:
        raise type(error)(f"{row['place']}: {error.message}", hint=error.hint) from error


def _limit(facts: Mapping[str, Any]) -> str:
    """How long rows may be, and whether that is the recipe's limit or the model's."""
    context, longest = facts["context"], facts["reads"]
    more = f"; this model could read {longest:,}" if longest is None or longest > context else ""
    return f"`model.context`, {context:,} tokens" + (more if longest else "")


def _words(facts: Mapping[str, Any]) -> list[str]:
    """What a person should know of the rows, a sentence a line."""
    train, held_out = facts["train"], facts["held_out"]
    lines = [str(facts["said"])]
    mean = train["num_tokens"] / max(1, train["num_rows"])
    lines.append(
        f"{train['num_rows']:,} rows to learn from, {held_out['num_rows']:,} held out; "
        f"{mean:.0f} tokens on average, {train['longest']:,} at most"
    )
    if facts["classes"]:
        shown = list(facts["classes"].items())
        words = ", ".join(f"{name} {count:,}" for name, count in shown[:_MOST_CLASSES_SHOWN])
        lines.append(f"{len(shown)} labels: {words}" + (", ..." if len(shown) > _MOST_CLASSES_SHOWN else ""))
    if facts.get("counted"):
        lines.append(str(facts["counted"]))
    cut = train["num_cut"] + held_out["num_cut"]
    if cut:
        lost = train["tokens_cut"] + held_out["tokens_cut"]
        lines.append(f"{cut:,} rows are longer than {_limit(facts)}: {lost:,} tokens are cut off")
    if facts["unusable"]:
        lines.append(f"{facts['unusable']:,} rows cannot be used and are left out (`on_error: skip`)")
    if facts["dropped"]:
        lines.append(f"{facts['dropped']:,} rows are longer than {_limit(facts)} and are left out")
    if melted := train["num_passed_over"] + held_out["num_passed_over"]:
        lines.append(
            f"{melted:,} answers are not learned: their first characters make one token with the end of the prompt"
        )
    if idle := train["num_idle"]:
        lines.append(f"{idle:,} rows have nothing to learn: see them by llmkit show")
    if facts["shared"]:
        lines.append(f"{facts['shared']:,} held-out rows are also among those to learn from")
    return lines
