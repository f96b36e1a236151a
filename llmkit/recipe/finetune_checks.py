"""Rules between the settings of the `finetune` section; `finetune_published.py` holds the same as JSON Schema."""

from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.recipe.faults import written
from llmkit.recipe.labelled import check_labelled
from llmkit.recipe.parts import Adapter, Freeze, Unfreeze, check_parts
from llmkit.recipe.positions import Node, Path, find, key_spot
from llmkit.recipe.problems import Problem
from llmkit.recipe.tasks import (
    AUGMENTED,
    CRITERION,
    MIXED,
    PREFERRED,
    TAUGHT,
    UNPROMPTED,
    WEIGHTED,
    Augment,
    other_task_sections,
)
from llmkit.recipe.units import listing
from llmkit.registry import OBJECTIVES, TASKS, goal_of

SECTION = "finetune"
ROWS_ONLY = (
    "validation", "chat_template", "adapter", "freeze", "unfreeze", "lr_decay", "too_long", "loss", "augment",
    "stop_early",
)  # fmt: skip
"""Settings that an objective on text, which goes on with pre-training, does not have."""
TEXT_DATA = ("name", "files", "dataset", "split", "encoding", "on_error", "columns")
"""What of `data` such an objective reads."""
MIXED_ALONE: Mapping[tuple[str, ...], str] = {
    ("loss", "r_drop"): "compares two passes of a text",
    ("distil",): "asks a teacher of a text",
}
"""What does not go with `loss.mixup`, and what it does."""
AUGMENT_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "thesaurus": ("synonyms", "insert"),
    "through": ("back_translate",),
    "ratio": ("synonyms", "swap", "delete", "insert", "typos", "similar", "mask"),
}
"""Settings of `augment`, and the ways that have a use for them."""
PLAIN_RATIO = Augment.model_fields["ratio"].default
PROBABILITIES = {"temperature": 1.0, "direction": "forward"}
"""Settings of `distil` that change how probabilities are compared, as they are where nothing is changed."""
UNCACHED = {
    "regression": "`regression` says one number, and a cache keeps probabilities",
    "qa": "`qa` says places of each text, and a cache keeps outputs that are the same everywhere",
}
"""Why what a teacher says of these tasks cannot be kept."""
ADAPTED = {
    "keep_zeros": "an adapter that is merged fills the zeros",
    "quantized": "an adapter learns beside weights that stay as they are",
}
"""Settings of `train` that do not go with an adapter, and why."""
NEW_MODEL = ("preset", "architecture", "config", "embeddings")
"""Settings of `model` that begin a new one."""


