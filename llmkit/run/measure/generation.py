"""`task: generation`: what a model writes, against references where there are some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmkit.errors import MissingError, UsageError
from llmkit.evaluate.measurement import Items, Measurement
from llmkit.metrics.written import WrittenRows, written_rows
from llmkit.recipe.evaluation import Generation
from llmkit.recipe.labelled import Labelled
from llmkit.registry import kind_for
from llmkit.run.folders import CACHE
from llmkit.run.measure.asked import Asked, Subject

if TYPE_CHECKING:
    from llmkit.evaluate.answering import Written
    from llmkit.evaluate.prompts import Prompt

_MOST_ERRORS = 50
_LONGEST_TEXT = 2000
_OFTEN = 0.2
"""From this share on it is told that texts were cut off."""
_OWN_DECODING = (
    "no_repeat_ngram_size",
    "length_penalty",
    "early_stopping",
    "forced_bos_token_id",
    "min_length",
)
_WITH_TASK = ("sft", "seq2seq")
"""Tasks whose held-out rows can be asked."""


@dataclass(frozen=True)
class _Rows:
    """What is asked.

    Attributes:
        prompts: The prompts.
        num_silent: Conversations that were left out, for their last answer has no text.
        address: What they are.
        held_out: Whether a run held them out.
    """

    prompts: "Sequence[Prompt]"
    num_silent: int
    address: str
    held_out: bool


def measure(subject: Subject, asked: Asked) -> Measurement:
    """Let a model write to each prompt, and compare with the references.

    Raises:
        UsageError: Nothing says what is asked, the model does not write, or Chinese would be cut at spaces.
        DataError: A row cannot be used, or there is none.
        MissingError: A figure is asked for that needs a package that is missing.
    """
    from llmkit.data.loader import evenly_spaced

    check_package(asked)
    rows = _rows(subject, asked)
    chosen = evenly_spaced(len(rows.prompts), asked.section.rows).tolist()
    prompts = [rows.prompts[number] for number in chosen]
    written, how = write(subject, asked, prompts)
    settings = asked.section.generation
    references = [prompt.references for prompt in prompts] if prompts[0].references else None
    texts = [one.text for one in written]
    counted = written_rows(texts, references, language=asked.language, bleu_tokenizer=settings.bleu_tokenizer)
    figures = counted.all_figures()
    return Measurement(
        subject=subject.word,
        model=str(subject.place),
        task="generation",
        data=rows.address,
        figures=figures,
        shown=tuple(figures),
        best="f1" if references is not None else "repetition",
        items=items_of(prompts, counted),
        tables={**errors_of(prompts, texts, counted), "written": lengths_of(written)},
        settings={**how, **counted.settings, "num_rows": len(prompts), "held_out": rows.held_out},
        predictions=predictions_of(prompts, written, counted),
        warnings=[*_left_out(rows), *warnings_of(written, settings), *missing_package(counted, references)],
    )


def write(
    subject: Subject, asked: Asked, prompts: "Sequence[Prompt]"
) -> "tuple[list[Written], dict[str, Any]]":
    """What a model writes to prompts, and how it was asked.

    Raises:
        UsageError: The model does not write.
        DataError: A prompt cannot be put into the chat template.
        MissingError: There is no model.
    """
    from contextlib import nullcontext

    import torch

    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.evaluate.answering import inputs_of, write_all
    from llmkit.evaluate.model import load_model

    check_writes(subject)
    model = load_model(subject.place, trusted=subject.trust_remote_code).to(asked.device)
    model.eval()
    tokenizer = load_tokenizer(str(subject.place))
    settings = asked.section.generation
    templated = bool(tokenizer.chat_template) if settings.chat == "auto" else settings.chat
    if templated and not tokenizer.chat_template:
        raise UsageError(
            f"{subject.place}: the model has no chat template", hint="leave eval.generation.chat out"
        )
    texts = inputs_of(tokenizer, _framed(subject, prompts, chat=templated), chat=templated)
    bf16 = subject.precision == "bf16"
    narrow = torch.autocast(asked.device, dtype=torch.bfloat16) if bf16 else nullcontext()
    done = Told(asked, len(texts))
    with narrow:
        written = write_all(
            model, tokenizer, texts, settings, seed=asked.seed, keys=[p.key for p in prompts], told=done
        )
    return written, _how(model, settings, asked.seed, subject.precision, chat=templated)


def _framed(subject: Subject, prompts: "Sequence[Prompt]", *, chat: bool) -> "Sequence[Prompt]":
    """The prompts as a decoder was trained to be asked them, where a run trained it to write a text for a text."""
    run = subject.task
    if run is None or run.section.task != "seq2seq" or kind_for("seq2seq", run.facts) != "causal":
        return prompts
    from llmkit.objectives.seq2seq_decoder import asked_text

    return [
        one if one.messages else replace(one, text=asked_text(run.section.seq2seq, one.text, chat=chat))
        for one in prompts
    ]


def check_writes(subject: Subject) -> None:
    """Look that the model is of a kind that writes.

    Raises:
        UsageError: It is not.
    """
    from llmkit.models.build import kind_of

    kind = kind_of(str(subject.place))
    if kind not in ("causal", "seq2seq"):
        raise UsageError(
            f"{subject.place}: a model of the kind `{kind}` does not write",
            hint="give a causal or an encoder-decoder language model",
        )


class Told:
    """Tells how far it is.

    Args:
        asked: Who is told.
        total: How many there are.
        unit: Of what.
    """

    def __init__(self, asked: Asked, total: int, unit: str = "row") -> None:
        self._asked, self._total, self._done, self._unit = asked, total, 0, unit

    def __call__(self, more: int) -> None:
        """So many more are done."""
        self._done += more
        self._asked.reporter.progress("eval", self._done, self._total, unit=self._unit)


def _how(model: Any, settings: Generation, seed: int, precision: str, *, chat: bool) -> dict[str, Any]:
    """How the model wrote, with what its own configuration says of it."""
    own = {name: getattr(model.generation_config, name, None) for name in _OWN_DECODING}
    said: dict[str, Any] = settings.model_dump(exclude={"bleu_tokenizer", "chat"})
    said |= {"chat": chat, "precision": precision, "models_own": {k: v for k, v in own.items() if v}}
    return {**said, "seed": seed} if settings.temperature else said


def data_of(asked: Asked, looks: str) -> Labelled | None:
    """Where the rows are; None where nothing says so.

    Args:
        asked: What is asked.
        looks: What rows look like, for the message.

    Raises:
        UsageError: Several sources are named.
    """
    section = asked.section
    if section.labelled is not None or not section.data:
        return section.labelled
    if len(section.data) > 1:
        raise UsageError(
            f"rows ({looks}) come from one source, and eval.data names {len(section.data)}",
            hint="name all files in one: `files: [a, b]`",
        )
    named = section.data[0].model_dump(include={"name", "files", "dataset", "split", "encoding", "on_error"})
    return Labelled(**named)


def _rows(subject: Subject, asked: Asked) -> _Rows:
    """The prompts: rows that are named, or those that a run held out."""
    from llmkit.data.records.found import fingerprint
    from llmkit.evaluate.prompts import of_rows, read_prompts

    data, cache = data_of(asked, "`prompt, references`, or `messages`"), asked.options.runs / CACHE
    if data is not None:
        made = read_prompts(data, asked.base, cache=cache)
        return _Rows(*made, fingerprint(data, asked.base, cache=cache), held_out=False)
    run = (asked.held_out_by or subject).task
    if run is None or run.section.task not in _WITH_TASK:
        raise UsageError(
            "nothing says what to ask the model",
            hint="--data FILE, with rows of `prompt, references` or with conversations in `messages`",
        )
    rows, address = held_out_rows(run, asked)
    return _Rows(*of_rows(rows), address, held_out=True)


def held_out_rows(run: Any, asked: Asked) -> tuple[list[Mapping[str, Any]], str]:
    """The rows that a run on a task held out, and their address.

    Raises:
        MissingError: They are gone.
        UsageError: The run held nothing out.
    """
    from llmkit.data.samples import Samples

    address = str(run.facts["address"])
    homes = [asked.options.runs / CACHE, *(place / CACHE for place in run.place.absolute().parents)]
    folder = next((home / "rows" / address for home in homes if (home / "rows" / address).is_dir()), None)
    if folder is None:
        raise MissingError(
            f"{run.place}: the rows that its run held out are gone (rows/{address} in the cache)",
            hint="give others: --data FILES",
        )
    kept = Samples(folder, "held_out")
    if not len(kept):
        raise UsageError(f"{run.place}: its run held no rows out", hint="give others: --data FILES")
    return [kept[number] for number in range(len(kept))], address


def items_of(prompts: "Sequence[Prompt]", counted: WrittenRows) -> Items:
    """What the figures are made of."""
    right = None if counted.right_N is None else counted.right_N.tolist()
    return Items(distinct_keys([prompt.key for prompt in prompts]), counted.figures, right)


def distinct_keys(keys: Sequence[str]) -> list[str]:
    """Keys of rows, of which some may be the same row, each another."""
    seen: dict[str, int] = {}
    made = []
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        made.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return made


def errors_of(prompts: "Sequence[Prompt]", texts: Sequence[str], counted: WrittenRows) -> dict[str, Any]:
    """The rows that are least like their references."""
    if counted.right_N is None:
        return {}
    scores_N = counted.means["f1"]
    wrong = [row for row in scores_N.argsort(kind="stable").tolist() if not counted.right_N[row]]
    return {
        "errors": [
            {
                "place": prompts[row].place,
                "text": prompts[row].text[-_LONGEST_TEXT:],
                "target": prompts[row].references[0],
                "prediction": texts[row],
                "score": float(scores_N[row]),
            }
            for row in wrong[:_MOST_ERRORS]
        ]
    }


def lengths_of(written: "Sequence[Written]") -> dict[str, float]:
    """How long the texts are."""
    num = len(written)
    return {
        "mean_tokens": sum(one.num_tokens for one in written) / num,
        "finished": sum(one.finished for one in written) / num,
        "empty": sum(not one.text for one in written) / num,
    }


def predictions_of(
    prompts: "Sequence[Prompt]", written: "Sequence[Written]", counted: WrittenRows
) -> list[dict[str, Any]]:
    """A line for each row."""
    lines = []
    for row, (prompt, one) in enumerate(zip(prompts, written, strict=True)):
        line: dict[str, Any] = {"place": prompt.place, "input": prompt.shown}
        if prompt.references:
            line["target"] = list(prompt.references) if len(prompt.references) > 1 else prompt.references[0]
        line |= {"prediction": one.text, "num_tokens": one.num_tokens, "finished": one.finished}
        scores = {name: float(values_N[row]) for name, values_N in counted.means.items()}
        lines.append({**line, "score": scores.get("f1"), "scores": scores})
    return lines


def _left_out(rows: _Rows) -> list[str]:
    if not rows.num_silent:
        return []
    total = rows.num_silent + len(rows.prompts)
    return [
        f"{rows.num_silent:,} of {total:,} conversations were left out: their last answer calls tools and has no text "
        "to compare with"
    ]


def warnings_of(written: "Sequence[Written]", settings: Generation) -> list[str]:
    """What a person should know of what was written."""
    said, num = [], len(written)
    unfinished = sum(not one.finished for one in written)
    if unfinished > _OFTEN * num:
        said.append(
            f"{unfinished:,} of {num:,} texts were cut off at {settings.max_new_tokens:,} tokens: the model did not "
            "end them by itself (eval.generation.max_new_tokens, or eval.generation.stop)"
        )
    less = [one.room for one in written if one.room < settings.max_new_tokens]
    if less:
        said.append(
            f"{len(less):,} of {num:,} prompts leave less room in the model's length than the "
            f"{settings.max_new_tokens:,} new tokens asked for (the least: {min(less):,})"
        )
    cut = sum(one.cut > 0 for one in written)
    if cut:
        said.append(f"{cut:,} prompts do not fit the model; their beginnings were cut")
    different = {one.text for one in written}
    if num > 1 and len(different) == 1:
        said.append(f"all {num:,} texts are the same: {next(iter(different))[:80]!r}")
    return said


def check_package(asked: Asked) -> None:
    """Look that what is asked for by name can be counted.

    Raises:
        MissingError: A package is missing.
    """
    from importlib.util import find_spec

    named = [name for name in asked.section.metrics if name in ("bleu", "chrf")]
    if named and find_spec("sacrebleu") is None:
        raise MissingError(
            f"{' and '.join(named)} need sacrebleu, which is not installed",
            hint="pip install 'llmkit[metrics]'",
        )


def missing_package(counted: WrittenRows, references: object) -> list[str]:
    """What is told where BLEU and chrF could not be counted."""
    if references is None or counted.overlaps:
        return []
    return ["BLEU and chrF were left out: sacrebleu is not installed (pip install 'llmkit[metrics]')"]
