"""Defaults < extends < the recipe < smoke < words; every value knows its layer."""

from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import RecipeError
from llmkit.recipe import Loaded, load_recipe
from llmkit.recipe.units import Amount

BASE = """\
llmkit: 1
name: base
seed: 7
tokenize: {vocab_size: 8k}
pretrain:
  model: {preset: gpt-small, context: 1Ki}
  data: [{files: a.txt}, {files: b.txt}]
  train: {length: 3 epochs, optim: {lr: 1e-3}}
"""


def load(tmp_path: Path, text: str, *words: str, **options: Any) -> Loaded:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "r.yaml").write_text(text)
    return load_recipe(tmp_path / "r.yaml", overrides=words, **options)


def problems_of(tmp_path: Path, text: str, *words: str, **options: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *words, **options)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def train_of(loaded: Loaded) -> Any:
    assert loaded.recipe.pretrain is not None
    return loaded.recipe.pretrain.train


def test_mappings_merge_and_lists_are_replaced(tmp_path: Path) -> None:
    text = "llmkit: 1\nextends: base.yaml\npretrain:\n  data: {files: c.txt}\n  train: {batch: 8 samples}\n"
    loaded = load(tmp_path, text)
    recipe = loaded.recipe
    assert recipe.extends is None
    assert (recipe.name, recipe.seed) == ("base", 7)
    assert recipe.pretrain is not None
    assert [source.files for source in recipe.pretrain.data or []] == [["c.txt"]]
    assert train_of(loaded).length == Amount(3, "epochs")
    assert train_of(loaded).batch == Amount(8, "samples")
    origins = {key: str(origin).replace(f"{tmp_path}/", "") for key, origin in loaded.origins.items()}
    assert origins["seed"] == "extends base.yaml:3"
    assert origins["pretrain.train.optim.lr"] == "extends base.yaml:8"
    assert origins["pretrain.train.batch"] == "r.yaml:5"
    assert origins["pretrain.data.0.files"] == "r.yaml:4"
    assert origins["pretrain.train.optim.eps"] == "default"


def test_null_removes_a_section_of_the_extended_recipe(tmp_path: Path) -> None:
    assert (
        load(
            tmp_path, "llmkit: 1\nextends: base.yaml\npretrain: null\ntokenize: {data: {files: a}}"
        ).recipe.pretrain
        is None
    )


def test_naming_a_model_in_one_way_unnames_it_in_the_others(tmp_path: Path) -> None:
    recipe = load(tmp_path, "llmkit: 1\nextends: base.yaml\npretrain: {model: {name: gpt2}}\n").recipe
    assert recipe.pretrain is not None
    assert (recipe.pretrain.model.preset, recipe.pretrain.model.name) == (None, "gpt2")
    assert recipe.pretrain.model.context == 1024


def test_a_shipped_recipe_can_be_extended_by_name(tmp_path: Path) -> None:
    loaded = load(tmp_path, "llmkit: 1\nextends: zh-tiny\nname: mine\n")
    assert (loaded.recipe.name, loaded.recipe.language) == ("mine", "zh")
    assert str(loaded.origins["language"]).startswith("extends zh-tiny.yaml:")


def test_a_chain_of_three(tmp_path: Path) -> None:
    (tmp_path / "middle.yaml").write_text("llmkit: 1\nextends: base.yaml\nseed: 8\nlanguage: de\n")
    recipe = load(tmp_path, "llmkit: 1\nextends: middle.yaml\nlanguage: fr\n").recipe
    assert (recipe.name, recipe.seed, recipe.language) == ("base", 8, "fr")


def test_a_circle_is_named(tmp_path: Path) -> None:
    (tmp_path / "middle.yaml").write_text("llmkit: 1\nextends: r.yaml\n")
    texts = problems_of(tmp_path, "llmkit: 1\nextends: middle.yaml\n")
    assert texts[0].startswith(
        "middle.yaml:2:10: the recipes extend each other in a circle: r.yaml -> middle.yaml -> r.yaml"
    )


def test_a_problem_in_the_extended_recipe_is_shown_there(tmp_path: Path) -> None:
    (tmp_path / "middle.yaml").write_text("llmkit: 1\nextends: base.yaml\nsede: 8\n")
    (text,) = problems_of(tmp_path, "llmkit: 1\nextends: middle.yaml\n")
    assert text.startswith("middle.yaml:3:1: `sede` is not a key of a recipe\n     3 | sede: 8\n")


