"""`llmkit plan`, and the same numbers for the run: from a recipe to a `Plan`."""

import json
from pathlib import Path
from typing import Any

from llmkit.errors import UsageError
from llmkit.hardware import Hardware, detect_hardware
from llmkit.launch.world import World
from llmkit.plan import (
    DataFacts,
    ModelShape,
    Plan,
    check_fit,
    check_vectors,
    counts_from_padding,
    known_kinds,
    make_plan,
    model_fields,
    shape_of_config,
    with_lengths,
)
from llmkit.plan.counted import is_counted, plan_counted, refuse_counted
from llmkit.recipe import Loaded
from llmkit.recipe.architectures import family_of_config
from llmkit.recipe.block import Block
from llmkit.recipe.schema import Model, Recipe
from llmkit.registry import goal_of
from llmkit.report.formatting import format_bytes, format_count, format_percent
from llmkit.run.folders import Options, placed
from llmkit.run.tokenize import corpora

_BYTES_PER_TOKEN = 4.0
_BYTES_PER_TOKEN_HAN = 3.4


def plan(loaded: Loaded, options: Options) -> Plan:
    """The plan before anything is read but file sizes: nothing is written, torch is not imported.

    Raises:
        UsageError: The recipe has no `pretrain` section, or its numbers do not fit together.
    """
    loaded = placed(loaded)
    hardware = detect_hardware(loaded.recipe.machine)
    return plan_run(
        loaded,
        options,
        hardware,
        estimated_facts(loaded, options),
        vocab_size=_expected_vocabulary(loaded),
        pad_token_id=_expected_padding(loaded),
    )


def outline(loaded: Loaded, options: Options) -> list[tuple[str, str, str]]:
    """What `tokenize` will do, as (section, key, text); sizes are those of the files.

    Raises:
        UsageError: The recipe names no text.
        DataError: A file it names is not there.
    """
    text, _ = corpora(loaded, options)
    facts = estimated_facts(loaded, options)
    spec = loaded.recipe.tokenize
    rows = [("source", name, f"{format_bytes(size)} on disk") for name, size in text.sizes()]
    rows.append(("text", "held out", format_percent(text.held_out)))
    rows.append(("text", "tokens", f"about {format_count(facts.num_tokens)}, guessed from the size"))
    for name, block in spec.prepare if spec is not None else ():
        if block is not None:
            rows.append(("prepare", name, _settings_of(block)))
    if spec is not None and spec.tokenizer is not None:
        rows.append(("tokenizer", "taken from", spec.tokenizer))
    elif spec is not None:
        rows.append(("tokenizer", "learnt by", f"{spec.algorithm}, {spec.vocab_size:,} entries"))
        rows.append(("tokenizer", "from at most", format_bytes(spec.sample)))
    return rows


def _settings_of(block: Block) -> str:
    """A preparation step's settings that say something: `fix, unicode nfc`."""
    words = []
    for name, value in block:
        if isinstance(value, Block):
            words.append(f"{name} ({_settings_of(value)})")
        elif value is True:
            words.append(name)
        elif value not in (None, False, []):
            words.append(f"{name} {' '.join(value) if isinstance(value, list) else value}")
    return ", ".join(words)


def plan_run(
    loaded: Loaded,
    options: Options,
    hardware: Hardware,
    facts: DataFacts,
    *,
    vocab_size: int,
    pad_token_id: int | None = None,
    world: World | None = None,
) -> Plan:
    """The plan for a known vocabulary, padding token and data."""
    recipe = loaded.recipe
    if recipe.pretrain is None:
        raise UsageError("the recipe has no `pretrain` section to plan", hint="`llmkit init gpt` shows one")
    if is_counted(recipe.pretrain.model):
        return plan_counted(recipe, hardware, facts, vocab_size=vocab_size)
    world_size = world.world_size if world else options.processes
    shape = model_shape(
        recipe.pretrain.model, recipe.pretrain.objective, vocab_size, pad_token_id=pad_token_id
    )
    return make_plan(recipe, hardware, facts, vocab_size=vocab_size, model=shape, world_size=world_size)


