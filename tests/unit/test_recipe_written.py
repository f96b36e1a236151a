"""What is made from a recipe: resolved.yaml, show, diff, explain, templates, shipped recipes."""

from pathlib import Path

import pytest

from llmkit.errors import UsageError
from llmkit.recipe import (
    Loaded,
    diff,
    explain,
    fields,
    load_recipe,
    packaged_names,
    render_template,
    resolved_yaml,
    show_yaml,
    template_kinds,
    values,
)
from llmkit.recipe.emit import to_yaml
from llmkit.recipe.positions import Text
from llmkit.recipe.reading import read_yaml
from llmkit.recipe.resolved import without_secrets

FULL = """\
llmkit: 1
name: full
tokenize: {sample: 5MB, special_tokens: ["<|user|>", "a: b", "# no", "null", "1e3", ""]}
pretrain:
  model:
    config: {model_type: llama, rope: {factor: 8.0, kinds: [a, 1, null]}, "odd key:": true}
    dropout: 0.1
  data:
    - {name: books, files: [a.txt, "书/*.txt"], weight: 0.7}
    - {dataset: "owner/name:config", columns: {text: meta.body}, documents: line, weight: 0.3}
  train: {length: 1h30m, batch: 8 samples, grad_clip: null, optim: {warmup: never, betas: [0.9, 0.999], eps: 1e-12}}
  checkpoint: {every: never}
  eval: {rows: null}
  prompts: ["two\\nlines", "tab\\t", "quote \\" and \\\\", "从前", "\\e[31m", "- x", "[x]", " x "]
eval: {}
"""


def load(tmp_path: Path, text: str, **env: str) -> Loaded:
    (tmp_path / "r.yaml").write_text(text)
    return load_recipe(tmp_path / "r.yaml", env=env)


def test_going_on_with_pre_training_loads_back_too(tmp_path: Path) -> None:
    """What only rows with labels have is not written: the loader would refuse it."""
    text = """\
llmkit: 1
tokenize: {data: {files: a.txt}}
pretrain: {train: {length: 5 steps}}
finetune: {task: clm, data: {files: b.txt, on_error: skip}, train: {length: 3 steps}}
"""
    loaded = load(tmp_path, text)
    assert load(tmp_path, resolved_yaml(loaded)).recipe == loaded.recipe
    assert load_recipe(without_secrets(loaded)).recipe == loaded.recipe


def test_resolved_yaml_loads_back_to_an_equal_recipe(tmp_path: Path) -> None:
    loaded = load(tmp_path, FULL)
    assert load(tmp_path, resolved_yaml(loaded)).recipe == loaded.recipe
    assert load(tmp_path, show_yaml(loaded)).recipe == loaded.recipe


@pytest.mark.parametrize("name", packaged_names())
def test_shipped_recipes_load_and_resolve(tmp_path: Path, name: str) -> None:
    loaded = load_recipe(name)
    assert load(tmp_path, resolved_yaml(loaded)).recipe == loaded.recipe
    assert load_recipe(name, smoke=True).recipe.name.endswith("-smoke")
    assert not any(
        key.startswith("machine.") and origin.kind != "default" for key, origin in loaded.origins.items()
    )


def test_choices_replace_auto_and_say_why(tmp_path: Path) -> None:
    loaded = load(tmp_path, FULL)
    choices: dict[str, tuple[object, str]] = {
        "machine.precision": ("bf16", "this processor\nhas it"),
        "machine.micro_batch": (4, "fits into 3 GB"),
        "pretrain.data.0.format": ("text", "by the name's ending"),
        "tokenize.held_out": (0.01, "as pretrain.held_out"),
    }
    text = resolved_yaml(loaded, choices)
    assert "  precision: bf16  # this processor has it\n" in text
    assert "  micro_batch: 4  # fits into 3 GB\n" in text
    again = load(tmp_path, text).recipe
    assert (again.machine.precision, again.machine.micro_batch) == ("bf16", 4)
    assert again.tokenize is not None
    assert again.tokenize.held_out == 0.01
    assert again.pretrain == loaded.recipe.pretrain.model_copy(  # type: ignore[union-attr]
        update={
            "data": [
                loaded.recipe.pretrain.data[0].model_copy(update={"format": "text"}),
                loaded.recipe.pretrain.data[1],
            ]
        }  # type: ignore[union-attr,index]
    )


def test_a_choice_for_a_key_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such settings in the recipe: machine\.precison"):
        resolved_yaml(load(tmp_path, FULL), {"machine.precison": ("bf16", "")})


def test_secrets_stay_expressions_and_other_variables_become_values(tmp_path: Path) -> None:
    text = (
        "llmkit: 1\nname: ${env:WHO}\n"
        "tokenize: {data: {files: 'x/${env:MY_SECRET}/a'}, vocab_size: 300}\n"
        "eval:\n  model: ${env:HF_TOKEN}\n  data: [{files: [b, '${env:API_KEY:-c}']}]\n"
    )
    env = {"WHO": "me", "HF_TOKEN": "hf_1", "API_KEY": "k_2", "MY_SECRET": "s_3"}
    loaded = load(tmp_path, text, **env)
    assert loaded.recipe.eval is not None
    assert loaded.recipe.eval.model == "hf_1"
    for written in (resolved_yaml(loaded), show_yaml(loaded), str(values(loaded)), loaded.text):
        assert not any(secret in written for secret in ("hf_1", "k_2", "s_3"))
    assert "name: me\n" in resolved_yaml(loaded)
    assert load(tmp_path, resolved_yaml(loaded), **env).recipe == loaded.recipe


