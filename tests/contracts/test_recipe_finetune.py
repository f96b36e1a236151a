"""The `finetune` section: the published JSON Schema and the loader agree on it, and the loader says why."""

import copy
from typing import Any

import pytest
from test_recipe_schema import GONE, KINDS, VALIDATOR, loads

from llmkit.errors import RecipeError
from llmkit.recipe import fields, load_recipe

GOOD: dict[str, Any] = {
    "llmkit": 1,
    "finetune": {"task": "cls", "model": {"name": "m"}, "data": {"files": "a.csv"}},
}

# Task, settings by dotted key, and what the loader's message holds; nothing: it is good.
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("cls", {}, ""),
    ("tag", {}, ""),
    ("clm", {}, ""),
    ("cls", {"data": GONE}, "needs `data`"),
    ("cls", {"data": {"files": "a", "dataset": "b"}}, "both say where the rows are"),
    ("cls", {"data": {}}, "neither `files` nor `dataset`"),
    ("cls", {"validation": {"dataset": "b", "split": "test"}}, ""),
    ("cls", {"validation": {"split": "test"}}, "neither `files` nor `dataset`"),
    ("cls", {"model": {}}, "no model to start from"),
    ("cls", {"model.preset": "bert-tiny"}, "begins a new model"),
    ("cls", {"model.embeddings": "a.vec"}, "begins a new model"),
    ("cls", {"model.dropout": 0.2}, ""),
    ("cls", {"tag": {"labels": ["O"]}}, "task `cls` has no such settings"),
    ("regression", {"cls": {}}, "task `regression` has no such settings"),
    ("clm", {"cls": {}}, "task `clm` has no such settings"),
    ("cls", {"cls.labels": ["a", "b"]}, ""),
    ("cls", {"data.columns": {"text": "review", "label": "stars"}}, ""),
    ("cls", {"data.columns": {"txt": "review"}}, "`txt` is no role"),
    ("tag", {"data.columns": {"text": "review"}}, "`text` is no role"),
    ("cls", {"data.form": "sharegpt"}, "not `sharegpt`"),
    ("sft", {"data.form": "sharegpt"}, ""),
    ("cls", {"data.format": "conll"}, "a tag for each word"),
    ("tag", {"data.format": "conll"}, ""),
    ("cls", {"data.separator": "|"}, ""),
    ("cls", {"data.separator": ""}, "is empty"),
    ("tag", {"data.separator": "|"}, "parts the labels of `cls`"),
    ("cls", {"validation": {"files": "b", "columns": {"txt": "b"}}}, "`txt` is no role"),
    ("clm", {"data.columns": {"text": "content"}}, ""),
    ("clm", {"data.columns": {"label": "content"}}, "no role of a text"),
    ("clm", {"data.limit": 5}, "is of rows with labels"),
    ("clm", {"adapter": {}}, "goes on with pre-training"),
    ("clm", {"validation": {"files": "b"}}, "goes on with pre-training"),
    ("cls", {"adapter": {}}, ""),
    ("cls", {"adapter": {"rank": 4}, "freeze": {"layers": 1}}, "nothing to freeze"),
    ("cls", {"adapter": {}, "unfreeze": {}}, "nothing to unfreeze"),
    ("cls", {"freeze": {"layers": 1}, "unfreeze": {}}, ""),
    ("cls", {"checkpoint.keep_best": "eval/macro_f1"}, ""),
    ("cls", {"checkpoint.keep_best": "eval/spearman"}, "is not measured of `cls`"),
    ("regression", {"checkpoint.keep_best": "eval/spearman"}, ""),
    ("cls", {"stop_early": {}}, ""),
    ("cls", {"prompts": ["Good?"]}, ""),
    ("tag", {"prompts": ["Ann lives here."]}, ""),
    ("qa", {"prompts": []}, ""),
    ("qa", {"prompts": ["Who?"]}, "a question is asked of a text"),
    ("embed", {"prompts": ["a text"]}, "task `embed` answers none"),
    ("cls", {"stop_early.metric": "eval/accuracy"}, ""),
    ("cls", {"stop_early.metric": "eval/exact_match"}, "is not measured of `cls`"),
    ("cls", {"stop_early": {}, "eval.every": "never"}, "needs evaluations"),
    ("cls", {"checkpoint.keep_best": "eval/loss", "eval.every": "never"}, "needs evaluations"),
    ("cls", {"eval.every": "never"}, ""),
    ("cls", {"train.batch": "4096 tokens"}, "a step is a whole number of them"),
    ("cls", {"train.batch": "16 samples"}, ""),
    ("clm", {"train.batch": "4096 tokens"}, ""),
    ("cls", {"train.optim": {"name": "sgd", "momentum": 0.5}}, ""),
    ("cls", {"train.optim.momentum": 0.5}, "`adamw` has no such setting"),
    ("cls", {"train.ema": 0.99, "train.optim.name": "schedule_free"}, "an average of its own"),
    ("cls", {"loss.weights": "balanced"}, ""),
    ("cls", {"loss.weights": {"spam": 5}}, ""),
    ("cls", {"loss.weights": {"spam": 0}}, "spam"),
    ("cls", {"loss.weights": "even"}, "weights"),
    ("tag", {"loss.weights": "balanced", "loss.focal": 2}, ""),
    ("sft", {"loss.focal": 2}, "is for classes"),
    ("regression", {"loss.r_drop": 1}, "is for classes"),
    ("regression", {"loss.r_drop": 0}, ""),
    ("cls", {"loss.mixup": 0.2}, ""),
    ("regression", {"loss.mixup": 1}, ""),
    ("regression", {"loss.mixup": -1}, "mixup"),
    ("tag", {"loss.mixup": 0.2}, "cannot be mixed"),
    ("tag", {"loss.mixup": 0}, ""),
    ("cls", {"loss": {"mixup": 0.2, "r_drop": 1}}, "keep one of them"),
    ("cls", {"loss.mixup": 0.2, "distil": {"teacher": "t"}}, "asks a teacher"),
    ("cls", {"loss": {"mixup": 0.2, "focal": 2}, "cls.balance": "classes"}, ""),
    ("cls", {"cls.multiple": True, "loss.weights": "balanced"}, "judged by itself"),
    ("cls", {"cls.multiple": True, "loss.focal": 1.5}, ""),
    ("cls", {"cls.multiple": True, "cls.balance": "classes"}, "of no one class"),
    ("cls", {"cls.balance": "root"}, ""),
    ("cls", {"loss": {"custom": "mine:Loss"}}, "code of your own"),
    ("cls", {"loss": {"custom": "mine:Loss", "trust_custom_code": True}}, ""),
    ("cls", {"loss": {"custom": "mine", "trust_custom_code": True}}, "custom"),
    ("cls", {"loss": {"trust_custom_code": True}}, "names no code"),
    ("regression", {"loss": {"custom": "mine:Loss", "trust_custom_code": True}}, "has none"),
    ("cls", {"loss": {"custom": "m:L", "trust_custom_code": True, "focal": 2}}, "replaces"),
    ("cls", {"loss": {"custom": "m:L", "trust_custom_code": True, "r_drop": 2}}, ""),
    ("cls", {"loss": {"custom": "m:L", "trust_custom_code": True}, "train.z_loss": 0.1}, "replaces"),
    ("cls", {"train.label_smoothing": 0.1}, ""),
    ("regression", {"train.label_smoothing": 0.1}, "is none"),
    ("dpo", {"train.z_loss": 0.1}, "is none"),
    ("cls", {"augment": {"method": "swap"}}, ""),
    ("cls", {"augment": [{"method": "synonyms", "thesaurus": "a.txt"}, {"method": "mask"}]}, ""),
    ("cls", {"augment": [{"method": "swap", "thesaurus": "a.txt"}]}, "no use for one"),
    ("cls", {"augment": [{}]}, "method"),
    ("cls", {"augment": {"method": "back_translate", "through": ["a", "b"], "rows": 0.3}}, ""),
    ("cls", {"augment": [{"method": "back_translate", "through": ["a", "b"]}, {"method": "swap"}]}, ""),
    ("cls", {"augment": [{"method": "swap"}, {"method": "back_translate", "through": ["a", "b"]}]}, "name it first"),
    ("cls", {"augment": {"method": "back_translate"}}, "needs `through`"),
    ("cls", {"augment": {"method": "back_translate", "through": ["a"]}}, "through"),
    ("cls", {"augment": {"method": "swap", "through": ["a", "b"]}}, "no use for one"),
    ("cls", {"augment": {"method": "back_translate", "through": ["a", "b"], "ratio": 0.5}}, "no use for one"),
    ("tag", {"augment": {"method": "back_translate", "through": ["a", "b"]}}, "no longer be true"),
    ("qa", {"augment": {"method": "back_translate", "through": ["a", "b"]}}, "no longer be true"),
    ("tag", {"augment": [{"method": "mask"}]}, ""),
    ("tag", {"augment": [{"method": "delete"}]}, "no longer be true"),
    ("sft", {"augment": [{"method": "delete"}]}, "no longer be true"),
    ("embed", {"augment": [{"method": "mask"}]}, "no longer be true"),
    ("clm", {"augment": [{"method": "mask"}]}, "goes on with pre-training"),
    ("nonsense", {}, "task"),
]  # fmt: skip


