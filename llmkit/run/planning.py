"""`llmkit plan`, and the same numbers for the run: from a recipe to a `Plan`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.errors import UsageError
from llmkit.hardware import Hardware, detect_hardware
from llmkit.launch.world import World
from llmkit.plan import (
    PRESETS,
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
    shape_of_preset,
    with_lengths,
)
from llmkit.plan.beside import generator_shape
from llmkit.plan.communication import matrices_of, with_communication
from llmkit.plan.counted import is_counted, plan_counted, refuse_counted
from llmkit.plan.published import PUBLISHED
from llmkit.recipe import Loaded, load_recipe
from llmkit.recipe.architectures import family_of_config, kind_of_config
from llmkit.recipe.block import Block
from llmkit.recipe.objectives import Distil
from llmkit.recipe.schema import Model, Recipe
from llmkit.registry import OBJECTIVES, goal_of, nearest
from llmkit.report.formatting import format_bytes, format_count, format_percent
from llmkit.run.folders import Options, find_model, placed
from llmkit.run.tokenize import corpora
from llmkit.train.places import model_folder

_BYTES_PER_TOKEN = 4.0
_BYTES_PER_TOKEN_HAN = 3.4


TOKENS_PER_WEIGHT = 20
"""How long a model is trained where nobody says. Source: Hoffmann et al. 2022 ("Chinchilla"), table 3."""

USUAL_CONTEXT, USUAL_BATCH, USUAL_VOCABULARY = 4096, "1Mi tokens", 32_000


def plan(loaded: Loaded, options: Options, hardware: Hardware | None = None) -> Plan:
    """The plan before anything is read but file sizes: nothing is written, torch is not imported.

    Args:
        loaded: The recipe.
        options: What the command was told.
        hardware: What to plan for; by default this machine.

    Raises:
        UsageError: The recipe has no `pretrain` section, or its numbers do not fit together.
    """
    loaded = placed(loaded)
    if hardware is None:
        hardware = detect_hardware(loaded.recipe.machine)
    return plan_run(
        loaded,
        options,
        hardware,
        estimated_facts(loaded, options),
        vocab_size=_expected_vocabulary(loaded),
        pad_token_id=_expected_padding(loaded),
    )


def recipe_of_model(name: str, overrides: Sequence[str] = ()) -> Loaded:
    """A recipe that pre-trains a model on 20 tokens a weight, for a plan where there is no recipe.

    Args:
        name: A preset or a published shape, a folder, or a name on the Hub.
        overrides: Settings to change, as words.

    Raises:
        UsageError: There is no such model, or it cannot be pre-trained.
    """
    model = _model_by_name(name)
    shape, objective, most = _looked_at(model, name)
    section = {
        "objective": objective,
        "model": {**model, "context": min(USUAL_CONTEXT, most or USUAL_CONTEXT)},
        "tokenizer": name,  # a recipe needs one, and text; neither is read
        "data": {"files": "stdlib:"},
        "train": {"length": f"{TOKENS_PER_WEIGHT * shape.num_parameters} tokens", "batch": USUAL_BATCH},
    }
    return load_recipe({"llmkit": 1, "name": "plan", "pretrain": section}, overrides=overrides)


def _model_by_name(name: str) -> dict[str, Any]:
    if name in (*PRESETS, *PUBLISHED):
        return {"preset": name}
    if Path(name).is_dir():  # of a run, the model that it made
        return {"name": str(find_model(name, Path()))}
    if "/" in name:
        return {"name": name}
    guess = nearest(name, [*PUBLISHED, *PRESETS])
    raise UsageError(
        f"--model {name!r}: no such model",
        hint=(f"did you mean {guess}? " if guess else "")
        + f"published shapes: {', '.join(PUBLISHED)}; or a preset, a folder, a name on the Hub (owner/model)",
    )


def _looked_at(model: Mapping[str, Any], name: str) -> tuple[ModelShape, str, int | None]:
    """A model's shape, an objective that it can learn, and the longest row that it was made for."""
    fields = _config_fields(Model.model_validate(model), USUAL_VOCABULARY, None)
    kinds = known_kinds(fields) or ("causal",)
    objective = next((name for name, goal in OBJECTIVES.items() if goal.model in kinds), None)
    if objective is None:
        raise UsageError(f"--model {name!r}: no objective of pre-training fits {fields.get('model_type')}")
    if "preset" in model and name in PRESETS:
        return shape_of_preset(name, USUAL_VOCABULARY, USUAL_CONTEXT), objective, None
    spec = Model.model_validate(model)
    shape = model_shape(spec, objective, int(fields.get("vocab_size") or USUAL_VOCABULARY))
    return shape, objective, shape.max_length


def plan_without_text(loaded: Loaded, options: Options, hardware: Hardware | None = None) -> Plan:
    """The plan of what `recipe_of_model` gave, as if there were as much text as is asked for.

    Args:
        loaded: The recipe; its text and tokenizer are not looked at.
        options: What the command was told.
        hardware: What to plan for; by default this machine.

    Raises:
        UsageError: The recipe's length cannot be counted without text, or its numbers do not fit together.
    """
    section = loaded.recipe.pretrain
    assert section is not None
    hardware = hardware or detect_hardware(loaded.recipe.machine)
    fields = _config_fields(section.model, USUAL_VOCABULARY, None)
    vocab_size = int(fields.get("vocab_size") or USUAL_VOCABULARY)
    length = section.train.length
    if length.unit != "tokens":
        raise UsageError(
            f"pretrain.train.length is {length}, and there is no text that it could be counted by",
            hint="pretrain.train.length=20B tokens",
        )
    facts = DataFacts(num_tokens=int(length.value) + 1, num_documents=0, num_bytes=0, exact=True)
    found = plan_run(loaded, options, hardware, facts, vocab_size=vocab_size)
    note = f"no text is named: as much of it as `train.length` is assumed, and a vocabulary of {vocab_size:,}"
    return replace(found, data={}, notes=(*found.notes, note))


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
    fields = _config_fields(recipe.pretrain.model, vocab_size, pad_token_id)
    generator = generator_shape(recipe.pretrain, fields, shape)
    made = make_plan(
        recipe,
        hardware,
        facts,
        vocab_size=vocab_size,
        model=shape,
        world_size=world_size,
        teacher=teacher_shape(recipe.pretrain.distil),
        generator=generator,
    )
    return with_communication(
        made,
        recipe.machine.communication,
        recipe.pretrain,
        shapes=matrices_of(shape),
        beside=generator.num_parameters if generator is not None else 0,
    )


def teacher_shape(distil: Distil | None) -> ModelShape | None:
    """The shape of the model that is learned from; None where there is none, or its configuration is not here."""
    path = Path(model_folder(distil.teacher)) / "config.json" if distil is not None else None
    if path is None or not path.is_file():
        return None
    fields = json.loads(path.read_bytes())
    return shape_of_config(fields, kind_of_config(fields)) or shape_of_config(fields)


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