def test_show_says_where_each_value_came_from(tmp_path: Path) -> None:
    lines = show_yaml(load(tmp_path, FULL)).replace(f"{tmp_path}/", "").splitlines()
    assert "name: full  # r.yaml:2" in lines
    assert "    batch: 8 samples  # r.yaml:11" in lines
    assert "seed: 42  # default" in lines


def test_the_difference_of_two_recipes_is_by_key(tmp_path: Path) -> None:
    a = load(tmp_path, FULL)
    b = load_recipe(
        tmp_path / "r.yaml", overrides=["seed=1", "pretrain.train.batch=16 samples", "eval.rows=8"], env={}
    )
    assert [(d.key, d.a, d.b) for d in diff(a, b)] == [
        ("seed", 42, 1),
        ("pretrain.train.batch", "8 samples", "16 samples"),
        ("eval.rows", None, 8),
    ]
    assert diff(a, a) == []


def test_explain_tells_type_range_default_and_text() -> None:
    lr = explain("pretrain.train.optim.lr")
    assert (lr.kind, lr.default, lr.required) == ("a number above 0", "0.0006", False)
    assert lr.text.startswith("The peak learning rate; by default 6e-4")
    length = explain("pretrain.train.length")
    assert (length.kind, length.required) == ("`50M tokens` or `3 epochs` or `20k steps` or `1h30m`", True)
    assert explain("machine.precision").kind == "one of auto, fp32, bf16, fp8"
    assert explain("pretrain.data.0.files").key == "pretrain.data.files"
    assert explain("min_delta").key == "finetune.stop_early.min_delta"
    assert explain("pretrain.checkpoint.every").default == "10%"


def test_explain_lists_the_children_of_a_section() -> None:
    assert [name for name, _ in explain("pretrain.checkpoint").children] == [
        "every",
        "keep",
        "keep_best",
        "keep_every",
    ]
    assert [name for name, _ in explain("").children] == list(fields.keys_of(""))
    assert "    keep        How many of the newest" in str(explain("pretrain.checkpoint"))


@pytest.mark.parametrize("key", fields.settings())
def test_every_setting_has_a_text_and_can_be_explained(key: str) -> None:
    explanation = explain(key)
    assert len(explanation.text) > 5
    assert explanation.text.endswith(".")
    assert all(len(line) <= 110 for line in str(explanation).splitlines() if not line.startswith("    "))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("pretrain.train.optim.lrr", "did you mean `pretrain.train.optim.lr`?"),
        ("pretrain.traain", "did you mean `pretrain.train`?"),
        (
            "zzzz",
            "known keys: llmkit, name, extends, seed, language, tokenize, pretrain, finetune, eval, compress, machine, "
            "variants, variant",
        ),
        (
            "every",
            "say which: pretrain.checkpoint.every, pretrain.eval.every, finetune.unfreeze.every, "
            "finetune.checkpoint.every, finetune.eval.every, machine.communication.local_steps.every",
        ),
    ],
)
def test_a_near_miss_is_answered_with_the_key(key: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        explain(key)
    assert caught.value.hint == hint


@pytest.mark.parametrize("kind", template_kinds())
def test_every_template_loads_as_it_is(tmp_path: Path, kind: str) -> None:
    text = render_template(kind)
    loaded = load(tmp_path, text)
    assert text.startswith(f"# {template_kinds()[kind]}\n")
    assert load_recipe(tmp_path / "r.yaml", smoke=True).recipe.name == f"{loaded.recipe.name}-smoke"


def test_commented_settings_of_the_templates_are_right_too(tmp_path: Path) -> None:
    for kind in template_kinds():
        lines = [line for line in render_template(kind).splitlines() if line.strip()]
        body = lines[lines.index(next(line for line in lines if line.startswith("llmkit: 1"))) :]
        text = "\n".join(
            line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line for line in body
        )
        assert load(tmp_path, text).recipe.llmkit == 1


def test_an_unknown_template_is_answered_with_the_known() -> None:
    with pytest.raises(UsageError) as caught:
        render_template("tokeniser")
    assert (
        caught.value.hint == "did you mean `tokenizer`? templates: chat, cls, continue, eval, gpt, tokenizer"
    )


ODD = [
    "",
    " ",
    "a",
    "yes",
    "1e3",
    "a#b",
    "a #b",
    "a: b",
    "-",
    "?",
    "%x",
    "@x",
    "`x",
    "|",
    "\x7f",
    "\u2028",
    "\ud7ff",
]
ODD += ["'", '"', "{", "x\ny", "&a", "*a", "!a", "~", "0x1f", "a,b", "a]", "12:30", "=", "<<", "...", "---"]


@pytest.mark.parametrize("value", ODD)
def test_any_text_survives_being_written_and_read(value: str) -> None:
    tree = {value: value, "list": [value], "items": [{"k": value}], "flow": {"x": {value: [value]}}}
    root, problems = read_yaml(Text("r.yaml", to_yaml(tree)))
    assert problems == []
    assert root is not None
    assert root.plain() == tree


def test_a_character_that_this_python_cannot_print_is_written_so_that_yaml_reads_it_back(tmp_path):
    made = {"llmkit": 1, "tokenize": {"data": {"files": ["\U0002ebe1\U000e0001\u0085.txt"]}}}
    path = tmp_path / "again.yaml"
    path.write_text(resolved_yaml(load_recipe(made)), "utf-8")
    assert load_recipe(path).recipe == load_recipe(made).recipe