def test_a_missing_extended_recipe_points_at_its_name(tmp_path: Path) -> None:
    texts = problems_of(tmp_path, "llmkit: 1\nextends: zh-tinny\n")
    assert texts[0].startswith("r.yaml:2:10: there is no recipe `zh-tinny`")
    assert "did you mean `zh-tiny`?" in texts[0]


def test_words_win_and_are_read_as_yaml(tmp_path: Path) -> None:
    words = [
        "pretrain.train.optim.lr=3e-4",
        "pretrain.train.length=5k steps",
        "pretrain.prompts=[a, b]",
        "pretrain.data.1.weight=2",
        "pretrain.data.0.weight=1",
        "machine.device=cpu",
        "eval={rows: 8}",
        "pretrain.train.grad_clip=",
    ]
    loaded = load(tmp_path, BASE, *words)
    recipe = loaded.recipe
    assert recipe.pretrain is not None
    assert recipe.eval is not None
    assert train_of(loaded).optim.lr == 3e-4
    assert train_of(loaded).length == Amount(5000, "steps")
    assert train_of(loaded).grad_clip is None
    assert recipe.pretrain.prompts == ["a", "b"]
    assert [(source.files, source.weight) for source in recipe.pretrain.data or []] == [
        (["a.txt"], 1),
        (["b.txt"], 2),
    ]
    assert (recipe.machine.device, recipe.eval.rows) == ("cpu", 8)
    assert str(loaded.origins["machine.device"]) == "command line"
    assert str(loaded.origins["pretrain.data.1.weight"]) == "command line"
    assert str(loaded.origins["pretrain.data.1.files"]).endswith("r.yaml:7")


@pytest.mark.parametrize(
    ("word", "column", "width", "said"),
    [
        ("pretrain.train.optim.lrr=3", 22, 3, "did you mean `lr`?"),
        ("pretrain.train.length=3", 23, 1, "say what it counts"),
        ("pretrain.train.length=", 23, 1, "`null` is not a length"),
        ("sed=3", 1, 3, "did you mean `seed`?"),
        ("learning_rate=3", 1, 13, "in llmkit this is `pretrain.train.optim.lr`"),
        ("seed", 1, 4, "`seed` is no override `key=value`"),
        ("=3", 1, 2, "is no override"),
        ("a..b=3", 1, 4, "is no dotted key"),
        ("pretrain.data.2.weight=1", 15, 1, "a number from 0 to 1"),
        ("pretrain.data.weight=1", 15, 6, "a number from 0 to 1"),
        ("seed=[1", 6, 1, "a bracket is not closed"),
        ("extends=base.yaml", 1, 7, "`extends` cannot be set by a word"),
        ("pretrain.train.optim={lr: 1, lr: 2}", 30, 2, "here a second time"),
    ],
)
def test_a_wrong_word_has_a_caret_in_the_word(
    tmp_path: Path, word: str, column: int, width: int, said: str
) -> None:
    (text,) = problems_of(tmp_path, BASE, word)
    assert text.startswith(f"command line:{column}: ")
    assert said in text
    assert f"       | {word}\n       | {' ' * (column - 1)}{'^' * width}\n" in text + "\n"


def test_a_word_can_begin_a_list_that_is_not_there(tmp_path: Path) -> None:
    text = "llmkit: 1\ntokenize: {}\n"
    recipe = load(tmp_path, text, "tokenize.data.0.files=a.txt", "tokenize.data.0.weight=2").recipe
    assert recipe.tokenize is not None
    assert [(source.files, source.weight) for source in recipe.tokenize.data or []] == [(["a.txt"], 2)]


def test_a_word_into_a_section_leaves_the_sections_place(tmp_path: Path) -> None:
    (text,) = problems_of(tmp_path, "llmkit: 1\ntokenize: {}\n", "tokenize.vocab_size=300")
    assert text.startswith("r.yaml:2:1: `tokenize` needs text")


def test_a_word_into_an_aliased_mapping_changes_only_its_own_key(tmp_path: Path) -> None:
    text = "llmkit: 1\ntokenize: {data: &d {files: a, columns: {text: t}}}\neval: {data: *d}\n"
    recipe = load(tmp_path, text, "eval.data.columns.text=other").recipe
    assert recipe.tokenize is not None
    assert recipe.eval is not None
    columns = [section.data[0].columns.text for section in (recipe.tokenize, recipe.eval) if section.data]
    assert columns == ["t", "other"]


def test_environment_variables_take_the_place_of_text(tmp_path: Path) -> None:
    text = BASE.replace("seed: 7", "seed: ${env:SEED}").replace(
        "name: base", "name: '${env:WHO:-x}-${env:N:-1}'"
    )
    recipe = load(tmp_path, text, env={"SEED": "11", "N": "2"}).recipe
    assert (recipe.seed, recipe.name) == (11, "x-2")


