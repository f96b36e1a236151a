"""Texts for texts by a decoder: the row, the loss of transformers' own model, what is written, runs."""

import json

import numpy as np
import pytest
import torch
import tuning
from training import options
from transformers import AutoModelForCausalLM

from llmkit.errors import DataError, UsageError
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import NOT_LEARNED, LossModule, Material
from llmkit.objectives.seq2seq import Writing
from llmkit.objectives.seq2seq_decoder import PROMPT, DecoderWriting
from llmkit.recipe import load_recipe
from llmkit.recipe.tasks import Written
from llmkit.report.console import make_reporter
from llmkit.report.run_log import read_metrics
from llmkit.run.evaluate import evaluate
from llmkit.run.merge import How, merge
from llmkit.run.tasks import predict, task_run
from llmkit.train.adapted import what_is_read

ROWS = [
    {"source": "the red cat lives in Oslo", "target": "cat red"},
    {"source": "the blue dog lives in New York and walks on and on", "target": "dog blue and on"},
]
ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return tuning.tokenizer_of("llama")


@pytest.fixture(scope="module")
def plain():
    """A tokenizer without a chat template."""
    made = tuning.tokenizer_of("gpt2")
    made.chat_template = None
    return made


@pytest.fixture(scope="module")
def model():
    made = AutoModelForCausalLM.from_pretrained(tuning.model("llama")).eval()
    torch.manual_seed(1)
    weights = made.lm_head.weight
    made.lm_head.weight = torch.nn.Parameter(torch.randn_like(weights))  # it writes something
    choose_heads(made, "causal")
    return made


def task(tokenizer, max_length=128, **settings):
    facts = {"kind": "causal"}
    return DecoderWriting(
        Written(**{"max_target": 16, **settings}), Material(tokenizer, max_length, facts=facts)
    )


def parts(tokenizer, example):
    """What is read before the first target, and the targets."""
    length = int(example[PROMPT][0])
    learned = example["targets"] != NOT_LEARNED
    assert learned.tolist() == [place >= length - 1 for place in range(len(learned))]
    return tokenizer.decode(example["input_ids"][:length]), tokenizer.decode(example["targets"][learned])


def test_with_a_template_the_source_is_asked_and_the_target_answered(tokenizer):
    example = task(tokenizer, prefix="sort: ").encode(ROWS[0])
    assert parts(tokenizer, example) == (ASKED.format("sort: the red cat lives in Oslo"), "cat red<|im_end|>")
    assert int(example["cut"]) == 0


def test_without_a_template_the_separator_stands_between(plain):
    source, target = ROWS[0]["source"], ROWS[0]["target"]
    assert parts(plain, task(plain).encode(ROWS[0])) == (f"{source}\n", f"{target}<|endoftext|>")
    example = task(plain, prefix="say: ", separator=" => ").encode(ROWS[0])
    assert parts(plain, example) == (f"say: {source} => ", f"{target}<|endoftext|>")


def test_a_target_that_is_cut_does_not_end_and_of_a_source_the_end_goes(tokenizer):
    whole = task(tokenizer).encode(ROWS[1])
    length, size = int(whole[PROMPT][0]), len(whole["input_ids"]) + 1
    cut = task(tokenizer, max_length=length + 2 - 4, max_target=2).encode(ROWS[1])
    prompt, target = parts(tokenizer, cut)
    assert target == tokenizer.decode(whole["targets"][length - 1 :][:2])
    source = prompt.removeprefix(ASKED.split("{}")[0]).removesuffix(ASKED.split("{}")[1])
    assert ROWS[1]["source"].startswith(source)
    assert source != ROWS[1]["source"]
    assert int(cut["cut"]) == size - len(cut["input_ids"]) - 1
    with pytest.raises(DataError, match=r"no room for the source 'the blue dog .* fill all 8 tokens"):
        task(tokenizer, max_length=8, max_target=2).encode(ROWS[1])
    with pytest.raises(UsageError, match=r"max_target is 16, and a row of 16 tokens holds the source too"):
        task(tokenizer, max_length=16)


def test_the_loss_is_that_of_the_model_itself_and_padding_adds_nothing(tokenizer, model):
    writing = task(tokenizer, write=False)
    examples = [writing.encode(row) for row in ROWS]
    batch = writing.collate(examples)
    own = []
    for example in examples:
        labels = np.concatenate([[NOT_LEARNED], example["targets"]])
        ids = np.concatenate([example["input_ids"], example["targets"][-1:]])
        found = model(input_ids=torch.tensor(ids)[None], labels=torch.tensor(labels)[None])
        own.append(found.loss.item() * int((example["targets"] != NOT_LEARNED).sum()))
    with torch.no_grad():
        loss = writing.loss(model, batch)
    assert float(loss.total) == pytest.approx(sum(own), rel=1e-5)
    assert int(batch["num_targets"]) == sum(int((one["targets"] != NOT_LEARNED).sum()) for one in examples)
    assert loss.found == ()


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_written_is_what_the_model_writes_for_each_prompt_alone(tokenizer, model, beams):
    writing = task(tokenizer, num_beams=beams, max_target=6)
    with torch.no_grad():
        found = writing.loss(model, writing.collate([writing.encode(row) for row in ROWS])).found
    alone = []
    for row in ROWS:
        ids = tokenizer(ASKED.format(row["source"]), add_special_tokens=False)["input_ids"]
        made = model.generate(
            input_ids=torch.tensor([ids]),
            max_new_tokens=6,
            num_beams=beams,
            do_sample=False,
            eos_token_id=sorted(writing.stops),
            pad_token_id=tokenizer.eos_token_id,
        )[0, len(ids) :].tolist()
        end = next((place for place, number in enumerate(made) if number in writing.stops), len(made))
        alone.append(tokenizer.decode(made[:end], skip_special_tokens=True).strip())
    assert found == alone
    assert any(found)


