"""Texts for texts: ids of training and use, the loss of transformers' own model, what is written, its figures."""

import json

import numpy as np
import pytest
import torch
import tuning
from transformers import AutoModelForSeq2SeqLM

from llmkit.errors import DataError, UsageError
from llmkit.evaluate.generate import generate
from llmkit.metrics.bleu import bleu, chrf
from llmkit.metrics.rouge import rouge
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import NOT_LEARNED, Material
from llmkit.objectives.seq2seq import Writing
from llmkit.recipe import load_recipe
from llmkit.recipe.schema import Sampling
from llmkit.recipe.tasks import Written
from llmkit.report.run_log import read_metrics

ROWS = [
    {"source": "the red cat lives in Oslo", "target": "cat red"},
    {"source": "the blue dog lives in New York and walks on and on", "target": "dog blue and on"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tuning.tokenizer_of("t5")


@pytest.fixture(scope="module")
def model():
    made = AutoModelForSeq2SeqLM.from_pretrained(tuning.model("t5")).eval()
    torch.manual_seed(1)
    made.lm_head.weight = torch.nn.Parameter(torch.randn_like(made.lm_head.weight))  # it writes something
    choose_heads(made, "seq2seq")
    return made


def task(tokenizer, language="en", max_length=40, **settings):
    return Writing(Written(**settings), Material(tokenizer, max_length, language=language))


def test_source_and_target_end_and_the_prefix_stands_before_the_source(tokenizer):
    example = task(tokenizer, prefix="sort: ").encode(ROWS[0])
    assert tokenizer.decode(example["input_ids"]) == "sort: the red cat lives in Oslo</s>"
    assert tokenizer.decode(example["targets"]) == "cat red</s>"
    assert int(example["cut"]) == 0


def test_a_tokenizer_that_sets_no_end_gets_one():
    plain = tuning.tokenizer_of("gpt2")  # it adds nothing
    example = task(plain).encode(ROWS[0])
    assert [example[name][-1] for name in ("input_ids", "targets")] == [plain.eos_token_id] * 2
    plain.eos_token = None
    with pytest.raises(UsageError, match="ends a text"):
        task(plain)


def test_a_target_that_is_cut_does_not_end_and_a_source_does(tokenizer):
    whole = task(tokenizer).encode(ROWS[1])
    cut = task(tokenizer, max_length=8, max_target=3).encode(ROWS[1])
    assert cut["targets"].tolist() == whole["targets"][:3].tolist()
    assert cut["input_ids"].tolist() == [*whole["input_ids"][:7], tokenizer.eos_token_id]
    assert int(cut["cut"]) == len(whole["targets"]) - 3 + len(whole["input_ids"]) - 8


def test_a_target_that_the_vocabulary_cannot_spell_is_refused(tokenizer, monkeypatch):
    writing = task(tokenizer)
    monkeypatch.setattr(writing, "_tokenizer", _Unknowing(tokenizer))
    with pytest.raises(DataError, match="does not know the letters of the target '你好'"):
        writing.encode({"source": "hello", "target": "你好"})


class _Unknowing:
    """A tokenizer whose vocabulary is Latin."""

    def __init__(self, real):
        self.real, self.unk_token_id = real, real.unk_token_id

    def __call__(self, text=None, text_target=None, **more):
        if text_target is not None and not text_target.isascii():
            return {"input_ids": [self.unk_token_id] * len(text_target) + [self.real.eos_token_id]}
        return self.real(text, text_target=text_target, **more)


def test_the_loss_is_that_of_the_model_itself(tokenizer, model):
    batch = (writing := task(tokenizer, write=False)).collate([writing.encode(row) for row in ROWS])
    with torch.no_grad():
        own = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["targets"]
        ).loss
        loss = writing.loss(model, batch)
    assert int(batch["num_targets"]) == sum(len(writing.encode(row)["targets"]) for row in ROWS)
    assert float(loss.total) / int(batch["num_targets"]) == pytest.approx(float(own), rel=1e-5)
    assert loss.found == ()


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_written_is_what_the_model_writes_for_each_row_alone(tokenizer, model, beams):
    writing = task(tokenizer, num_beams=beams, max_target=6)
    with torch.no_grad():
        found = writing.loss(model, writing.collate([writing.encode(row) for row in ROWS])).found
        alone = [
            model.generate(
                input_ids=torch.tensor([tokenizer(row["source"])["input_ids"]]),
                max_new_tokens=6,
                num_beams=beams,
                do_sample=False,
            )[0]
            for row in ROWS
        ]
    assert found == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in alone]
    assert any(found)