def check_finetune(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """What does not go together in the `finetune` section."""
    section = _plain(root, (SECTION,))
    if not isinstance(section, dict):
        return
    task = section.get("task")
    if task in list(TASKS):
        rules = (
            _data,
            _adapting,
            _losses,
            _taught,
            _kept,
            _smoothing,
            _augmented,
            _batch,
            _balance,
            _chats,
            _preferences,
            _prompts,
        )
        for rule in rules:
            yield from rule(root, str(task))
    if task in list(TASKS) or task in list(OBJECTIVES):
        yield from _other_blocks(root, str(task))
        yield from _measures(root, str(task))
    if task in list(OBJECTIVES):
        yield from _on_text(root, str(task))
    yield from _model(root, meant)
    yield from _one_source(root, meant)


def _plain(root: Node, path: Path) -> Any:
    node = find(root, path)
    return node.plain() if node is not None else None


def _at(root: Node, *keys: str) -> Any:
    return _plain(root, (SECTION, *keys))


def _problem(root: Node, keys: tuple[str, ...], message: str, hint: str) -> Problem:
    """A problem at the deepest of these keys that was written."""
    while len(keys) > 1 and find(root, (SECTION, *keys)) is None:
        keys = keys[:-1]
    return Problem(key_spot(root, (SECTION, *keys)), message, hint)


def _data(root: Node, task: str) -> Iterator[Problem]:
    """Each source is of rows that the task has."""
    for name in ("data", "validation"):
        source = _at(root, name)
        for keys, message, hint in check_labelled(task, source) if isinstance(source, Mapping) else ():
            yield _problem(root, (name, *keys), message, hint)


def _one_source(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    for name in ("data", "validation"):
        source = _at(root, name)
        if not isinstance(source, dict):
            continue
        given = [key for key in ("files", "dataset") if source.get(key) not in (None, [])]
        if len(given) == 2:
            message = "`files` and `dataset` both say where the rows are"
            yield _problem(root, (name, "dataset"), message, "keep one of them")
        elif not given and not any(f"{SECTION}.{name}.{key}" in meant for key in ("files", "dataset")):
            message = f"`{name}` has neither `files` nor `dataset`"
            yield _problem(root, (name,), message, "add `files: reviews.csv` or `dataset: owner/name`")


def _adapting(root: Node, task: str) -> Iterator[Problem]:
    """An adapter learns in place of the model."""
    blocks: dict[str, Any] = {"adapter": Adapter, "freeze": Freeze, "unfreeze": Unfreeze}
    given = {
        name: block.model_construct() if _at(root, name) is not None else None
        for name, block in blocks.items()
    }
    for key, message, hint in check_parts(given["adapter"], given["freeze"], given["unfreeze"]):
        yield _problem(root, (key,), message, hint)


def _losses(root: Node, task: str) -> Iterator[Problem]:
    loss = _at(root, "loss")
    if not isinstance(loss, dict):
        return
    yield from _mixing(root, task, loss)
    asked = [name for name in ("weights", "focal", "r_drop") if loss.get(name) not in (None, "none", 0)]
    for name in asked if task not in WEIGHTED else ():
        message = f"`loss.{name}` is for classes, and `{task}` has none"
        yield _problem(root, ("loss", name), message, f"leave it out; it goes with {listing(WEIGHTED)}")
    if "weights" in asked and _at(root, "cls", "multiple") is True:
        message = (
            "`loss.weights`: each label of a text is judged by itself, so no row has the weight of one class"
        )
        yield _problem(root, ("loss", "weights"), message, "leave it out; `focal` goes with `multiple`")
    if loss.get("custom") is not None:
        yield from _custom(root, task, asked)
    elif loss.get("trust_custom_code") is True:
        yield _problem(
            root, ("loss", "trust_custom_code"), "`loss.custom` names no code to trust", "leave it out"
        )


def _mixing(root: Node, task: str, loss: Mapping[str, Any]) -> Iterator[Problem]:
    """Two texts become one where one thing is said of each."""
    if not loss.get("mixup"):
        return
    if task not in MIXED:
        message = f"`loss.mixup` mixes two texts, and what `{task}` learns of them cannot be mixed"
        yield _problem(root, ("loss", "mixup"), message, f"leave it out; it goes with {listing(MIXED)}")
    for path, what in MIXED_ALONE.items():
        if _at(root, *path):
            message = f"`{'.'.join(path)}` {what}, and `loss.mixup` mixes two"
            yield _problem(root, path, message, "keep one of them")


def _custom(root: Node, task: str, asked: list[str]) -> Iterator[Problem]:
    if task not in CRITERION:
        message = f"`loss.custom` is given logits and targets, and `{task}` has none"
        yield _problem(root, ("loss", "custom"), message, f"it goes with {listing(CRITERION)}")
    if _at(root, "loss", "trust_custom_code") is not True:
        message = "`loss.custom` is code of your own that would run here"
        yield _problem(root, ("loss", "custom"), message, "if you trust it: `loss.trust_custom_code: true`")
    for name in [name for name in asked if name != "r_drop"]:
        message = f"`loss.{name}` changes a loss that `loss.custom` replaces"
        yield _problem(root, ("loss", name), message, "keep one of them")
    for name in ("label_smoothing", "z_loss"):
        if _at(root, "train", name):
            message = f"`train.{name}` changes a loss that `loss.custom` replaces"
            yield _problem(root, ("train", name), message, "keep one of them")


def _taught(root: Node, task: str) -> Iterator[Problem]:
    """A teacher's word must be one that can be compared."""
    distil = _at(root, "distil")
    if not isinstance(distil, dict):
        return
    if task not in TAUGHT:
        message = f"`distil`: what two models say of a row of `{task}` cannot be compared"
        yield _problem(root, ("distil",), message, f"leave it out; it goes with {listing(TAUGHT)}")
        return
    for name, plain in PROBABILITIES.items() if task == "regression" else ():
        if distil.get(name) not in (None, plain):
            message = f"`distil.{name}` is about probabilities, and `regression` says numbers"
            yield _problem(root, ("distil", name), message, "leave it out")
    yield from _kept_teacher(root, task, distil)
    for name in ("hidden", "attention"):
        if distil.get(name) and _at(root, "loss", "r_drop"):
            message = f"`distil.{name}` compares layers of one pass, and `loss.r_drop` makes two"
            yield _problem(root, ("distil", name), message, "keep one of them")


def _kept_teacher(root: Node, task: str, distil: Mapping[str, Any]) -> Iterator[Problem]:
    """What a teacher says is kept by row, a line for each target."""
    if distil.get("cache") is None:
        return
    if task in UNCACHED:
        message = f"`distil.cache`: {UNCACHED[task]}"
        hint = f"leave it out; it goes with {listing(CRITERION)}"
        yield _problem(root, ("distil", "cache"), message, hint)
    if _at(root, "loss", "r_drop"):
        message = "`distil.cache` has a line for each target, and `loss.r_drop` makes two passes"
        yield _problem(root, ("distil", "cache"), message, "keep one of them")


def _kept(root: Node, task: str) -> Iterator[Problem]:
    """What an adapter brings is merged into weights that were to stay zero, or as they are rounded."""
    for name, what in ADAPTED.items():
        if _at(root, "train", name) and _at(root, "adapter") is not None:
            message = f"`train.{name}`: {what}"
            yield _problem(root, ("train", name), message, "leave `adapter` out: all weights learn")


def _smoothing(root: Node, task: str) -> Iterator[Problem]:
    """What changes a cross-entropy does nothing where there is none."""
    if task not in ("regression", "dpo"):
        return
    own = "; `dpo.label_smoothing` is its own" if task == "dpo" else ""
    for name in ("label_smoothing", "z_loss"):
        if _at(root, "train", name):
            message = f"`train.{name}` changes a cross-entropy, and the loss of `{task}` is none"
            yield _problem(root, ("train", name), message, f"leave it out{own}")


def _augmented(root: Node, task: str) -> Iterator[Problem]:
    augment = _at(root, "augment")
    if augment in (None, []):
        return
    changed = ""
    for number, step in enumerate(augment if isinstance(augment, list) else [augment]):
        method = step.get("method") if isinstance(step, dict) else None
        having = AUGMENTED["mask" if method == "mask" else "text"]
        if task not in having:
            message = f"`augment`: what `{task}` learns would no longer be true of a changed text"
            hint = f"leave it out; it goes with {listing(having)}"
            yield Problem(key_spot(root, (SECTION, "augment", number)), message, hint)
        elif isinstance(step, dict):
            yield from _step(root, number, step, changed)
        changed = changed if method == "back_translate" else str(method)


def _step(root: Node, number: int, step: Mapping[str, Any], changed: str) -> Iterator[Problem]:
    """A way to change rows has its own settings only; `changed` is the way before it that changes texts."""
    method = step.get("method")
    for name, having in AUGMENT_SETTINGS.items():
        if step.get(name) not in (None, PLAIN_RATIO) and method not in having:
            spot = key_spot(root, (SECTION, "augment", number, name))
            message = f"`{name}`: `{method}` has no use for one"
            yield Problem(spot, message, f"leave it out; it goes with {listing(having)}")
    if method != "back_translate":
        return
    spot = key_spot(root, (SECTION, "augment", number))
    if step.get("through") is None:
        hint = "name two runs of `task: seq2seq`: `through: [RUN_THERE, RUN_BACK]`"
        yield Problem(spot, "`back_translate` needs `through`: who translates", hint)
    if changed:
        message = f"`back_translate` is made of the rows as they are, and `{changed}` changes them before"
        yield Problem(spot, message, "name it first")


def _batch(root: Node, task: str) -> Iterator[Problem]:
    """A step of rows is a whole number of them."""
    node = find(root, (SECTION, "train", "batch"))
    if node is not None and isinstance(node.value, str) and "token" in node.value:
        message = f"`batch`: `{node.value}`, but rows have many lengths, so a step is a whole number of them"
        yield Problem(node.spot, message, "write `32 samples`")


def _balance(root: Node, task: str) -> Iterator[Problem]:
    if _at(root, "cls", "multiple") is True and _at(root, "cls", "balance") in ("root", "classes"):
        message = "`balance`: a text that may have several labels is of no one class"
        yield _problem(root, ("cls", "balance"), message, "leave it out")


def _chats(root: Node, task: str) -> Iterator[Problem]:
    """A chat template is for conversations; without one it has no variables."""
    template = _at(root, "chat_template")
    if not TASKS[task].chats:
        if template is not None:
            chatting = listing([name for name, goal in TASKS.items() if goal.chats])
            message = f"`chat_template` is for conversations, and `{task}` has none"
            yield _problem(root, ("chat_template",), message, f"leave it out; it goes with {chatting}")
        return
    for name in TASKS[task].sections:
        if template == "none" and _at(root, name, "template_options"):
            message = "`template_options` are variables of a chat template, and there is none"
            yield _problem(root, (name, "template_options"), message, "leave it out")


def _preferences(root: Node, task: str) -> Iterator[Problem]:
    """A setting that the loss of `dpo` does not have would do nothing."""
    loss = _at(root, "dpo", "loss") or "dpo"
    for name, having in PREFERRED.items():
        if task == "dpo" and _at(root, "dpo", name) not in (None, 0) and loss not in having:
            message = f"`dpo.{name}`: loss `{loss}` has no such setting"
            yield _problem(root, ("dpo", name), message, f"leave it out; it goes with {listing(having)}")


def _prompts(root: Node, task: str) -> Iterator[Problem]:
    """A prompt is a text alone, and not every model says something of one."""
    if task in UNPROMPTED and _at(root, "prompts"):
        message = f"`prompts`: task `{task}` answers none: {UNPROMPTED[task]}"
        hint = "leave it out" + ("; `llmkit predict RUN QUESTION --other TEXT` asks" if task == "qa" else "")
        yield _problem(root, ("prompts",), message, hint)


def _other_blocks(root: Node, task: str) -> Iterator[Problem]:
    """The block of another task would do nothing."""
    for name in sorted(other_task_sections(task)):
        if written(root, f"{SECTION}.{name}"):
            own = goal_of(task).sections if task in TASKS else ()
            hint = f"it goes with `task: {name}`"
            hint += f"; the settings of `{task}` are under {listing(own)}" if own else ""
            yield _problem(root, (name,), f"`{name}`: task `{task}` has no such settings", hint)


def _measures(root: Node, task: str) -> Iterator[Problem]:
    """A model can only be the best by what is measured of it while it trains."""
    known = goal_of(task).metrics
    for keys in (("checkpoint", "keep_best"), ("stop_early", "metric")):
        name = _at(root, *keys)
        if isinstance(name, str) and name.startswith("eval/") and name.removeprefix("eval/") not in known:
            message = f"`{name}` is not measured of `{task}`"
            hint = f"it is measured by {listing([f'eval/{metric}' for metric in known])}"
            yield Problem(_value_spot(root, keys), message, hint)
    if _at(root, "eval", "every") != "never":
        return
    asking: tuple[tuple[str, ...], ...] = (("checkpoint", "keep_best"), ("stop_early",))
    for path in asking:
        if _at(root, *path) is not None:
            message = f"`{path[-1]}` needs evaluations, and `eval.every` is `never`"
            yield _problem(root, path, message, "set `finetune.eval.every`, such as `10%`")


def _value_spot(root: Node, keys: tuple[str, ...]) -> Any:
    node = find(root, (SECTION, *keys))
    assert node is not None
    return node.spot


def _on_text(root: Node, task: str) -> Iterator[Problem]:
    """An objective of `pretrain` goes on with it, and knows nothing of rows with labels."""
    for name in ROWS_ONLY:
        if written(root, f"{SECTION}.{name}"):
            message = f"`{name}`: `{task}` goes on with pre-training on text, and has no such setting"
            yield _problem(root, (name,), message, f"leave it out, or learn a task: {listing(tuple(TASKS))}")
    if goal_of(task).model == "detector" and _at(root, "distil") is not None:
        message = f"`{task}` trains two models, and neither can have a teacher"
        yield _problem(
            root, ("distil",), message, "leave `distil` out, or choose another task, such as `mlm`"
        )
    data = _at(root, "data")
    if not isinstance(data, dict):
        return
    for name in [name for name in data if name not in TEXT_DATA and written(root, f"{SECTION}.data.{name}")]:
        message = f"`{name}` is of rows with labels, and `{task}` reads text"
        yield _problem(root, ("data", name), message, "leave it out")
    for role in data["columns"] if isinstance(data.get("columns"), dict) else ():
        if role != "text":
            message = f"`{role}` is no role of a text: `{task}` reads one column"
            yield _problem(root, ("data", "columns", role), message, "write `columns: {text: NAME}`")


def _model(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """Tuning goes on from a model: what `pretrain` made, or one with a name."""
    for name in NEW_MODEL:
        if _at(root, "model", name) is not None:
            message = f"`model.{name}` begins a new model, and fine-tuning goes on from a trained one"
            hint = "name it: `model: {name: FOLDER}`; a new one is a `pretrain` section's"
            yield _problem(root, ("model", name), message, hint)
    excused = any(key in meant for key in ("pretrain", f"{SECTION}.model", f"{SECTION}.model.name"))
    if _plain(root, ("pretrain",)) is None and _at(root, "model", "name") is None and not excused:
        hint = (
            "add `model: {name: FOLDER}`, a run or a name on the Hub; or a `pretrain` section that makes one"
        )
        yield _problem(root, ("model",), "no model to start from", hint)