def recipe_of(task: str, changes: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(GOOD)
    made["finetune"]["task"] = task
    for key, value in changes.items():
        place = made["finetune"]
        *parents, last = key.split(".")
        for part in parents:
            place = place.setdefault(part, {})
        if value == GONE:
            del place[last]
        else:
            place[last] = value
    return made


@pytest.mark.parametrize(("task", "changes", "said"), CASES, ids=lambda value: str(value)[:60])
def test_loader_and_schema_agree(task: str, changes: dict[str, Any], said: str) -> None:
    recipe = recipe_of(task, changes)
    assert (loads(recipe), VALIDATOR.is_valid(recipe)) == (not said, not said)
    if said:
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe)
        assert said in str(caught.value) + "\n".join(map(str, caught.value.problems))


def test_a_model_that_pretrain_makes_needs_no_name() -> None:
    pretrain = {
        "model": {"preset": "bert-tiny"},
        "objective": "mlm",
        "data": {"files": "a"},
        "train": {"length": "1h"},
    }
    recipe = {**recipe_of("cls", {"model": GONE}), "tokenize": {}, "pretrain": pretrain}
    assert loads(recipe)
    assert VALIDATOR.is_valid(recipe)
    del recipe["pretrain"]
    assert not loads(recipe)
    assert not VALIDATOR.is_valid(recipe)


@pytest.mark.parametrize("key", [key for key in fields.settings() if key.startswith("finetune.")])
def test_both_agree_on_every_type_for_every_key(key: str) -> None:
    task = next(
        (name for name in ("tag", "qa", "seq2seq", "sft", "dpo", "embed") if f".{name}." in key), "cls"
    )
    differing = []
    for value in KINDS:
        recipe = recipe_of(task, {key.removeprefix("finetune."): value})
        if loads(recipe) != VALIDATOR.is_valid(recipe):
            differing.append((value, loads(recipe)))
    assert differing == []
