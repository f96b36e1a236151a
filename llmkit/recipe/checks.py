"""Rules that tie several settings together, checked on what was written, so that each problem has its place.

`published.py` holds the same rules as JSON Schema, except those it cannot express.
"""

from collections.abc import Callable, Iterator
from typing import Any

from llmkit.recipe.architectures import (
    KINDS,
    NOT_COUNTED,
    WAYS,
    family_of_config,
    family_of_preset,
    misfit,
)
from llmkit.recipe.compression_checks import check_compression
from llmkit.recipe.evaluation_checks import check_evaluation
from llmkit.recipe.faults import written
from llmkit.recipe.finetune_checks import check_finetune
from llmkit.recipe.objectives import BERT_LIKE, other_sections, tokens_for
from llmkit.recipe.optimizers import (
    DEFAULT_OPTIMIZER,
    DEFAULT_SCHEDULE,
    OPTIMIZERS,
    PARTIAL_SETTINGS,
    SCHEDULES,
    settings_of,
    with_defaults,
)
from llmkit.recipe.positions import Keys, Node, Path, find, key_spot
from llmkit.recipe.problems import Problem
from llmkit.recipe.units import listing, parse_whole
from llmkit.registry import MEASURED, OBJECTIVES

BYTES = 256
BUILT_IN_TOKENS = ("<|endoftext|>", "<|pad|>")
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BYTES_TWICE = 511
"""For `wordpiece` and `chars`: each byte at the beginning of a word and within it, but one that never is within."""
_DATA_KEYS: tuple[Path, ...] = (
    ("tokenize", "data"),
    ("pretrain", "data"),
    ("eval", "data"),
    ("compress", "data"),
    ("compress", "learn"),
)

_TRAINING = ("pretrain", "finetune")


def check(root: Node, meant: tuple[str, ...] = ()) -> list[Problem]:
    """Every rule across settings that the written recipe breaks.

    Args:
        root: The merged tree.
        meant: Dotted keys that misspelt keys were probably meant for: nothing is said about their absence.
    """
    return [problem for rule in _RULES for problem in rule(root, meant)]


def _plain(root: Node, path: Path) -> Any:
    node = find(root, path)
    return node.plain() if node is not None else None


