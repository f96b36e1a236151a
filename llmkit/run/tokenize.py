"""`llmkit tokenize`: text to tokenizer and shards."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.durable import write_file, write_json
from llmkit.errors import MissingError, UsageError
from llmkit.recipe import Loaded
from llmkit.report.console import Reporter
from llmkit.report.formatting import format_count
from llmkit.report.report import write_report
from llmkit.run.folders import CACHE, Options, Result, base_of, leave_record, locked, run_folder

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
        text, text_for_tokenizer = corpora(loaded, options, reporter)
        name, figures = find_tokenizer(loaded, text_for_tokenizer, reporter)
        if "found" in figures:
            publish_tokenizer(Path(name), folder / "tokenizer")
        if figures.get("found"):
            reporter.note("the tokenizer is there already")
        shards = text.shards(open_tokenizer(name))
        for shard in shards:
            if reason := shard.manifest["encoder"]["reason"]:
                reporter.note(f"{shard.name}: encoded by tokenizers: {reason}")
        card = data_card(shards)
        write_json(folder / "data.json", card)
        prepared = text.prepared
        examples = prepared.examples if prepared is not None else []
        write_file(folder / "dropped.jsonl", "".join(f"{_as_line(example)}\n" for example in examples))
        facts = {"name": recipe.name, "kind": "tokenize", "status": "done", "command": options.command}
        preparation = prepared.report if prepared is not None else None
        write_report(
            folder,
            {
                **facts,
                "tokenizer": figures,
                "preparation": preparation,
                "dropped_examples": examples,
                "data": card,
            },
        )
    dropped = _dropped(preparation, shards)
    _say_what_was_dropped(dropped, preparation, reporter)
    summary = {
        "documents": card["num_documents"] + card["num_held_out_documents"],
        "tokens": card["num_tokens"] + card["num_held_out_tokens"],
        "bytes_per_token": round(card["num_bytes"] / max(1, card["num_tokens"]), 4),
        "held_out": {"documents": card["num_held_out_documents"], "tokens": card["num_held_out_tokens"]},
        "dropped": dropped,
        "tokenizer": figures,
        "sources": card["sources"],
        "report": str(folder / "report.html"),
    }
    follows = f"llmkit pretrain {options.subject}" if recipe.pretrain else "llmkit init gpt my.yaml"
    return Result(folder, summary, follows)


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
    if recipe.tokenize is not None:
        length = recipe.pretrain.model.context if recipe.pretrain else None
        folder, figures = ensure_tokenizer(recipe.tokenize, text, reporter, max_length=length)
        return str(folder), figures
    if recipe.pretrain is not None and recipe.pretrain.model.name is not None:
        return recipe.pretrain.model.name, {}
    raise MissingError("the recipe has no tokenizer", hint="add `tokenize: {vocab_size: 8k}`")


def tokenizer_of(loaded: Loaded, options: Options, reporter: Reporter) -> str:
    """The folder or name of the recipe's tokenizer, made first where it is not there yet."""
    _, text = corpora(loaded, options, reporter)
    return find_tokenizer(loaded, text, reporter)[0]


def _as_line(example: Mapping[str, Any]) -> str:
    return json.dumps(example, ensure_ascii=False)


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


def _say_what_was_dropped(
    dropped: Mapping[str, int], preparation: Mapping[str, Any] | None, reporter: Reporter
) -> None:
    if preparation is not None:
        read, kept = preparation["read"]["documents"], preparation["kept"]["documents"]
        reporter.note(f"kept {format_count(kept)} of {format_count(read)} documents")
    for what, count in sorted(dropped.items(), key=lambda item: (-item[1], item[0])):
        reporter.note(f"{what}: {count:,}")