def test_rows_without_targets_are_written_and_figures_are_those_of_an_encoder_decoder(tokenizer, model):
    writing = task(tokenizer, max_target=4)
    example = writing.encode({"text": "the red cat"})
    assert tokenizer.decode(example["input_ids"]) == ASKED.format("the red cat")
    with torch.no_grad():
        [text] = writing.loss(model, writing.collate([example])).found
    assert writing.predict({}, text) == {"text": text}
    other = Writing(Written(), Material(tokenizer, 40))
    assert writing.measure(ROWS, ["cat red", "dog"]) == other.measure(ROWS, ["cat red", "dog"])


def test_a_run_learns_to_write_and_is_used_as_it_was_trained(tmp_path):
    folder = tuning.finetune(
        tmp_path,
        "seq2seq",
        finetune__model={"name": tuning.model("llama"), "context": 96},
        finetune__seq2seq={"prefix": "sort: ", "max_target": 12},
        finetune__train__length="60 steps",
        finetune__eval__every="60 steps",
        finetune__checkpoint__every="never",
        finetune__prompts=[ROWS[0]["source"]],
        machine__micro_batch=16,
    )
    figures = [record for record in read_metrics(folder) if "eval/chrf" in record]
    assert figures[-1]["eval/loss"] < 0.6 * figures[0]["eval/loss"]
    assert figures[-1]["eval/chrf"] > figures[0]["eval/chrf"] + 5
    report = json.loads((folder / "report.json").read_text())
    assert "llmkit predict" in report["next_command"]
    # What the run is asked afterwards is asked as in training: by transformers alone, too.
    [said] = predict(str(folder.parent), [{"source": ROWS[0]["source"]}], runs=folder.parent.parent)
    tokenizer = tuning.tokenizer_of("llama")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    asked = [{"role": "user", "content": "sort: " + ROWS[0]["source"]}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False)
    assert said["text"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert model.generation_config.max_new_tokens == 12
    # And measured, by the code of `eval`.
    run = task_run(folder / "model")
    assert run.facts["kind"] == "causal"
    section = {"llmkit": 1, "name": "measured", "eval": {}}
    found = evaluate([str(folder.parent)], load_recipe(section), options(tmp_path), make_reporter(quiet=True))
    measured = (
        found.summary["models"][0]["metrics"] if "models" in found.summary else found.summary["metrics"]
    )
    assert measured["chrf"] == pytest.approx(report["final"]["eval/chrf"], abs=1e-6)
    # `generation` asks with the prefix and the frame of training, too.
    section = {
        "llmkit": 1,
        "name": "written",
        "eval": {"task": "generation", "generation": {"max_new_tokens": 12}},
    }
    found = evaluate([str(folder.parent)], load_recipe(section), options(tmp_path), make_reporter(quiet=True))
    assert found.summary["metrics"]["chrf"] == pytest.approx(measured["chrf"], abs=1e-6)


def _short(tmp_path, **changes):
    return tuning.finetune(
        tmp_path,
        "seq2seq",
        finetune__model={"name": tuning.model("llama", dropout=0.0), "context": 96},
        finetune__seq2seq={"prefix": "sort: ", "max_target": 6},
        finetune__train__length="4 steps",
        finetune__eval__every="4 steps",
        finetune__checkpoint__every="never",
        machine__micro_batch=16,
        **changes,
    )


def test_a_merged_model_is_compared_on_the_rows_and_not_on_what_it_writes(tokenizer, model):
    writing = task(tokenizer, max_target=4)
    batch = writing.collate([writing.encode(row) for row in ROWS])
    read = what_is_read(LossModule(model, writing, bf16=False), batch)
    assert torch.equal(read["input_ids"], batch["input_ids"])
    assert all(value.shape == batch["input_ids"].shape for value in read.values())


def test_an_adapter_is_merged_and_writes_what_the_model_writes(tmp_path):
    folder = _short(tmp_path, finetune__adapter={"method": "lora", "rank": 4})
    told = json.loads((folder / "report.json").read_text())["adapter"]
    assert told["merged_kl"] < 1e-6
    row = [{"source": ROWS[0]["source"]}]
    made = merge([str(folder / "adapter")], "one", How(), options(tmp_path), make_reporter(quiet=True))
    said = [predict(str(place), row, runs=tmp_path / "runs") for place in (folder.parent, made.folder.parent)]
    assert said[0] == said[1]


def test_it_learns_from_a_teacher_of_its_own_kind_alone(tmp_path):
    teacher = tuning.model("llama", dropout=0.0)
    folder = _short(tmp_path, finetune__distil={"teacher": teacher, "weight": 1.0})
    losses = [record["train/loss"] for record in read_metrics(folder) if "train/loss" in record]
    assert losses[0] == pytest.approx(0, abs=1e-5)  # it starts as its teacher
    assert losses[-1] > 1e-5
    other = tuning.model("t5")
    with pytest.raises(
        UsageError, match=r"is an encoder-decoder, and '.*', which learns from it, is a causal"
    ):
        _short(tmp_path, name="other", finetune__distil={"teacher": other})
