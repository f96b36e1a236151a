"""Whether an architecture can learn an objective: known before anything is read, with what would fit."""

import json
from typing import Any

import pytest
from transformers.models.auto import modeling_auto as auto

from llmkit.errors import ExitCode, RecipeError, UsageError
from llmkit.models.build import AUTO_CLASSES
from llmkit.plan import PRESETS, PlanError, check_fit, known_kinds
from llmkit.plan.families import FAMILIES
from llmkit.recipe import load_recipe
from llmkit.recipe.architectures import (
    DEFAULT_PRESETS,
    KINDS,
    OWN,
    family_of_config,
    family_of_preset,
    misfit,
    preset_of_family,
)
from llmkit.recipe.schema import Model
from llmkit.registry import OBJECTIVES, Goal
from llmkit.run.planning import model_shape

KIND_OF = {goal.model: name for name, goal in reversed(OBJECTIVES.items())}


def recipe(model: dict[str, Any] | None = None, objective: str = "clm") -> dict[str, Any]:
    section: dict[str, Any] = {
        "objective": objective,
        "data": {"files": "a.txt"},
        "train": {"length": "5 steps"},
    }
    return {
        "llmkit": 1,
        "tokenize": {},
        "pretrain": {**section, **({"model": model} if model is not None else {})},
    }


def test_the_table_says_what_transformers_can_build() -> None:
    tables = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "pairs": auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "detector": auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    }
    heads_of_tasks = {"sequence", "tokens", "answers", "encoder"}  # of pretrained models, not of these tables
    assert tables.keys() == AUTO_CLASSES.keys() - heads_of_tasks
    for family, kinds in KINDS.items():
        if family not in OWN:
            assert all(family in tables[kind] for kind in kinds), family
    heads = {name: auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES[name] for name in ("bert", "electra")}
    assert heads == {"bert": "BertForPreTraining", "electra": "ElectraForPreTraining"}


def test_families_presets_and_counts_belong_together() -> None:
    counted = {family_of_config({"model_type": name}) for name in FAMILIES} | {"rnn", "gru"}
    assert counted == KINDS.keys() - {"ngram"}
    for preset, fields in PRESETS.items():
        assert family_of_config(fields) == family_of_preset(preset)
        assert preset_of_family(family_of_preset(preset), preset.rsplit("-", 1)[1]) == preset
    for kind, preset in DEFAULT_PRESETS.items():
        assert kind in KINDS[family_of_preset(preset)]


@pytest.mark.parametrize("kind", sorted(KIND_OF))
def test_what_fits_is_taken_and_what_does_not_is_refused_with_what_would(kind: Any) -> None:
    objective = KIND_OF[kind]
    for family, kinds in KINDS.items():
        fields = OWN.get(family, {"model_type": family})
        assert known_kinds(fields) == kinds
        if kind in kinds:
            check_fit(objective, fields, kinds)
            continue
        with pytest.raises(
            PlanError, match=f"objective {objective.replace('+', '.')} needs .*, and {family} is "
        ) as caught:
            check_fit(objective, fields, kinds)
        assert (
            f"architectures that fit: {', '.join(name for name in KINDS if kind in KINDS[name] and name != 'ngram')}"
            in caught.value.hint
        )


def test_the_message_names_objectives_that_the_architecture_can_learn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(OBJECTIVES, "gaps", Goal("nowhere:build", "masked"))  # type: ignore[arg-type]
    found = misfit("gaps", "llama", KINDS["llama"])
    assert found is not None
    assert found[0] == "objective gaps needs a masked language model, and llama is a causal language model"
    assert found[1].startswith(
        "architectures that fit: bert, roberta, modernbert, electra; or with llama: objective clm"
    )
    assert misfit("gaps", "bert", KINDS["bert"]) is None


@pytest.mark.parametrize(
    ("model", "place"),
    [
        ({"preset": "bert-tiny"}, "pretrain.model.preset"),
        ({"architecture": "t5"}, "pretrain.model.architecture"),
        ({"config": {"model_type": "electra"}}, "pretrain.model.config"),
    ],
)
def test_a_recipe_that_shows_it_is_refused_at_its_line(model: dict[str, Any], place: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(model))
    [problem] = map(str, caught.value.problems)
    first, line, mark, hint = problem.splitlines()
    assert "objective clm needs a causal language model" in first
    assert line.split("| ")[1].strip().startswith(f"{place.rsplit('.', 1)[1]}:")
    assert mark.endswith("^")
    assert hint.strip().startswith("architectures that fit: llama")


