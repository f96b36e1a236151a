"""Runs of one recipe that differ in a few settings: what each of them is, and what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import RecipeError, UsageError
from llmkit.recipe import Loaded, load_recipe, resolved_yaml, show_yaml
from llmkit.report.console import make_reporter
from llmkit.run import run_all
from llmkit.run.folders import Options, Result, report_of, run_folder
from llmkit.run.planning import model_shape
from llmkit.run.variants import run_variants

TEXT = """\
llmkit: 1
name: base
tokenize: {vocab_size: 8k}
pretrain:
  data: {files: a.txt}
  model: {preset: gpt-mini, context: 64}
  train: {length: 10 steps, optim: {lr: 1e-3}}
variants:
  small: {pretrain: {model: {preset: gpt-tiny}}}
  seeded:
    seed: 3
    pretrain: {train: {optim: {lr: 2e-3}}}
  plain:
"""


def load(tmp_path: Path, *words: str, text: str = TEXT, **options: Any) -> Loaded:
    (tmp_path / "r.yaml").write_text(text)
    return load_recipe(tmp_path / "r.yaml", overrides=words, **options)


def problems_of(tmp_path: Path, *words: str, text: str = TEXT) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, *words, text=text)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def told(loaded: Loaded) -> tuple[Any, ...]:
    recipe = loaded.recipe
    assert recipe.pretrain is not None
    return recipe.name, recipe.seed, recipe.pretrain.model.preset, recipe.pretrain.train.optim.lr


def test_each_is_the_recipe_with_its_settings_over_it(tmp_path):
    loaded = load(tmp_path)
    assert told(loaded) == ("base", 42, "gpt-mini", 1e-3)
    assert {name: told(one) for name, one in loaded.variants.items()} == {
        "small": ("base/small", 42, "gpt-tiny", 1e-3),
        "seeded": ("base/seeded", 3, "gpt-mini", 2e-3),
        "plain": ("base/plain", 42, "gpt-mini", 1e-3),
    }
    assert str(loaded.variants["seeded"].origins["pretrain.train.optim.lr"]).endswith("r.yaml:12")
    assert str(loaded.variants["seeded"].origins["pretrain.train.length"]).endswith("r.yaml:7")
    assert not any(one.variants for one in loaded.variants.values())


def test_words_rule_over_all_of_them_and_smoke_shrinks_each(tmp_path):
    loaded = load(tmp_path, "pretrain.train.optim.lr=5", "variants.small.seed=9", smoke=True)
    assert {name: told(one) for name, one in loaded.variants.items()} == {
        "small": ("base-smoke/small", 9, "gpt-tiny", 5),
        "seeded": ("base-smoke/seeded", 3, "gpt-tiny", 5),
        "plain": ("base-smoke/plain", 42, "gpt-tiny", 5),
    }


def test_a_word_chooses_one(tmp_path):
    chosen = load(tmp_path, "variant=seeded", "seed=4")
    assert told(chosen) == ("base/seeded", 4, "gpt-mini", 2e-3)
    assert chosen.variants == {}
    assert run_folder(chosen, Options(Path("runs")), "pretrain") == Path("runs/base/seeded/pretrain")


def test_written_out_it_is_the_same_again(tmp_path):
    loaded = load(tmp_path)
    (tmp_path / "again.yaml").write_text(show_yaml(loaded))
    again = load_recipe(tmp_path / "again.yaml")
    assert {k: v.recipe for k, v in again.variants.items()} == {
        k: v.recipe for k, v in loaded.variants.items()
    }
    one = loaded.variants["seeded"]
    (tmp_path / "one.yaml").write_text(resolved_yaml(one))
    assert load_recipe(tmp_path / "one.yaml").recipe == one.recipe


def test_one_that_extends_has_its_variants(tmp_path):
    (tmp_path / "below.yaml").write_text(TEXT)
    text = "llmkit: 1\nname: top\nextends: below.yaml\nvariants: {small: {seed: 5}, more: {seed: 6}}\n"
    loaded = load(tmp_path, text=text)
    assert {name: told(one)[:3] for name, one in loaded.variants.items()} == {
        "small": ("top/small", 5, "gpt-tiny"),
        "seeded": ("top/seeded", 3, "gpt-mini"),
        "plain": ("top/plain", 42, "gpt-mini"),
        "more": ("top/more", 6, "gpt-mini"),
    }


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("variant=smal", "command line:9: `smal` is no variant of this recipe"),
        ("variant=[small]", "command line:9: `variant` is the name of one of `variants`"),
        ("variants=3", "command line:10: `variants` is names, each with the settings that it changes"),
        ("variants.small=3", "command line:16: `small`: a variant is a mapping of settings"),
        ("variants.small.name=x", "command line:16: `name` is the same for all variants"),
        ("variants.eval={}", "command line:10: `eval` cannot be the name of a variant's folder"),
    ],
)
def test_what_cannot_be_is_named_with_its_place(tmp_path, word, expected):
    [problem] = problems_of(tmp_path, word)
    assert problem.startswith(expected)
    assert len(problem.splitlines()) == 4  # and what would work


def test_problems_of_all_variants_at_once_each_once(tmp_path):
    """What is wrong in the recipe itself is not told again for every variant."""
    text = TEXT.replace("lr: 1e-3", "lr: -1").replace("preset: gpt-tiny", "preset: gpt-tinny")
    text = text.replace("seed: 3", "sede: 3")
    problems = problems_of(tmp_path, text=text)
    assert [problem.split(": ")[0] for problem in problems] == ["r.yaml:7:41", "r.yaml:9:38", "r.yaml:11:5"]
    assert "gpt-tiny" in problems[1]


def test_a_command_that_does_one_says_how_to_choose(tmp_path):
    with pytest.raises(UsageError, match=r"3 variants.*small, seeded, plain") as caught:
        run_folder(load(tmp_path), Options(), "pretrain")
    assert "variant=small" in caught.value.hint


def test_the_shipped_baselines_are_of_one_size():
    """All networks within 3 %, on the same tokens; the n-gram model's size depends on the text."""
    variants = load_recipe("baselines").variants
    assert list(variants) == ["ngram", "rnn", "lstm", "gru", "cnn", "transformer"]
    sections = {name: one.recipe.pretrain for name, one in variants.items()}
    sizes = [
        model_shape(section.model, section.objective, 1000).num_parameters
        for name, section in sections.items()
        if name != "ngram"
    ]
    assert max(sizes) / min(sizes) < 1.03
    same = {
        (s.train.length, s.train.batch, s.model.context, s.held_out, str(s.data)) for s in sections.values()
    }
    assert len(same) == 1


