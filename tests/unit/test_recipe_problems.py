"""What a person is told about a wrong recipe: every problem at once, in order, with place and remedy."""

import re
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import RecipeError
from llmkit.recipe import fields, load_recipe
from llmkit.recipe.positions import Spot, Text
from llmkit.recipe.problems import Problem
from llmkit.recipe.translate import FOREIGN

DATA = Path(__file__).parent / "data"
# A recipe without mistakes; the tests add theirs behind it or replace a part.
GOOD = """\
llmkit: 1
tokenize: {data: {files: a.txt}}
pretrain:
  train: {length: 3 epochs}
"""


def problems_of(tmp_path: Path, text: str, **options: Any) -> list[str]:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, **options)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def test_ten_mistakes_are_ten_problems_in_line_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    with pytest.raises(RecipeError) as caught:
        load_recipe("ten_mistakes.yaml")
    assert caught.value.message == "ten_mistakes.yaml: 10 problems"
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == 10
    places = [tuple(map(int, re.findall(r":(\d+):(\d+): ", text)[0])) for text in caught.value.problems]
    assert places == [
        (2, 7), (3, 12), (3, 39), (5, 19), (6, 3), (8, 34), (10, 13), (11, 12), (12, 3), (13, 22),
    ]  # fmt: skip
    assert "\n".join(caught.value.problems) + "\n" == (DATA / "ten_mistakes.txt").read_text()


def test_carets_stand_under_exactly_the_key_or_value() -> None:
    lines = (DATA / "ten_mistakes.yaml").read_text().splitlines()
    text = (DATA / "ten_mistakes.txt").read_text()
    blocks = re.findall(r"^ +(\d+) \| (.*)\n +\| ( *)(\^+)$", text, re.MULTILINE)
    under = [(line, source[len(pad) : len(pad) + len(carets)]) for line, source, pad, carets in blocks]
    assert all(source == lines[int(line) - 1] for line, source, _, _ in blocks)
    # A Chinese character takes two columns of a terminal: its caret stands one further than its index.
    assert under[5] == ("8", "1}")
    assert [word for line, word in under if line != "8"] == [
        "ten mistakes", "algoritm", "100", "gpt-tinny", "learning_rate", "3", "32 rows", "grad_clip", "fp23",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "place", "said"),
    [
        ("sed: 3", "5:1", "`sed` is not a key of a recipe\n     5 | sed: 3\n       | ^^^\n  did you mean `seed`?"),
        ("lr: 3", "5:1", "`lr` is not a key of a recipe; it belongs in `pretrain.train.optim`"),
        ("bf16: true", "5:1", "`bf16`: in llmkit this is `machine.precision`"),
        ("lerning_rate: 1", "5:1", "`learning_rate` of other tools is `pretrain.train.optim.lr` here."),
        ("wieght_decay: 1", "5:1", "did you mean `pretrain.train.optim.weight_decay`?"),
        ("zzzz: 1", "5:1", "its keys are llmkit, name, extends, seed, language, tokenize, pretrain, finetune, eval"),
        ("compress: {method: int8}", "5:12", "`method` is not a key of `compress`"),
        ("<<: {a: 1}", "5:1", "use `extends: other.yaml`"),
        ("seed: true", "5:7", "`seed`: `true` is not a whole number of at least 0"),
        ("seed: -1", "5:7", "`seed`: `-1` is not a whole number of at least 0"),
        ("seed: '5'", "5:7", "`seed`: `5` is not a whole number of at least 0"),
        ("language: English", "5:11", "`language`: `English` does not fit"),
        ("machine: []", "5:10", "`machine`: a list stands where a section (keys and values) belongs"),
        ("machine: cpu", "5:10", "`machine`: `cpu` stands where a section (keys and values) belongs"),
        ("machine: {compile: 1}", "5:20", "`compile`: `1` is not `true` or `false` or one of auto, graphs"),
        ("machine: {parallel: fdsp}", "5:21", "not one of auto, ddp, fsdp, hsdp, nor a section (keys and values)"),
        ("machine: {parallel: fdsp}", "5:21", "did you mean `fsdp`?"),
        ("machine: {device: gpu}", "5:19", "did you mean `cuda`?"),
        ("machine: {precision: bfloat16}", "5:22", "did you mean `bf16`?"),
        ("machine: {parallel: zero3}", "5:21", "its keys are replicate, shard, tensor, expert"),
        ("machine: {processes: atuo}", "5:22", "did you mean `auto`?"),
        ("machine: {micro_batch: 0}", "5:24", "`micro_batch`: `0` is below 1, the least that makes sense here"),
        ("eval: {metrics: [loss, perplexty]}", "5:24", "did you mean `perplexity`?"),
        ("eval: {metrics: {a: 1}}", "5:17", "`metrics`: `{'a': 1}` is no figure of an evaluation"),
        ("eval: {data: [x]}", "5:15", "`data`: `x` stands where a section (keys and values) belongs"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_problem_at_its_place(tmp_path: Path, line: str, place: str, said: str) -> None:
    (text,) = problems_of(tmp_path, GOOD + line + "\n")
    assert text.startswith(f"r.yaml:{place}: ")
    assert said in text


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("name: x\n", "1:1", "a recipe needs `llmkit: 1`"),
        ("llmkit: 2\n", "1:9", "this llmkit reads `llmkit: 1`"),
        ("llmkit: 1\npretrain: {data: {files: a}, model: {name: m}, train: {}}\n", "2:48", "needs `length`"),
        ("llmkit: 1\npretrain: {data: {files: a}, model: {name: m}}\n", "2:1", "`pretrain` needs `train`"),
        (GOOD + "  model: {preset: gpt-tiny, name: gpt2}\n", "5:29", "`preset` and `name` both say which model"),
        (GOOD + "  model: {config: {n_layer: 2}}\n", "5:11", "`config` needs `model_type`"),
        (GOOD + "eval: {data: [{files: a}, {name: b}]}\n", "5:27", "neither `files` nor `dataset`"),
        (GOOD + "eval: {data: {files: a, dataset: b}}\n", "5:25", "`files` and `dataset` both say"),
        (GOOD + "eval: {data: [{files: a, weight: 1}, {files: b}]}\n", "5:38", "has no `weight` but others have"),
        (GOOD + "eval: {data: [{files: a, name: n}, {files: b, name: n}]}\n", "5:53", "already the name of a source"),
        ("llmkit: 1\ntokenize: {}\n", "2:1", "`tokenize` needs text: `data` names none"),
        ("llmkit: 1\ntokenize: {}\npretrain: {train: {length: 1 epoch}}\n", "3:1", "`pretrain` needs text"),
        ("llmkit: 1\ntokenize: {data: []}\n", "2:1", "`tokenize` needs text"),
        ("llmkit: 1\npretrain: {data: {files: a}, train: {length: 1h}}\n", "2:1", "`pretrain` has no tokenizer"),
        ("llmkit: 1\ntokenize: {data: {files: a}, vocab_size: 257}\n", "2:42", "at least 258"),
        (
            "llmkit: 1\ntokenize: {data: {files: a}, vocab_size: 259, special_tokens: [a, b, <|pad|>]}\n",
            "2:42",
            "at least 260",
        ),
    ],
)  # fmt: skip
def test_rules_across_settings_have_their_place_too(tmp_path: Path, text: str, place: str, said: str) -> None:
    (problem,) = problems_of(tmp_path, text)
    assert problem.startswith(f"r.yaml:{place}: ")
    assert said in problem


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("length", "lenght"),
        GOOD.replace("train: {length", "train: {num_train_epochs"),
        GOOD.replace("train: {length: 3 epochs}", "length: 3 epochs"),
        GOOD.replace("data:", "dta:"),
        GOOD.replace("files:", "file:"),
        GOOD.replace("tokenize:", "tokenise:"),
    ],
)
def test_a_misspelt_key_is_not_also_reported_missing(tmp_path: Path, text: str) -> None:
    assert len(problems_of(tmp_path, text)) == 1