def test_a_recipe_that_names_no_model_gets_one_that_fits() -> None:
    for objective, goal in OBJECTIVES.items():
        for model in (None, {"context": 64}):
            section = load_recipe(recipe(model, objective)).recipe.pretrain
            assert section is not None
            assert section.model.preset == DEFAULT_PRESETS[goal.model]


def test_smoke_keeps_the_family() -> None:
    for model, tiny in (
        ({"preset": "lstm-base"}, "lstm-tiny"),
        ({"architecture": "qwen3", "config": {"hidden_size": 2048}}, "qwen3-tiny"),
        ({"config": {"model_type": "gpt2"}}, "gpt2-tiny"),
        ({"architecture": "rwkv"}, "gpt-tiny"),
        ({"preset": "gpt-1b", "embeddings": "glove.txt"}, "gpt-tiny"),
    ):
        section = load_recipe(recipe(model), smoke=True).recipe.pretrain
        assert section is not None
        assert (section.model.preset, section.model.architecture, section.model.config) == (tiny, None, None)
        assert section.model.embeddings is None


def test_words_lay_fields_over_an_architecture_and_a_new_name_replaces_all() -> None:
    base = recipe({"architecture": "lstm", "config": {"hidden_size": 64}})
    word = "pretrain.model.config.num_hidden_layers=1"
    section = load_recipe(base, overrides=[word]).recipe.pretrain
    assert section is not None
    assert (section.model.architecture, section.model.config) == (
        "lstm",
        {"hidden_size": 64, "num_hidden_layers": 1},
    )
    section = load_recipe(base, overrides=["pretrain.model.architecture=gru"]).recipe.pretrain
    assert section is not None
    assert (section.model.architecture, section.model.config) == ("gru", None)
    section = load_recipe(base, overrides=["pretrain.model.preset=cnn-tiny"]).recipe.pretrain
    assert section is not None
    assert (section.model.preset, section.model.architecture, section.model.config) == (
        "cnn-tiny",
        None,
        None,
    )


# --- models that only transformers or their folder know ---


def test_an_architecture_of_transformers_is_asked_for_its_kind() -> None:
    with pytest.raises(
        PlanError, match="objective clm needs a causal language model, and distilbert is a masked"
    ) as caught:
        model_shape(Model(architecture="distilbert"), "clm", 500)
    assert caught.value.exit_code == ExitCode.USAGE
    with pytest.raises(UsageError, match="no-such-net is none of them"):
        model_shape(Model(architecture="no-such-net"), "clm", 500)


def test_a_model_in_a_folder_is_asked_too(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(PlanError, match="and bert is a masked language model"):
        model_shape(Model(name=str(tmp_path)), "clm", 500)


def test_numbers_that_do_not_go_together_are_the_recipes_fault() -> None:
    from llmkit.models.build import build_model

    for architecture, config in (("bert", {"hidden_size": 100, "num_attention_heads": 7}), ("mamba2", {"num_heads": 3}),
                                 ("llama", {"hidden_size": "wide"})):  # fmt: skip
        spec = Model(architecture=architecture, config=config)
        kind: Any = KINDS[architecture][0]
        with pytest.raises(UsageError, match=r"model\.config"):
            build_model(spec, kind, vocab_size=100, special_ids={}, seed=0)


# --- counted ---


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("model.dropout", 0.1),
        ("model.embeddings", "glove.txt"),
        ("distil", {"teacher": "runs/x"}),
        ("train.ema", 0.99),
        ("train.label_smoothing", 0.1),
        ("train.z_loss", 1e-4),
        ("train.l1", 0.1),
        ("train.gradient_noise", 0.1),
    ],
)
def test_what_a_counted_model_cannot_have_is_refused(place: str, value: Any) -> None:
    for model in ({"architecture": "ngram"}, {"config": {"model_type": "llmkit-ngram"}}):
        made = recipe(model)
        *blocks, name = place.split(".")
        block = made["pretrain"]
        for part in blocks:
            block = block.setdefault(part, {})
        block[name] = value
        with pytest.raises(RecipeError) as caught:
            load_recipe(made)
        [problem] = [one for one in caught.value.problems if "counted" in one]
        assert f"`{name}`: an n-gram model is counted, not trained" in problem
        block[name] = 0 if name in ("dropout", "l1") else None
        if name in ("dropout", "l1", "embeddings", "distil", "ema"):
            load_recipe(made)
