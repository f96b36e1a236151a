"""`llmkit tokenize`: text to tokenizer and shards."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.durable import write_file, write_json
from llmkit.errors import DataError, MissingError, UsageError
from llmkit.recipe import Loaded, resolved_yaml
from llmkit.recipe.schema import tokenize_of
from llmkit.report.console import Reporter
from llmkit.report.report import write_report
from llmkit.run.folders import CACHE, Options, Result, anchored, base_of, leave_record, locked, run_folder

if TYPE_CHECKING:
    from llmkit.data.corpus import Corpus
    from llmkit.data.shards import TokenShards


def tokenize(loaded: Loaded, options: Options, reporter: Reporter) -> Result:
    """Prepare the text, make the tokenizer and the shards; what is there already is found.

    Raises:
        UsageError: The recipe has no `tokenize` section.
        DataError: The text cannot be used.
    """
    from llmkit.data.prepare import data_card, publish_tokenizer
    from llmkit.data.tokenizers import open_tokenizer

    recipe = loaded.recipe
    if recipe.tokenize is None:
        raise UsageError("the recipe has no `tokenize` section", hint="add `tokenize: {vocab_size: 8k}`")
    folder = run_folder(loaded, options, "tokenize")
    with locked(folder):
        leave_record(folder, loaded)
        write_file(folder / "resolved.yaml", resolved_yaml(anchored(loaded)))
        text, text_for_tokenizer = corpora(loaded, options, reporter)
        facts = {"name": recipe.name, "kind": "tokenize", "command": options.command}
        try:
            prepared = text.prepared
        except DataError as error:
            _report_nothing_left(folder, facts, error)
            raise
        name, figures = find_tokenizer(loaded, text_for_tokenizer, reporter)
        if "found" in figures:
            publish_tokenizer(Path(name), folder / "tokenizer")
        shards = text.shards(open_tokenizer(name))
        card = data_card(shards)
        write_json(folder / "data.json", card)
        examples = prepared.examples if prepared is not None else []
        write_file(folder / "dropped.jsonl", _as_lines(examples))
        preparation = prepared.report if prepared is not None else None
        made = {"tokenizer": figures, "preparation": preparation, "dropped_examples": examples, "data": card}
        write_report(folder, {**facts, "status": "done", **made})
    dropped = _dropped(preparation, shards)
    _say(reporter, figures, preparation, dropped, card, shards)
    reporter.note(f"report: {folder / 'report.html'}")
    summary = {
        "documents": card["num_documents"],
        "tokens": card["num_tokens"],
        "bytes_per_token": round(card["num_bytes"] / max(1, card["num_tokens"]), 4),
        "held_out": {"documents": card["num_held_out_documents"], "tokens": card["num_held_out_tokens"]},
        "dropped": dropped,
        "preparation": preparation,
        "tokenizer": figures,
        "sources": card["sources"],
        "report": str(folder / "report.html"),
    }
    return Result(folder, summary, _next(loaded, options))


def _next(loaded: Loaded, options: Options) -> str:
    if loaded.recipe.pretrain is None:
        return "llmkit init gpt my.yaml"
    elsewhere = options.runs != Path(os.environ.get("LLMKIT_RUNS") or "runs")
    return f"llmkit pretrain {options.subject}" + (
        f" --runs {shlex.quote(str(options.runs))}" if elsewhere else ""
    )


def _report_nothing_left(folder: Path, facts: Mapping[str, Any], error: DataError) -> None:
    """A report with examples also when preparation took everything: that is when they are needed."""
    from llmkit.data.prepared import NothingLeftError

    if isinstance(error, NothingLeftError):
        write_file(folder / "dropped.jsonl", _as_lines(error.examples))
        took = {"preparation": error.report, "dropped_examples": error.examples}
        write_report(folder, {**facts, "status": "failed", "error": error.message, **took})


def _say(
    reporter: Reporter,
    figures: Mapping[str, Any],
    preparation: Mapping[str, Any] | None,
    dropped: Mapping[str, int],
    card: Mapping[str, Any],
    shards: "Sequence[TokenShards]",
) -> None:
    """What came of it, in a few lines."""
    if preparation is not None:
        read, kept = preparation["read"]["documents"], preparation["kept"]["documents"]
        reporter.note(f"kept {kept:,} of {read:,} documents")
        for step in preparation["steps"]:
            for kind, count in step["replaced"].items():
                if count:
                    what = "taken out" if step["name"] == "lines" else f"{kind} replaced by marks"
                    reporter.note(f"{step['name']}: {count:,} {what}")
    for what, count in dropped.items():
        reporter.note(f"{what}: {count:,}")
    if all(shard.was_there for shard in shards) and figures.get("found", True):
        reporter.note("already done: tokenizer and shards are there; --fresh makes them anew")
    elif figures.get("found") and "taken_from" not in figures:
        reporter.note("the tokenizer is there already")
    for reason in sorted({shard.manifest["encoder"]["reason"] for shard in shards} - {""}):
        reporter.note(f"encoded by tokenizers, not by the faster encoder: {reason}")
    per_token = card["num_bytes"] / max(1, card["num_tokens"])
    held_out = card["num_held_out_documents"]
    reporter.note(
        f"{card['num_documents']:,} documents, {card['num_tokens']:,} tokens, {per_token:.2f} bytes a token; "
        f"held out: {held_out:,} {'document' if held_out == 1 else 'documents'}"
    )


def corpora(loaded: Loaded, options: Options, reporter: Reporter | None = None) -> "tuple[Corpus, Corpus]":
    """The text that the recipe trains its model on, and its tokenizer."""
    from llmkit.data.corpus import corpora_of

    return corpora_of(
        loaded.recipe,
        base=base_of(loaded),
        cache=options.runs / CACHE,
        reporter=reporter,
        fresh=options.fresh,
    )


def find_tokenizer(loaded: Loaded, text: "Corpus", reporter: Reporter) -> tuple[str, dict[str, Any]]:
    """The recipe's tokenizer, made first if the recipe says how.

    Args:
        loaded: The recipe.
        text: What it is learnt from.
        reporter: Told what happens.

    Returns:
        Its folder or name, and figures about it.

    Raises:
        MissingError: The recipe names none and says of none how to make it.
    """
    from llmkit.data.prepare import ensure_tokenizer

    recipe = loaded.recipe
    if recipe.pretrain is not None and recipe.pretrain.tokenizer is not None:
        return recipe.pretrain.tokenizer, {}
    spec = tokenize_of(recipe)
    if spec is not None:
        length = recipe.pretrain.model.context if recipe.pretrain else None
        folder, figures = ensure_tokenizer(spec, text, reporter, max_length=length)
        return str(folder), figures
    if recipe.pretrain is not None and recipe.pretrain.model.name is not None:
        return recipe.pretrain.model.name, {}
    raise MissingError("the recipe has no tokenizer", hint="add `tokenize: {vocab_size: 8k}`")


def tokenizer_of(loaded: Loaded, options: Options, reporter: Reporter) -> str:
    """The folder or name of the recipe's tokenizer, made first where it is not there yet."""
    _, text = corpora(loaded, options, reporter)
    return find_tokenizer(loaded, text, reporter)[0]


def _as_lines(examples: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(example, ensure_ascii=False)}\n" for example in examples)


def _dropped(preparation: Mapping[str, Any] | None, shards: "Sequence[TokenShards]") -> dict[str, int]:
    """Documents that were dropped, rows and files that were skipped, by step and reason."""
    dropped: dict[str, int] = {}
    for step in preparation["steps"] if preparation is not None else ():
        for reason, count in step["dropped"].items():
            if count:
                dropped[f"{step['name']}: {reason}"] = count
    met = (
        [preparation["skipped"]]
        if preparation is not None
        else [shard.manifest["skipped"] for shard in shards]
    )
    for skipped in met:
        for what in ("rows", "files"):
            for reason, count in skipped[what].items():
                key = f"skipped {what}: {reason}"
                dropped[key] = dropped.get(key, 0) + count
    return dropped