def _one_model(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    path = ("pretrain", "model")
    given = [name for name in WAYS if _plain(root, (*path, name)) is not None]
    if given == ["architecture", "config"]:
        given = given[:1]  # its fields
    for name in given[1:]:
        message = f"`{given[0]}` and `{name}` both say which model"
        yield Problem(key_spot(root, (*path, name)), message, "keep one of them")
    config = _plain(root, (*path, "config"))
    if not isinstance(config, dict):
        return
    if "architecture" in given and "model_type" in config:
        message = "`architecture` and `model_type` both say which model"
        yield Problem(key_spot(root, (*path, "config", "model_type")), message, "leave `model_type` out")
    elif "architecture" not in given and not isinstance(config.get("model_type"), str):
        hint = "add it, such as `model_type: llama`, or `architecture: llama` above"
        yield Problem(key_spot(root, (*path, "config")), "`config` needs `model_type`", hint)


def _fits(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """The model can learn the objective, as far as the recipe alone shows what it is."""
    path = ("pretrain", "model")
    objective = _plain(root, ("pretrain", "objective")) or "clm"
    preset, architecture = _plain(root, (*path, "preset")), _plain(root, (*path, "architecture"))
    config = _plain(root, (*path, "config"))
    if isinstance(preset, str):
        way, family = "preset", family_of_preset(preset)
    elif isinstance(architecture, str):
        way, family = "architecture", architecture
    elif isinstance(config, dict):
        way, family = "config", family_of_config(config)
    else:
        return
    if family in KINDS and str(objective) in OBJECTIVES:
        found = misfit(str(objective), family, KINDS[family])
        if found is not None:
            yield Problem(key_spot(root, (*path, way)), *found)


def _counted(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """What only a network that is trained can have."""
    path = ("pretrain", "model")
    config = _plain(root, (*path, "config"))
    family = family_of_config(config) if isinstance(config, dict) else None
    if "ngram" not in (_plain(root, (*path, "architecture")), family):
        return
    for setting in NOT_COUNTED:
        place = ("pretrain", *setting.split("."))
        if _plain(root, place) not in (None, 0):
            message = f"`{place[-1]}`: an n-gram model is counted, not trained, and has no such setting"
            yield Problem(key_spot(root, place), message, "leave it out, or choose another architecture")


def _vectors_of_a_new_model(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    path = ("pretrain", "model")
    if _plain(root, (*path, "embeddings")) is not None and _plain(root, (*path, "name")) is not None:
        message = "`embeddings` begins a new model, and `name` is one that has its embeddings"
        yield Problem(key_spot(root, (*path, "embeddings")), message, "keep one of them")


def _sources(root: Node, path: Path) -> list[Path]:
    """The paths of the sources under a `data` key."""
    node = find(root, path)
    if node is None or not isinstance(node.value, Keys | list):
        return []
    count = len(node.value) if isinstance(node.value, list) else 1
    return [(*path, i) for i in range(count) if isinstance(_plain(root, (*path, i)), dict)]


def _source_from_one_place(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    for path in _DATA_KEYS:
        for source in _sources(root, path):
            given = [n for n in ("files", "dataset") if _plain(root, (*source, n)) not in (None, [])]
            if len(given) == 2:
                spot = key_spot(root, (*source, "dataset"))
                yield Problem(spot, "`files` and `dataset` both say where the text is", "keep one of them")
            elif not given and not _excused(source, ("files", "dataset"), meant):
                hint = "add `files: data/*.txt` or `dataset: owner/name`"
                yield Problem(key_spot(root, source), "this source has neither `files` nor `dataset`", hint)


def _excused(path: Path, names: tuple[str, ...], meant: tuple[str, ...]) -> bool:
    section = ".".join(part for part in path if isinstance(part, str))
    return any(f"{section}.{name}" in meant for name in names)


def _weights_all_or_none(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    for path in _DATA_KEYS:
        sources = _sources(root, path)
        bare = [source for source in sources if _plain(root, (*source, "weight")) is None]
        if 0 < len(bare) < len(sources) and not _excused(path, ("weight",), meant):
            for source in bare:
                hint = "give every source a weight, or none of them"
                yield Problem(key_spot(root, source), "this source has no `weight` but others have", hint)


def _caps_of_weights(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """How often a source is read at most says nothing where no share of the rows is asked for."""
    for path in _DATA_KEYS:
        for source in _sources(root, path):
            if _plain(root, (*source, "max_epochs")) is None or _plain(root, (*source, "weight")) is not None:
                continue
            if not _excused(source, ("weight",), meant):
                spot = key_spot(root, (*source, "max_epochs"))
                hint = "give every source a `weight`, or leave `max_epochs` out"
                yield Problem(spot, "`max_epochs` goes with `weight`", hint)


def _distinct_names(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    for path in _DATA_KEYS:
        seen: set[str] = set()
        for source in _sources(root, path):
            name = _plain(root, (*source, "name"))
            if isinstance(name, str) and name in seen:
                node = find(root, (*source, "name"))
                assert node is not None
                yield Problem(node.spot, f"`{name}` is already the name of a source", "names tell them apart")
            elif isinstance(name, str):
                seen.add(name)


def _some_data(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """Text must come from somewhere: a section takes the other's when it names none."""
    keys = ("tokenize.data", "pretrain.data")
    # A misspelt section may well hold the text: its name is the problem then.
    excused = any(m.startswith(keys) or m in ("tokenize", "pretrain") for m in meant)
    if excused or any(written(root, key) for key in keys):
        return
    for section in ("pretrain", "tokenize"):
        if isinstance(_plain(root, (section,)), dict):
            hint = "add `data: {files: data/*.txt}`"
            yield Problem(key_spot(root, (section,)), f"`{section}` needs text: `data` names none", hint)
            return


def _some_tokenizer(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    keys = ("tokenize", "pretrain.tokenizer", "pretrain.model.name")
    if isinstance(_plain(root, ("pretrain",)), dict) and not any(written(root, key) for key in keys):
        if any(key in meant for key in keys):
            return
        hint = f"add a `tokenize: {{}}` section, or {listing(['pretrain.tokenizer', 'pretrain.model.name'])}"
        yield Problem(key_spot(root, ("pretrain",)), "`pretrain` has no tokenizer", hint)


def _room_for_bytes(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """A vocabulary that can spell any text holds the 256 bytes and the special tokens at least."""
    tokenize = find(root, ("tokenize",))
    node = find(root, ("tokenize", "vocab_size"))
    if tokenize is None or node is None or written(root, "tokenize.tokenizer"):
        return
    algorithm = _plain(root, ("tokenize", "algorithm")) or "bpe"
    if _plain(root, ("tokenize", "byte_fallback")) is False and algorithm != "bpe":
        return
    special = _plain(root, ("tokenize", "special_tokens"))
    objective = _plain(root, ("pretrain", "objective"))
    alphabet, built_in = (BYTES_TWICE, BERT_TOKENS) if algorithm in BERT_LIKE else (BYTES, BUILT_IN_TOKENS)
    known = isinstance(objective, str) and objective in OBJECTIVES
    needed = tokens_for(objective, algorithm, ()) if known else []
    extra = {*(special if _is_texts(special) else ()), *needed} - set(built_in)
    least = alphabet + len(built_in) + len(extra)
    size = parse_whole(node.value)
    if isinstance(size, int) and not isinstance(size, bool) and 2 <= size < least:
        bytes_ = f"{BYTES} bytes" if alphabet == BYTES else f"{alphabet} forms of the {BYTES} bytes"
        message = f"`vocab_size`: `{size}` cannot hold the {bytes_} and {least - alphabet} special tokens"
        yield Problem(node.spot, message, f"at least {least}; common sizes are 8k, 16k, 32k")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _measured_best(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """The best checkpoint is known only where something is measured while training."""
    node = find(root, ("pretrain", "checkpoint", "keep_best"))
    if node is None or node.value is None:
        return
    if _plain(root, ("pretrain", "eval", "every")) == "never":
        hint = "set `pretrain.eval.every`, such as `10%`, or leave `keep_best` out"
        yield Problem(node.spot, "`keep_best` needs evaluations, and `eval.every` is `never`", hint)


def _one_model_to_teach(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """A detector is trained with a generator beside it; a teacher knows nothing of that pair."""
    path = ("pretrain", "distil")
    objective = _plain(root, ("pretrain", "objective"))
    is_pair = (
        isinstance(objective, str) and objective in OBJECTIVES and OBJECTIVES[objective].model == "detector"
    )
    if is_pair and _plain(root, path) is not None:
        hint = "leave `distil` out, or choose another objective, such as `mlm`"
        yield Problem(
            key_spot(root, path), f"`{objective}` trains two models, and neither can have a teacher", hint
        )


def _documents_apart(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """Only where a model reads from left to right do positions that restart keep documents apart."""
    path = ("pretrain", "isolate_documents")
    objective = _plain(root, ("pretrain", "objective")) or "clm"
    if _plain(root, path) is not True or objective not in list(OBJECTIVES) or OBJECTIVES[objective].isolates:
        return
    able = [name for name, goal in OBJECTIVES.items() if goal.isolates]
    node = find(root, path)
    assert node is not None
    message = f"`isolate_documents`: documents that share a row of `{objective}` see each other"
    yield Problem(node.spot, message, f"leave it out; it goes with {listing(able)}")


def _settings_of_the_optimizer(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """A setting that the optimizer, or the schedule, does not have would do nothing."""
    for section in _TRAINING:
        path = (section, "train", "optim")
        block = _plain(root, path)
        if isinstance(block, dict):
            yield from _settings_of(root, path, block)


def _settings_of(root: Node, path: Path, block: dict[str, Any]) -> Iterator[Problem]:
    full = with_defaults(block)
    for setting, having in PARTIAL_SETTINGS.items():
        kind, known = ("schedule", SCHEDULES) if having[0] in SCHEDULES else ("name", OPTIMIZERS)
        chosen = full.get(kind, DEFAULT_OPTIMIZER if kind == "name" else DEFAULT_SCHEDULE)
        if (
            chosen not in list(known)
            or chosen in having
            or not written(root, ".".join(map(str, (*path, setting))))
        ):
            continue
        own = settings_of(chosen)
        hint = f"it belongs to {listing(having)}"
        hint += f"; the settings of `{chosen}` are {listing(own)}" if own else ""
        message = f"`{setting}`: `{chosen}` has no such setting"
        yield Problem(key_spot(root, (*path, setting)), message, hint)


def _one_average(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    for section in _TRAINING:
        train = (section, "train")
        averages = _plain(root, (*train, "optim", "name")) == "schedule_free"
        if averages and written(root, f"{section}.train.ema"):
            message = "`ema`: `schedule_free` is judged by an average of its own"
            hint = "leave `ema` out, or choose another optimizer"
            yield Problem(key_spot(root, (*train, "ema")), message, hint)


def _settings_of_the_objective(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """The block of another objective would do nothing."""
    objective = _objective(root)
    if objective not in OBJECTIVES:
        return
    for name in sorted(other_sections(objective)):
        if written(root, f"pretrain.{name}"):
            having = [other for other, goal in OBJECTIVES.items() if name in goal.sections]
            own = OBJECTIVES[objective].sections
            hint = f"it goes with objective {listing(having)}"
            hint += f"; the settings of `{objective}` are under {listing(own)}" if own else ""
            spot = key_spot(root, ("pretrain", name))
            yield Problem(spot, f"`{name}`: objective `{objective}` has no such settings", hint)


def _measures_of_the_objective(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """A metric that the objective does not measure can be neither reported nor the best."""
    objective = _objective(root)
    if objective not in OBJECTIVES or not isinstance(_plain(root, ("pretrain",)), dict):
        return
    known = OBJECTIVES[objective].metrics
    paths: list[Path] = [("pretrain", "checkpoint", "keep_best")]
    asked = _plain(root, ("eval", "metrics"))
    if isinstance(asked, list) and _plain(root, ("eval", "model")) is None:
        paths += [("eval", "metrics", number) for number in range(len(asked))]
    for path in paths:
        node = find(root, path)
        if node is None or not isinstance(node.value, str):
            continue
        name = node.value.removeprefix("eval/")
        if name in _MEASURED and name not in known:
            message = f"`{name}` is not measured of `{objective}`"
            yield Problem(node.spot, message, f"it is measured by {listing(known)}")


def _objective(root: Node) -> str:
    return str(_plain(root, ("pretrain", "objective")) or "clm")


_MEASURED = {name.removeprefix("eval/") for name in MEASURED}

_RULES: tuple[Callable[[Node, tuple[str, ...]], Iterator[Problem]], ...] = (
    _one_model,
    _fits,
    _counted,
    _vectors_of_a_new_model,
    _source_from_one_place,
    _weights_all_or_none,
    _caps_of_weights,
    _distinct_names,
    _some_data,
    _some_tokenizer,
    _room_for_bytes,
    _measured_best,
    _documents_apart,
    _one_model_to_teach,
    _settings_of_the_optimizer,
    _one_average,
    _settings_of_the_objective,
    _measures_of_the_objective,
    check_finetune,
    check_evaluation,
    check_compression,
)