def test_rows_without_targets_are_written_all_the_same(tokenizer, model):
    writing = task(tokenizer, max_target=4)
    example = writing.encode({"source": "the red cat"})
    assert example["targets"].tolist() == [NOT_LEARNED]
    with torch.no_grad():
        [text] = writing.loss(model, writing.collate([example])).found
    assert writing.predict({}, text) == {"text": text}


def test_figures_are_those_of_the_metrics(tokenizer):
    found = ["cat red", "dog blue and off"]
    figures = task(tokenizer).measure(ROWS, found)
    references = [[row["target"]] for row in ROWS]
    assert figures["bleu"] == bleu(found, references, language="en").value
    assert figures["chrf"] == chrf(found, references).value
    assert {name: figures[name] for name in ("rouge1", "rougeL")} == {
        name: value for name, value in rouge(found, references).items() if name in ("rouge1", "rougeL")
    }


@pytest.mark.parametrize("said", [None, "zh"])
def test_chinese_targets_are_cut_by_characters_whatever_the_recipes_language(tokenizer, said):
    rows = [{"target": "我明天去北京看朋友"}, {"target": "今天天气很好"}]
    found = ["我明天去上海看朋友", "今天天气不好"]
    figures = task(tokenizer, target_language=said).measure(rows, found)
    assert figures["bleu"] == bleu(found, [[row["target"]] for row in rows], language="zh").value > 20
    assert figures["rouge1"] == pytest.approx((7 / 9 + 5 / 6) / 2)


def test_without_sacrebleu_there_is_rouge_alone(tokenizer, monkeypatch):
    monkeypatch.setattr("llmkit.objectives.seq2seq.find_spec", lambda name: None)
    figures = task(tokenizer).measure(ROWS, ["cat red", "dog"])
    assert "rouge1" in figures
    assert "bleu" not in figures


def test_a_run_learns_to_write_and_is_used_as_it_was_trained(tmp_path):
    folder = tuning.finetune(
        tmp_path,
        "seq2seq",
        finetune__seq2seq={"prefix": "sort: ", "max_target": 12, "num_beams": 2},
        finetune__train__length="60 steps",
        finetune__eval__every="60 steps",
        machine__micro_batch=16,
    )
    figures = [record for record in read_metrics(folder) if "eval/chrf" in record]
    assert figures[-1]["eval/chrf"] > figures[0]["eval/chrf"] + 20
    assert json.loads((folder / "report.json").read_text())["final"]["eval/rouge1"] > 0.3
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
    tokenizer = tuning.tokenizer_of("t5")
    assert model.config.prefix == "sort: "
    assert (model.generation_config.num_beams, model.generation_config.max_new_tokens) == (2, 12)
    seen = []
    own = model.generate
    model.generate = lambda **given: seen.append(given["input_ids"]) or own(**given)
    generate(model, tokenizer, [ROWS[0]["source"]], Sampling(max_new_tokens=4), seed=0)
    assert np.array_equal(seen[0][0], task(tokenizer, prefix="sort: ").encode(ROWS[0])["input_ids"])


def test_fewer_rows_are_written_during_training_than_at_its_end(tmp_path):
    section = tuning.recipe(tmp_path, "seq2seq")
    assert load_recipe(section).recipe.finetune.eval.rows == 200
    section["finetune"]["eval"] = {"rows": None}
    assert load_recipe(section).recipe.finetune.eval.rows is None