def test_quotes_keep_a_variable_text(tmp_path: Path) -> None:
    (text,) = problems_of(tmp_path, BASE.replace("seed: 7", "seed: '${env:SEED}'"), env={"SEED": "11"})
    assert text.startswith("r.yaml:3:7: `seed`: `${env:SEED}` is not a whole number")


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("${env:SEEDS}", "the environment variable SEEDS is not set"),
        ("${env:1}", "is no complete expression"),
        ("${env:SEED", "is no complete expression"),
    ],
)
def test_an_expression_without_a_value_is_one_problem(tmp_path: Path, expression: str, said: str) -> None:
    (text,) = problems_of(tmp_path, BASE.replace("seed: 7", f"seed: {expression}"), env={"SEED": "1"})
    assert text.startswith("r.yaml:3:7: ")
    assert said in text


def test_a_secret_is_not_shown_in_a_message(tmp_path: Path) -> None:
    text = BASE.replace("length: 3 epochs", "length: '${env:HF_TOKEN}'")
    (problem,) = problems_of(tmp_path, text, env={"HF_TOKEN": "hf_abc"})
    assert "hf_abc" not in problem
    assert "what `${env:HF_TOKEN}` stands for does not fit" in problem


def test_other_dollars_are_text(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE + '  prompts: ["${HOME} costs $5"]\n').recipe
    assert recipe.pretrain is not None
    assert recipe.pretrain.prompts == ["${HOME} costs $5"]


def test_a_mapping_is_a_recipe_too() -> None:
    loaded = load_recipe({"llmkit": 1, "tokenize": {"vocab_size": 300, "data": [{"files": Path("a b.txt")}]}})
    assert loaded.recipe.tokenize is not None
    assert loaded.recipe.tokenize.vocab_size == 300
    assert (loaded.recipe.tokenize.data or [])[0].files == ["a b.txt"]
    assert loaded.path is None
    again = load_recipe(loaded.recipe.model_dump())
    assert again.recipe == loaded.recipe
    with pytest.raises(RecipeError, match="cannot stand in a recipe"):
        load_recipe({"llmkit": object()})


def test_smoke_makes_everything_small_and_words_still_win(tmp_path: Path) -> None:
    loaded = load(tmp_path, BASE, "pretrain.train.batch=2 samples", smoke=True)
    recipe, pretrain = loaded.recipe, loaded.recipe.pretrain
    assert pretrain is not None
    assert recipe.tokenize is not None
    assert recipe.name == "base-smoke"
    assert (recipe.tokenize.vocab_size, recipe.tokenize.sample) == (1000, 1_000_000)
    assert (pretrain.model.preset, pretrain.model.context) == ("gpt-tiny", 128)
    assert pretrain.train.length == Amount(20, "steps")
    assert pretrain.train.batch == Amount(2, "samples")
    assert [source.limit for source in pretrain.data or []] == [500_000, 500_000]
    assert str(loaded.origins["pretrain.train.length"]) == "smoke"
    assert str(loaded.origins["pretrain.train.batch"]) == "command line"
    assert pretrain.train.optim.lr == 1e-3


def test_smoke_makes_nothing_larger(tmp_path: Path) -> None:
    small = [
        "pretrain.train.length=3 steps",
        "tokenize.vocab_size=300",
        "pretrain.model.context=16",
        "eval={rows: 2}",
    ]
    text = BASE + "  sampling: {max_new_tokens: 4}\n"
    plain, smoke = load(tmp_path, text, *small).recipe, load(tmp_path, text, *small, smoke=True).recipe
    assert plain.pretrain is not None
    assert smoke.pretrain is not None
    assert smoke.pretrain.train.length == plain.pretrain.train.length
    assert smoke.pretrain.sampling == plain.pretrain.sampling
    assert (smoke.tokenize, smoke.eval) == (
        plain.tokenize.model_copy(update={"sample": 1_000_000}),
        plain.eval,
    )  # type: ignore[union-attr]


def test_smoke_replaces_a_written_out_configuration(tmp_path: Path) -> None:
    text = BASE.replace("preset: gpt-small", "config: {model_type: llama, hidden_size: 4096}")
    recipe = load(tmp_path, text, smoke=True).recipe
    assert recipe.pretrain is not None
    assert (recipe.pretrain.model.preset, recipe.pretrain.model.config) == ("gpt-tiny", None)