@pytest.mark.slow
def test_the_shipped_baselines_run(tmp_path):
    """All six, shrunk; the counted one keeps its kind, the networks theirs."""
    words = ["machine.device=cpu", "machine.compile=false", "pretrain.train.length=4 steps"]
    loaded = load_recipe("baselines", overrides=words, smoke=True)
    result = run_all(loaded, Options(tmp_path / "runs", quiet=True), make_reporter(quiet=True))
    rows = result.summary["variants"]
    assert {row["variant"] for row in rows} == set(load_recipe("baselines").variants)
    assert all(row["status"] == "done" and row["bits_per_byte"] > 0 for row in rows)
    kinds = {
        row["variant"]: report_of(result.folder / row["variant"] / "pretrain")["model"]["model_type"]
        for row in rows
    }
    assert kinds == {
        "ngram": "llmkit-ngram",
        "rnn": "llmkit-recurrent",
        "lstm": "llmkit-recurrent",
        "gru": "llmkit-recurrent",
        "cnn": "llmkit-cnn",
        "transformer": "llama",
    }
    assert (result.folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("others", "command", "note"),
    [
        ("mlm", "llmkit fill {folder}/b", ""),
        ("clm", "llmkit fill {folder}/a", "not ranked: the losses of different objectives (mlm, clm)"),
    ],
)
def test_the_next_command_is_of_the_models_kind_and_objectives_are_not_ranked(
    tmp_path, capsys, others, command, note
):
    text = f"""\
llmkit: 1
name: base
tokenize: {{vocab_size: 8k}}
pretrain:
  data: {{files: a.txt}}
  train: {{length: 10 steps}}
variants:
  a: {{pretrain: {{objective: mlm}}}}
  b: {{pretrain: {{objective: {others}}}}}
"""
    loaded = load(tmp_path, text=text)

    def run_one(one, options, reporter):
        folder = tmp_path / "runs" / one.recipe.name
        name = one.recipe.name.split("/")[1]
        (folder / "pretrain").mkdir(parents=True)
        bits = {"a": 2.0, "b": 1.0}[name]
        final = {"eval/loss": bits, "eval/bits_per_byte": bits}
        made = {"status": "done", "final": final, "headline": {}, "plan": {}, "metrics": [], "references": {}}
        (folder / "pretrain" / "report.json").write_text(json.dumps(made))
        return Result(folder, {"pretrain": {}}, "")

    result = run_variants(loaded, Options(tmp_path / "runs"), make_reporter(), run_one)
    assert result.next_command.startswith(command.format(folder=tmp_path / "runs/base"))
    said = capsys.readouterr()
    assert (note if note else "not ranked") in said.out + said.err if note else "not ranked" not in said.err
