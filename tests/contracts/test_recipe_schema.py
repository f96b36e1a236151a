"""The published JSON Schema and the loader accept and reject the same; loading is quick and light."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator

from llmkit.errors import RecipeError
from llmkit.plan import PRESETS
from llmkit.plan.published import PUBLISHED
from llmkit.recipe import fields, json_schema, load_recipe, render_template, schema_text, template_kinds
from llmkit.recipe.positions import Text
from llmkit.recipe.reading import read_yaml
from llmkit.recipe.schema import Preset

ROOT = Path(__file__).parents[2]
SCHEMA = json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))

# Each changes a good recipe; the two validators must agree, and say what the second element says.
Change = tuple[str, Any]
GOOD: dict[str, Any] = {
    "llmkit": 1,
    "name": "x",
    "tokenize": {"vocab_size": "8k", "data": [{"files": "a.txt"}]},
    "pretrain": {
        "model": {"preset": "gpt-tiny"},
        "data": [{"files": "a"}, {"files": "b"}],
        "train": {"length": "1h"},
    },
    "eval": {},
    "machine": {},
}
BERT = {"model": {"preset": "bert-tiny"}}
ELECTRA = {"model": {"preset": "electra-tiny"}}
GONE = "<removed>"


def learns(objective: str, **settings: Any) -> dict[str, Any]:
    """A good `pretrain` section for an objective, with a model that fits it."""
    preset = {"span": "t5-tiny", "denoise": "bart-tiny"}.get(objective, "gpt-tiny")
    return {**GOOD["pretrain"], "model": {"preset": preset}, "objective": objective, **settings}


def chats(task: str, **settings: Any) -> dict[str, Any]:
    """A good `finetune` section for a task on conversations."""
    return {"task": task, "model": {"name": "m"}, "data": {"files": "a"}, **settings}


CHATS: list[tuple[str, Any, bool]] = [
    ("finetune", chats("sft", sft={"learn": "last", "pack": False}), True),
    ("finetune", chats("sft", sft={"learn": "first"}), False),
    ("finetune", chats("sft", sft={"template_options": {"enable_thinking": False, "n": 1, "s": "x"}}), True),
    ("finetune", chats("sft", sft={"template_options": {"a b": 1}}), False),
    ("finetune", chats("sft", sft={"template_options": {"a": [1]}}), False),
    ("finetune", chats("sft", chat_template="chatml", sft={"template_options": {"a": 1}}), True),
    ("finetune", chats("sft", chat_template="none", sft={"template_options": {"a": 1}}), False),
    ("finetune", chats("sft", chat_template="none", sft={"template_options": {}}), True),
    ("finetune", chats("sft", dpo={"beta": 1}), False),
    ("finetune", chats("cls", chat_template="chatml"), False),
    ("finetune", chats("dpo", dpo={"loss": "dpo", "beta": 0.5, "label_smoothing": 0.1}), True),
    ("finetune", chats("dpo", dpo={"label_smoothing": 0.1}), True),
    ("finetune", chats("dpo", dpo={"label_smoothing": 0.5}), False),
    ("finetune", chats("dpo", dpo={"loss": "ipo", "label_smoothing": 0.1}), False),
    ("finetune", chats("dpo", dpo={"loss": "ipo", "label_smoothing": 0}), True),
    ("finetune", chats("dpo", dpo={"loss": "simpo", "margin": 2, "label_smoothing": 0.1}), True),
    ("finetune", chats("dpo", dpo={"margin": 2}), False),
    ("finetune", chats("dpo", dpo={"beta": 0}), False),
    ("finetune", chats("dpo", dpo={"loss": "kto", "beta": 0.2, "desirable_weight": 3}), True),
    ("finetune", chats("dpo", dpo={"loss": "kto", "undesirable_weight": 0}), False),
    ("finetune", chats("dpo", dpo={"loss": "kto", "label_smoothing": 0.1}), False),
    ("finetune", chats("dpo", dpo={"undesirable_weight": 2}), False),
    (
        "finetune",
        chats("qa", qa={"stride": 64, "longest": 50, "no_answer_threshold": -1.5, "rules": "cmrc"}),
        True,
    ),
    ("finetune", chats("qa", qa={"stride": 0}), False),
    ("finetune", chats("qa", qa={"candidates": 0}), False),
    ("finetune", chats("qa", qa={"rules": "squad3"}), False),
    ("finetune", chats("seq2seq", seq2seq={"prefix": "sort: ", "max_target": "1k", "num_beams": 4}), True),
    ("finetune", chats("seq2seq", seq2seq={"num_beams": 0}), False),
    ("finetune", chats("embed", embed={"pooling": "cls", "temperature": 0.1, "scored": "cosine"}), True),
    ("finetune", chats("embed", embed={"temperature": 0}), False),
    ("finetune", chats("embed", embed={"pooling": "max"}), False),
    ("finetune", chats("dpo", chat_template="none", dpo={"template_options": {"a": 1}}), False),
    ("finetune", chats("dpo", train={"label_smoothing": 0.1}), False),
]
MUTATIONS: list[tuple[str, Any, bool]] = [
    *CHATS,
    ("llmkit", 2, False),
    ("llmkit", 1.0, True),
    ("llmkit", True, False),
    ("llmkit", GONE, False),
    ("llmkit", "1", False),
    ("name", "a b", False),
    ("name", None, False),
    ("name", 3, False),
    ("name", "a.b-c_d", True),
    ("name", "x" * 65, False),
    ("seed", 0, True),
    ("seed", -1, False),
    ("seed", 2.0, True),
    ("seed", 2.5, False),
    ("seed", True, False),
    ("seed", "1", False),
    ("seed", 2**63, False),
    ("name", "a/b", True),
    ("name", "a/b/c", False),
    ("name", "/b", False),
    ("variants", {"small": {"pretrain": {"model": {"preset": "gpt-tiny"}}}, "as it is": None}, False),
    ("variants", {"small": {"pretrain": {"model": {"preset": "gpt-tiny"}}}, "as_it_is": None}, True),
    ("variants", {"other": {"seed": 3, "pretrain": {"train": {"optim": {"lr": 1e-3}}}}}, True),
    ("variants", {"other": {"pretrain": {"train": {"optim": {"lrr": 1e-3}}}}}, False),
    ("variants", {"other": {"seed": -1}}, False),
    ("variants", {"other": {"name": "x"}}, False),
    ("variants", {"other": {"variants": {}}}, False),
    ("variants", {"eval": {}}, False),
    ("variants", {"other": 3}, False),
    ("variants", ["small"], False),
    ("variants", None, True),
    ("variant", None, True),
    ("variant", 3, False),
    ("variant", ["x"], False),
    ("language", "zh", True),
    ("language", "English", False),
    ("language", "pt-BR", True),
    ("unknown", 1, False),
    ("finetune", {}, False),
    ("compress", {}, True),
    ("extends", None, True),
    ("machine", None, False),
    ("machine", [], False),
    ("machine.device", "xpu", False),
    ("machine.device", "npu", False),
    ("machine.device", "cpu", True),
    ("machine.processes", 2, True),
    ("machine.processes", 0, False),
    ("machine.processes", "auto", True),
    ("machine.processes", 2.0, True),
    ("machine.processes", "two", False),
    ("machine.compile", True, True),
    ("machine.compile", 1, False),
    ("machine.compile", "yes", False),
    ("machine.micro_batch", "8k", True),
    ("machine.micro_batch", 0, False),
    ("tokenize", None, False),
    ("tokenize", {}, True),
    ("tokenize.vocab_size", 257, False),
    ("tokenize.vocab_size", 258, True),
    ("tokenize.vocab_size", "8 k", False),
    ("tokenize.vocab_size", "8000", False),
    ("tokenize.vocab_size", 8000.0, True),
    ("tokenize.sample", "100MB", True),
    ("tokenize.sample", "100 MiB", True),
    ("tokenize.sample", 1000, True),
    ("tokenize.sample", "100", False),
    ("tokenize.sample", 0, False),
    ("tokenize.held_out", 1, False),
    ("tokenize.held_out", "2%", True),
    ("tokenize.held_out", 0.5, True),
    ("tokenize.held_out", "100%", False),
    ("tokenize.algorithm", "trigram", False),
    ("tokenize.special_tokens", ["a"], True),
    ("tokenize.special_tokens", "a", False),
    ("tokenize.special_tokens", [1], False),
    ("tokenize.data", {"files": ["a", "b"]}, True),
    ("tokenize.data", "a", False),
    ("pretrain.data", [], True),
    ("pretrain.data", [{}], False),
    ("pretrain.data", [{"files": None}], False),
    ("pretrain.data", [{"files": []}], False),
    ("pretrain.data", [{"files": "a", "dataset": "b"}], False),
    ("pretrain.data", [{"dataset": "b"}], True),
    ("pretrain.data", [{"files": 3}], False),
    ("pretrain.data", [{"files": "a", "weight": 1}, {"files": "b"}], False),
    ("pretrain.data", [{"files": "a", "weight": 1}, {"files": "b", "weight": 0.5}], True),
    ("pretrain.data", [{"files": "a", "weight": 0}], False),
    ("pretrain.data", [{"files": "a", "limit": "1MB"}], True),
    ("pretrain.data", {"files": "a", "columns": {"text": "t"}}, True),
    ("pretrain.data", {"files": "a", "columns": "t"}, False),
    ("pretrain.model", {}, True),
    ("pretrain.model.preset", "gpt-tinny", False),
    ("pretrain.model.name", "m", False),
    ("pretrain.model", {"name": "m", "preset": None}, True),
    ("pretrain.model", {"config": {}}, False),
    ("pretrain.model", {"config": {"model_type": "llama", "x": [1]}}, True),
    ("pretrain.model", {"config": "c"}, False),
    ("pretrain.model", {"config": {"model_type": 3}}, False),
    ("pretrain.model", {"architecture": "bert"}, False),
    ("pretrain.model", {"architecture": "lstm"}, True),
    ("pretrain.model", {"architecture": "ngram"}, True),
    ("pretrain.model", {"architecture": "ngram", "dropout": 0}, True),
    ("pretrain.model", {"architecture": "ngram", "dropout": 0.1}, False),
    ("pretrain.model", {"config": {"model_type": "llmkit-ngram"}, "dropout": 0.1}, False),
    ("pretrain.model", {"architecture": "ngram", "embeddings": "glove.txt"}, False),
    (
        "pretrain",
        {**GOOD["pretrain"], "model": {"architecture": "ngram"}, "distil": {"teacher": "runs/x"}},
        False,
    ),
    (
        "pretrain",
        {**GOOD["pretrain"], "model": {"architecture": "ngram"}, "train": {"length": "1h", "ema": 0.9}},
        False,
    ),
    (
        "pretrain",
        {**GOOD["pretrain"], "model": {"architecture": "lstm"}, "train": {"length": "1h", "ema": 0.9}},
        True,
    ),
    ("pretrain.model", {"architecture": "lstm", "config": {"hidden_size": 64}}, True),
    ("pretrain.model", {"architecture": "rwkv", "config": {}}, True),
    ("pretrain.model", {"architecture": "gpt 2"}, False),
    ("pretrain.model", {"architecture": "llama", "config": {"model_type": "llama"}}, False),
    ("pretrain.model", {"architecture": "llama", "preset": "gpt-mini"}, False),
    ("pretrain.model", {"architecture": "llama", "name": "m"}, False),
    ("pretrain.model", {"preset": "gpt-mini", "config": {"hidden_size": 64}}, False),
    ("pretrain.model", {"name": "m", "config": {"model_type": "llama"}}, False),
    ("pretrain.model", {"preset": "bert-tiny"}, False),
    ("pretrain.model", {"preset": "cnn-tiny"}, True),
    ("pretrain.model", {"config": {"model_type": "t5"}}, False),
    ("pretrain.model", {"config": {"model_type": "llmkit-recurrent", "cell": "gru"}}, True),
    ("pretrain.model", {"config": {"model_type": "no-such"}}, True),
    ("pretrain.model", {"preset": "gpt-tiny", "embeddings": "glove.txt"}, True),
    ("pretrain.model", {"name": "m", "embeddings": "glove.txt"}, False),
    ("pretrain.model", {"preset": "gpt-tiny", "embeddings": 3}, False),
    ("pretrain", {**GOOD["pretrain"], "objective": "mlm", "model": {"preset": "gpt-tiny"}}, False),
    ("pretrain", {**GOOD["pretrain"], "objective": "mlm", "model": {"preset": "roberta-tiny"}}, True),
    ("pretrain", {**GOOD["pretrain"], "objective": "mlm", "model": {}}, True),
    ("pretrain.model.context", "1Ki", True),
    ("pretrain.model.context", 1, False),
    ("pretrain.model.dropout", 1, False),
    ("pretrain.model.dropout", 0, True),
    ("pretrain.model.trust_remote_code", "false", False),
    ("pretrain.checkpoint", {"keep_best": "eval/loss"}, True),
    ("pretrain.checkpoint", {"keep_best": "loss"}, False),
    ("pretrain.checkpoint", {"keep_best": "eval/lsos"}, False),
    ("pretrain.checkpoint", {"keep_best": "eval/f1"}, False),
    ("pretrain.checkpoint", {"keep_every": "5k steps"}, True),
    ("pretrain.checkpoint", {"keep_every": 5000}, False),
    (
        "pretrain",
        {**GOOD["pretrain"], "checkpoint": {"keep_best": "eval/loss"}, "eval": {"every": "never"}},
        False,
    ),
    ("pretrain", {**GOOD["pretrain"], "checkpoint": {"keep_best": None}, "eval": {"every": "never"}}, True),
    ("pretrain.train.bad_numbers", "skip", True),
    ("pretrain.train.bad_numbers", "ignore", False),
    ("pretrain.train.max_skipped", 0, False),
    ("machine.loader_workers", 2, True),
    ("machine.loader_workers", -1, False),
    ("machine.background_save", False, True),
    ("machine.background_save", "no", False),
    ("pretrain.train", GONE, False),
    ("pretrain.train", None, False),
    ("pretrain.train.length", GONE, False),
    ("pretrain.train.length", 3, False),
    ("pretrain.train.length", "3", False),
    ("pretrain.train.length", "3 epochs", True),
    ("pretrain.train.length", "5%", False),
    ("pretrain.train.length", "0 steps", False),
    ("pretrain.train.length", "1.5k steps", True),
    ("pretrain.train.batch", "32 samples", True),
    ("pretrain.train.batch", "32 rows", False),
    ("pretrain.train.grad_clip", None, True),
    ("pretrain.train.grad_clip", 0, False),
    ("pretrain.train.optim", {"lr": 0}, False),
    ("pretrain.train.optim", {"lr": "fast"}, False),
    ("pretrain.train.optim", {"lr": True}, False),
    ("pretrain.train.optim", {"lr": 1}, True),
    ("pretrain.train.optim", {"betas": [0.9]}, False),
    ("pretrain.train.optim", {"betas": [0.9, 1]}, False),
    ("pretrain.train.optim", {"betas": [0, 0.5]}, True),
    ("pretrain.train.optim", {"betas": [0.1, 0.2, 0.3]}, False),
    ("pretrain.train.optim", {"schedule": "wsd", "decay": 1}, True),
    ("pretrain.train.optim", {"schedule": "wsd", "decay": "100%"}, True),
    ("pretrain.train.optim", {"schedule": "wsd", "decay": 1.1}, False),
    ("pretrain.train.optim", {"decay": 0.5}, False),
    ("pretrain.train.optim", {"decay": None}, True),
    ("pretrain.train.optim", {"schedule": "polynomial", "power": 3}, True),
    ("pretrain.train.optim", {"schedule": "polynomial", "power": 0}, False),
    ("pretrain.train.optim", {"schedule": "linear", "power": 3}, False),
    ("pretrain.train.optim", {"name": "sgd", "momentum": 0.8, "nesterov": True}, True),
    ("pretrain.train.optim", {"name": "sgd", "betas": [0.9, 0.99]}, False),
    ("pretrain.train.optim", {"name": "sgd", "betas": None}, True),
    ("pretrain.train.optim", {"momentum": 0.9}, False),
    ("pretrain.train.optim", {"momentum": None}, True),
    ("pretrain.train.optim", {"name": "adamw", "muon_lr": 0.02}, False),
    ("pretrain.train.optim", {"name": "muon", "muon_lr": 0.02, "betas": [0.9, 0.95], "eps": 1e-8}, True),
    ("pretrain.train.optim", {"name": "muon", "muon_scale": "original"}, True),
    ("pretrain.train.optim", {"name": "muon", "muon_scale": "other"}, False),
    ("pretrain.train.optim", {"name": "lion", "betas": [0.9, 0.99]}, True),
    ("pretrain.train.optim", {"name": "lion", "eps": 1e-8}, False),
    ("pretrain.train.optim", {"name": "adafactor", "betas": [0.9, 0.99]}, False),
    ("pretrain.train.optim", {"name": "lyon"}, False),
    ("pretrain.train.optim", {"name": None}, False),
    ("pretrain.train.optim", {"groups": {"match": "embed*", "lr_ratio": 0.5}}, True),
    ("pretrain.train.optim", {"groups": [{"match": "a|b", "weight_decay": 0}, {"match": "c"}]}, True),
    ("pretrain.train.optim", {"groups": [{"lr_ratio": 0.5}]}, False),
    ("pretrain.train.optim", {"groups": [{"match": " "}]}, False),
    ("pretrain.train.optim", {"groups": [{"match": "a", "lr_ratio": -1}]}, False),
    ("pretrain.train.optim", {"groups": [{"match": "a", "lr": 1}]}, False),
    ("pretrain.train", {"length": "1h", "ema": 0.99, "optim": {"name": "schedule_free"}}, False),
    ("pretrain.train", {"length": "1h", "ema": 0.99, "optim": {"name": "lion"}}, True),
    ("pretrain.train", {"length": "1h", "optim": {"name": "schedule_free"}}, True),
    ("pretrain.train.ema", 1, False),
    ("pretrain.train.ema", 0, False),
    ("pretrain.train.label_smoothing", 0.1, True),
    ("pretrain.train.label_smoothing", 1, False),
    ("pretrain.train.z_loss", 1e-4, True),
    ("pretrain.train.z_loss", -1, False),
    ("pretrain.train.l1", 0, True),
    ("pretrain.train.gradient_noise", "much", False),
    ("pretrain.train.optim", {"warmup": "never"}, True),
    ("pretrain.train.optim", {"warmup": 100}, False),
    ("pretrain.train.optim", {"warmup": "0%"}, True),
    ("pretrain.train.optim", {"schedule": "cosin"}, False),
    ("pretrain.checkpoint", {"every": "10m", "keep": 1}, True),
    ("pretrain.checkpoint", {"keep": 0}, False),
    ("pretrain.eval", {"rows": None}, True),
    ("pretrain.eval", {"rows": "1k"}, True),
    ("pretrain.eval", {"rows": 0}, False),
    ("pretrain.prompts", ["a", ""], True),
    ("pretrain.prompts", [None], False),
    ("pretrain.objective", "infill", True),
    ("pretrain.objective", "spam", False),
    ("pretrain", learns("fim", fim={"ratio": 1, "suffix_first_ratio": "5%"}), True),
    ("pretrain", learns("fim", fim={"ratio": 1.1}), False),
    ("pretrain", learns("span", span={"ratio": 0.2, "mean_length": 8}), True),
    ("pretrain", learns("span", span={"mean_length": 0.5}), False),
    ("pretrain", learns("span", span={"ratio": 1}), False),
    ("pretrain", learns("infill", infill={"ratio": "15%"}), True),
    ("pretrain", learns("infill", infill={"rate": 0.1}), False),
    ("pretrain", learns("denoise", denoise={"shuffle_sentences": False}), True),
    ("pretrain", learns("denoise", denoise={"mean_length": 0}), False),
    ("pretrain", learns("electra", model={"preset": "electra-tiny"}, distil={"teacher": "runs/t"}), False),
    ("pretrain", learns("electra", model={"preset": "electra-tiny"}, distil=None), True),
    ("pretrain", learns("mlm", model={"preset": "bert-tiny"}, distil={"teacher": "runs/t"}), True),
    ("pretrain", learns("mlm", model={"preset": "bert-tiny"}, distil={}), False),
    ("pretrain", learns("span", isolate_documents=True), False),
    ("pretrain", learns("fim", isolate_documents=True), True),
    ("pretrain", learns("span", isolate_documents=False), True),
    ("pretrain.isolate_documents", True, True),
    ("pretrain.tokenizer", "t", True),
    ("pretrain.sampling", {"top_p": 1, "top_k": None, "temperature": 0}, True),
    ("pretrain.sampling", {"top_p": 0}, False),
    ("eval.metrics", ["loss"], True),
    ("eval.metrics", ["accuracy"], False),
    ("eval", {"metrics": ["accuracy"], "model": "runs/x"}, True),
    (
        "pretrain",
        {**GOOD["pretrain"], **BERT, "objective": "mlm", "checkpoint": {"keep_best": "eval/accuracy"}},
        True,
    ),
    ("pretrain", {**GOOD["pretrain"], **BERT, "objective": "mlm", "checkpoint": {"keep_best": None}}, True),
    ("pretrain.checkpoint", {"keep_best": "eval/accuracy"}, False),
    (
        "pretrain",
        {**GOOD["pretrain"], **BERT, "objective": "mlm", "mlm": {"ratio": "20%", "whole_words": True}},
        True,
    ),
    ("pretrain", {**GOOD["pretrain"], **BERT, "objective": "mlm", "mlm": {"ratio": 1.2}}, False),
    ("pretrain", {**GOOD["pretrain"], **BERT, "objective": "mlm", "nsp": {}}, False),
    (
        "pretrain",
        {**GOOD["pretrain"], **BERT, "objective": "mlm+nsp", "nsp": {"other_ratio": 0}, "mlm": {}},
        True,
    ),
    ("pretrain", {**GOOD["pretrain"], "mlm": {}}, False),
    (
        "pretrain",
        {**GOOD["pretrain"], **ELECTRA, "objective": "electra", "electra": {"generator_ratio": 0.5}},
        True,
    ),
    ("pretrain", {**GOOD["pretrain"], **ELECTRA, "objective": "electra", "electra": {"weight": 0}}, False),
    ("eval.metrics", "loss", True),
    ("eval.model", "runs/x", True),
    ("eval.rows", 3, True),
]
# Whole recipes: where text and tokenizer come from.
WHOLE: list[tuple[dict[str, Any], bool]] = [
    ({"llmkit": 1}, True),
    ({"llmkit": 1, "variants": {"a": {}, "b": {"seed": 3}}, "variant": "b"}, True),
    ({"llmkit": 1, "variant": "b"}, False),
    ({"llmkit": 1, "tokenize": {}}, False),
    ({"llmkit": 1, "tokenize": {"data": {"files": "a"}}}, True),
    ({"llmkit": 1, "tokenize": {"data": {"files": "a"}, "tokenizer": "t", "vocab_size": 2}}, True),
    ({"llmkit": 1, "pretrain": {"data": {"files": "a"}, "train": {"length": "1h"}}}, False),
    ({"llmkit": 1, "pretrain": {"data": {"files": "a"}, "train": {"length": "1h"}, "tokenizer": "t"}}, True),
    ({"llmkit": 1, "pretrain": {"data": {"files": "a"}, "train": {"length": "1h"}, "model": {"name": "m"}}}, True),
    ({"llmkit": 1, "tokenize": {}, "pretrain": {"data": {"files": "a"}, "train": {"length": "1h"}}}, True),
    ({"llmkit": 1, "tokenize": {"data": []}, "pretrain": {"train": {"length": "1h"}}}, False),
    ({"llmkit": 1, "eval": {"data": {"files": "a"}}}, True),
    ({"llmkit": 1, "extends": "zh-tiny"}, True),
    ({"llmkit": 1, "extends": "zh-tiny", "pretrain": {"train": {"batch": "8 samples"}}}, True),
    ({"llmkit": 1, "extends": "zh-tiny", "pretrain": {"train": {"batch": 8}}}, False),
    ({"llmkit": 1, "extends": "zh-tiny", "pretrain": {"model": {"name": "m", "preset": "gpt-tiny"}}}, False),
    ({"llmkit": 1, "extends": "zh-tiny", "pretrain": {"lr": 1}}, False),
    ({"llmkit": 1, "extends": 3}, False),
    ({"extends": "zh-tiny"}, False),
]  # fmt: skip


def loads(source: Any) -> bool:
    try:
        load_recipe(source, env={"SEED": "1"})
    except RecipeError:
        return False
    return True


def mutated(key: str, value: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(GOOD)
    *parents, last = key.split(".")
    place = recipe
    for part in parents:
        place = place[part]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return recipe


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert VALIDATOR.is_valid(GOOD)
    assert loads(GOOD)


@pytest.mark.parametrize(("key", "value", "good"), MUTATIONS, ids=lambda value: str(value)[:40])
def test_both_validators_agree_on_a_changed_recipe(key: str, value: Any, good: bool) -> None:
    recipe = mutated(key, value)
    assert (loads(recipe), VALIDATOR.is_valid(recipe)) == (good, good)


@pytest.mark.parametrize(("recipe", "good"), WHOLE, ids=lambda value: str(value)[:60])
def test_both_validators_agree_on_whole_recipes(recipe: dict[str, Any], good: bool) -> None:
    assert (loads(recipe), VALIDATOR.is_valid(recipe)) == (good, good)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_both_validators_accept_every_shipped_recipe(path: Path) -> None:
    assert loads(path)
    assert list(VALIDATOR.iter_errors(plain(path.read_text("utf-8")))) == []


@pytest.mark.parametrize("kind", template_kinds())
def test_both_validators_accept_every_template(tmp_path: Path, kind: str) -> None:
    (tmp_path / "r.yaml").write_text(render_template(kind))
    assert loads(tmp_path / "r.yaml")
    assert list(VALIDATOR.iter_errors(plain(render_template(kind)))) == []


def test_both_validators_refuse_the_ten_mistakes() -> None:
    path = ROOT / "tests/unit/data/ten_mistakes.yaml"
    assert not loads(path)
    assert not VALIDATOR.is_valid(plain(path.read_text("utf-8")))


def plain(text: str) -> Any:
    root, problems = read_yaml(Text("r.yaml", text))
    assert root is not None
    assert problems == []
    return root.plain()


# Values of many types, to try on every key.
KINDS: list[Any] = [
    None,
    True,
    0,
    1,
    -1,
    0.5,
    2.0,
    10**6,
    "",
    "x",
    "8k",
    "5%",
    "3 steps",
    "never",
    [],
    ["x"],
    [1, 2],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("key", [key for key in fields.settings() if key not in ("llmkit", "extends")])
def test_both_validators_agree_on_every_type_for_every_key(key: str) -> None:
    differing = []
    for value in KINDS:
        recipe = copy.deepcopy(GOOD)
        place: Any = recipe
        *parents, last = key.split(".")
        for part in parents:
            place = place.setdefault(part, {}) if isinstance(place, dict) else place[0].setdefault(part, {})
        (place if isinstance(place, dict) else place[0])[last] = value
        if loads(recipe) != VALIDATOR.is_valid(recipe):
            differing.append((value, loads(recipe)))
    assert differing == []


@pytest.mark.parametrize("value", ["${env:SEED}", "${env:SEED:-3}", "${env:NOT_SET:-3}"])
def test_both_validators_accept_an_expression_for_a_number(tmp_path: Path, value: str) -> None:
    text = f"llmkit: 1\nseed: {value}\n"
    (tmp_path / "r.yaml").write_text(text)
    assert loads(tmp_path / "r.yaml")
    assert VALIDATOR.is_valid(plain(text))


def test_the_documented_exceptions_are_as_documented() -> None:
    """What only the loader can check (`published.py` lists it)."""
    only_loader = [
        mutated("tokenize", {"vocab_size": 258, "special_tokens": ["a"]}),
        mutated("pretrain.data", [{"files": "a", "name": "n"}, {"files": "b", "name": "n"}]),
        mutated("seed", "${env:NOT_SET}"),
        mutated("seed", "${env:SEED}"),  # a mapping's text is text, as in quotes
        {"llmkit": 1, "extends": "no-such-recipe"},
        {"llmkit": 1, "variants": {"a": {}}, "variant": "b"},
        {
            "llmkit": 1,
            "variants": {"a": {"pretrain": {"train": {"length": "1h"}}}},
        },  # without text or tokenizer
    ]
    assert [(loads(recipe), VALIDATOR.is_valid(recipe)) for recipe in only_loader] == [(False, True)] * len(
        only_loader
    )


def test_the_published_schema_is_up_to_date() -> None:
    published = (ROOT / "docs/recipe.schema.json").read_text("utf-8")
    assert published == schema_text(), "llmkit recipe schema > docs/recipe.schema.json"


def test_the_schema_names_the_presets_that_the_plan_has() -> None:
    assert get_args(Preset) == (*PRESETS, *PUBLISHED)


def test_every_property_is_described() -> None:
    for name, block in SCHEMA["$defs"].items():
        assert block.get("description"), name
        for key, schema in block.get("properties", {}).items():
            assert schema.get("description"), (name, key)


def report_of(code: str) -> Any:
    """Run code in a fresh interpreter; the CPU seconds it took, what it imported and what it says."""
    tail = "\nimport sys, time, json\nprint(json.dumps([time.process_time(), sorted(sys.modules), said]))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail],
        cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout)


def without_heavy(modules: list[str]) -> bool:
    heavy = {"torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy", "jsonschema"}
    return not heavy & set(modules)


CASES: list[tuple[str, Callable[[Any], bool]]] = [
    (
        "from llmkit.recipe import load_recipe\nsaid = load_recipe('zh-tiny').recipe.name",
        lambda said: said == "zh-tiny",
    ),
    (
        "from llmkit.recipe import load_recipe\nfrom llmkit.errors import RecipeError\n"
        "try: load_recipe('tests/unit/data/ten_mistakes.yaml')\nexcept RecipeError as e: said = len(e.problems)",
        lambda said: said == 10,
    ),
]


@pytest.mark.parametrize(("code", "right"), CASES, ids=["good", "ten mistakes"])
def test_loading_takes_under_a_second_and_nothing_heavy(code: str, right: Callable[[Any], bool]) -> None:
    seconds, modules, said = report_of(code)
    assert right(said)
    assert without_heavy(modules)
    assert seconds < 1.0