def test_an_existing_tokenizer_may_be_smaller_than_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("llmkit: 1\ntokenize: {data: {files: a}, tokenizer: t, vocab_size: 100}\n")
    assert load_recipe(path).recipe.tokenize is not None


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_every_translation_leads_to_a_key_of_the_schema(tmp_path: Path, name: str) -> None:
    assert FOREIGN[name].key in fields.settings()
    assert name not in fields.settings()
    texts = problems_of(tmp_path, f"{GOOD}{name}: 1\n")
    assert any(
        text.startswith(f"r.yaml:5:1: `{name}`: in llmkit this is `{FOREIGN[name].key}`") for text in texts
    )


def test_there_are_about_forty_translations_and_more() -> None:
    wanted = (
        "learning_rate per_device_train_batch_size num_train_epochs max_steps warmup_ratio bf16 fp16 save_steps "
        "gradient_accumulation_steps sequence_len cutoff_len block_size base_model model_name_or_path output_dir"
    )
    assert set(wanted.split()) <= set(FOREIGN)
    assert len(FOREIGN) >= 40


def test_a_long_line_is_cut_around_the_place() -> None:
    line = f"prompts: [{', '.join(['word'] * 100)}]"
    text = str(Problem(Spot(Text("r.yaml", line), 1, 401, 4), "wrong"))
    source, carets = text.splitlines()[1:3]
    assert len(source) < 120
    assert source[carets.index("^") :].startswith(line[400:404])


def test_what_a_terminal_would_act_on_is_not_shown() -> None:
    text = str(Problem(Spot(Text("r.yaml", "a: \x1b[31mred"), 1, 1, 1), "wrong"))
    assert "\x1b" not in text
