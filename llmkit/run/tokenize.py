"""`llmkit tokenize`: text to tokenizer and shards."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.durable import write_json
from llmkit.errors import MissingError, UsageError
from llmkit.recipe import Loaded
from llmkit.report.console import Reporter
from llmkit.report.report import write_report
from llmkit.run.folders import CACHE, Options, Result, base_of, leave_record, locked, run_folder

if TYPE_CHECKING:
    from llmkit.data.prepare import Corpus


def tokenize(loaded: Loaded, options: Options, reporter: Reporter) -> Result:
    """Make the tokenizer and the shards; what is there already is found.

    Raises:
        UsageError: The recipe has no `tokenize` section.
        DataError: The text cannot be used.
    """
    from llmkit.data.prepare import data_card, publish_tokenizer
    from llmkit.data.tokenizers import load_tokenizer

    recipe = loaded.recipe
    if recipe.tokenize is None:
        raise UsageError("the recipe has no `tokenize` section", hint="add `tokenize: {vocab_size: 8k}`")
    folder = run_folder(loaded, options, "tokenize")
    with locked(folder):
        leave_record(folder, loaded)
        name, figures = find_tokenizer(loaded, options, reporter)
        if "found" in figures:
            publish_tokenizer(Path(name), folder / "tokenizer")
        if figures.get("found"):
            reporter.note("the tokenizer is there already")
        shards = corpus(loaded, options).shards(load_tokenizer(name), reporter)
        card = data_card(shards)
        write_json(folder / "data.json", card)
        facts = {"name": recipe.name, "kind": "tokenize", "status": "done", "command": options.command}
        write_report(folder, {**facts, "tokenizer": figures})
    summary = {
        "documents": card["num_documents"],
        "tokens": card["num_tokens"],
        "bytes_per_token": card["num_bytes"] / max(1, card["num_tokens"]),
        "tokenizer": figures,
        "sources": card["sources"],
    }
    follows = f"llmkit pretrain {options.subject}" if recipe.pretrain else "llmkit init gpt my.yaml"
    return Result(folder, summary, follows)


def corpus(loaded: Loaded, options: Options, *, for_tokenizer: bool = False) -> "Corpus":
    """The text that the recipe trains its model on, or its tokenizer."""
    from llmkit.data.prepare import corpus_of

    cache = options.runs / CACHE
    return corpus_of(loaded.recipe, base=base_of(loaded), cache=cache, for_tokenizer=for_tokenizer)


def find_tokenizer(loaded: Loaded, options: Options, reporter: Reporter) -> tuple[str, dict[str, Any]]:
    """The recipe's tokenizer, made first if the recipe says how.

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
        text = corpus(loaded, options, for_tokenizer=True)
        folder, figures = ensure_tokenizer(recipe.tokenize, text, reporter, max_length=length)
        return str(folder), figures
    if recipe.pretrain is not None and recipe.pretrain.model.name is not None:
        return recipe.pretrain.model.name, {}
    raise MissingError("the recipe has no tokenizer", hint="add `tokenize: {vocab_size: 8k}`")