def model_shape(
    spec: Model, objective: str, vocab_size: int, *, pad_token_id: int | None = None
) -> ModelShape:
    """The shape of the recipe's model; an architecture the plan has no formula for is counted on no device.

    Raises:
        UsageError: A model's configuration cannot be found, it cannot learn the objective, or its embedding is not as
            wide as the word vectors that it is to begin with.
        MissingError: There is no file of these vectors.
    """
    kind, fields = goal_of(objective).model, _config_fields(spec, vocab_size, pad_token_id)
    refuse_counted(fields)
    kinds = known_kinds(fields)
    if kinds is None and not spec.trust_remote_code:
        from llmkit.models.count import kinds_of_type

        kinds = kinds_of_type(str(fields.get("model_type")))
    if kinds is not None:
        check_fit(objective, fields, kinds)
    shape = shape_of_config(fields, kind)
    if shape is None:
        from llmkit.models.count import shape_by_building

        shape = shape_by_building(spec, kind, vocab_size)
    if spec.embeddings is not None:
        from llmkit.data.vectors import width_of

        width = width_of(Path(spec.embeddings))
        check_vectors(spec.embeddings, width, shape, family_of_config(fields))
    return shape


def estimated_facts(loaded: Loaded, options: Options) -> DataFacts:
    """Tokens and documents guessed from file sizes."""
    text, _ = corpora(loaded, options)
    num_bytes = text.expected_bytes()
    han = loaded.recipe.language[:2] in ("zh", "ja", "ko")
    tokens = int(num_bytes / (_BYTES_PER_TOKEN_HAN if han else _BYTES_PER_TOKEN))
    held_out = int(tokens * text.held_out)
    return DataFacts(
        num_tokens=tokens - held_out,
        num_documents=0,
        num_bytes=num_bytes,
        exact=False,
        num_held_out_tokens=held_out,
    )


def _config_fields(spec: Model, vocab_size: int, pad_token_id: int | None) -> dict[str, Any]:
    fields = model_fields(spec)
    if fields is not None:
        return with_lengths(fields, vocab_size, spec.context, pad_token_id=pad_token_id)
    path = Path(str(spec.name)) / "config.json"
    if path.is_file():
        fields = json.loads(path.read_bytes())
        if "auto_map" in fields:  # refused now rather than when the text has been read
            from llmkit.models.trust import check_code

            check_code(str(spec.name), fields, trusted=spec.trust_remote_code)
        return fields
    from llmkit.models.count import fetch_config

    return fetch_config(str(spec.name), trusted=spec.trust_remote_code)


def _named_tokenizer(recipe: Recipe) -> str | None:
    """The tokenizer that a recipe takes from somewhere; None: it learns one, or has none."""
    named = recipe.pretrain.tokenizer if recipe.pretrain else None
    if named is None and recipe.tokenize is not None:
        named = recipe.tokenize.tokenizer
        if named is None:
            return None
    return named or (recipe.pretrain.model.name if recipe.pretrain else None)


def _expected_padding(loaded: Loaded) -> int | None:
    """The padding token's id of a tokenizer that exists, where the model's size depends on it."""
    name, section = _named_tokenizer(loaded.recipe), loaded.recipe.pretrain
    fields = model_fields(section.model) if section is not None else None
    if name is None or fields is None or not counts_from_padding(fields):
        return None
    from llmkit.data.tokenizers import open_tokenizer

    number: int | None = open_tokenizer(name).pad_token_id
    return number


def _expected_vocabulary(loaded: Loaded) -> int:
    recipe = loaded.recipe
    name = _named_tokenizer(recipe)
    if name is None and recipe.tokenize is not None:
        return recipe.tokenize.vocab_size
    if not name:
        raise UsageError("the recipe has no tokenizer", hint="add `tokenize: {vocab_size: 8k}`")
    path = Path(name) / "tokenizer.json"
    if path.is_file():
        content = json.loads(path.read_bytes())
        added = {token["content"] for token in content.get("added_tokens", ())}
        return len(set(content["model"]["vocab"]) | added)
    from llmkit.data.tokenizers import load_tokenizer

    return len(load_tokenizer(name))
