"""Extractive question answering: windows, targets, the loss of transformers' own head, and the best answer."""

import json

import numpy as np
import pytest
import torch
import tuning
from training import losses
from transformers import AutoModelForQuestionAnswering

from llmkit.data.records.answers import IMPOSSIBLE
from llmkit.data.samples import RowsHeld
from llmkit.errors import DataError, UsageError
from llmkit.evaluate.predict import predict
from llmkit.evaluate.task import evaluate_task
from llmkit.objectives.base import NOT_LEARNED, LossModule, Material, smoothed_cross_entropy
from llmkit.objectives.qa import Answering
from llmkit.objectives.windows import Windows
from llmkit.recipe.tasks import Answers
from llmkit.report.run_log import read_metrics
from llmkit.run.rows import measured
from llmkit.run.tasks import predict as judge

CONTEXT = (
    "the red cat lives in Oslo and walks on and on. " * 6 + "the blue dog lives in New York and walks on."
)
ROW = {
    "place": "q:1",
    "id": "a",
    "question": "where does the dog live?",
    "context": CONTEXT,
    "answers": [{"text": "New York", "start": CONTEXT.index("New York")}],
}
SHORT = {**ROW, "context": "the dog lives in New York", "answers": [{"text": "New York", "start": 17}]}


@pytest.fixture(scope="module")
def tokenizer():
    return tuning.tokenizer_of("bert")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForQuestionAnswering.from_pretrained(tuning.model("bert"))


def task(tokenizer, facts=None, language="en", max_length=40, **settings):
    return Answering(
        Answers(**settings), Material(tokenizer, max_length, language=language, facts=facts or {})
    )


def test_windows_are_those_of_the_tokenizer_itself(tokenizer):
    made = Windows(tokenizer, 40, 10).of(ROW["question"], CONTEXT)
    expected = tokenizer(
        ROW["question"],
        CONTEXT,
        truncation="only_second",
        max_length=40,
        stride=10,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert len(made) > 3
    assert [window.inputs["input_ids"].tolist() for window in made] == expected["input_ids"]
    assert [window.inputs["token_type_ids"].tolist() for window in made] == expected["token_type_ids"]
    for number, window in enumerate(made):
        offsets = expected["offset_mapping"][number]
        sides = expected.sequence_ids(number)
        assert window.begins_T.tolist() == [
            o[0] if side == 1 else -1 for o, side in zip(offsets, sides, strict=True)
        ]


def test_the_answer_is_a_target_where_it_stands_and_none_elsewhere(tokenizer):
    answering = task(tokenizer, stride=10)
    rows = answering.expand(ROW)
    spelt = []
    for row in rows:
        example = answering.encode(row)
        first, last = example["targets"]
        if first == example["none"]:
            assert last == first == 0
            # Not in this window: its tokens do not reach over the answer.
            start = ROW["answers"][0]["start"]
            inside = (example["begins"] >= 0) & (example["ends"] > start)
            assert not (inside.any() and example["ends"].max() >= start + len("New York"))
        else:
            spelt.append(CONTEXT[example["begins"][first] : example["ends"][last]])
    assert spelt
    assert set(spelt) == {"New York"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_tokenizer_without_a_first_token_says_none_by_the_last(family):
    answering = task(tuning.tokenizer_of(family))
    example = answering.encode({**SHORT, "answers": []})
    assert example["targets"].tolist() == [len(example["input_ids"]) - 1] * 2
    first, last = answering.encode(SHORT)["targets"]
    text = SHORT["context"][example["begins"][first] : example["ends"][last]]
    assert text.strip() == "New York"


def test_a_long_question_leaves_half_for_the_text_and_is_counted(tokenizer):
    answering = task(tokenizer, stride=10)
    row = {**ROW, "question": "where " * 50}
    rows = answering.expand(row)
    examples = [answering.encode(one) for one in rows]
    assert max(len(example["input_ids"]) for example in examples) <= 40
    assert [int(example["cut"]) for example in examples] == [30] + [0] * (len(rows) - 1)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UsageError, match="where in the text"):
        Windows(object(), 40, 10)


def test_the_loss_is_that_of_the_models_own_head(tokenizer, model):
    answering = task(tokenizer)
    rows = [SHORT, {**SHORT, "answers": [{"text": "dog", "start": 4}]}, {**SHORT, "answers": []}]
    batch = answering.collate([answering.encode(row) for row in rows])
    model.eval()
    with torch.no_grad():
        own = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            token_type_ids=batch["token_type_ids"],
            start_positions=batch["targets"][:, 0],
            end_positions=batch["targets"][:, 1],
        ).loss
        ours = answering.loss(model, batch)
    assert batch["num_targets"] == 3
    assert float(ours.total) / 3 == pytest.approx(float(own), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_fills_a_batch_up_takes_no_part(tokenizer, model, smoothing):
    answering = task(tokenizer, max_length=60)
    examples = [answering.encode(row) for row in (SHORT, answering.expand(ROW)[0])]
    criterion = smoothed_cross_entropy(smoothing, 0.0)
    model.eval()
    with torch.no_grad():
        together = answering.loss(model, answering.collate(examples), criterion)
        alone = [answering.loss(model, answering.collate([one]), criterion) for one in examples]
    assert float(together.total) == pytest.approx(sum(float(one.total) for one in alone), rel=1e-5)
    for one, other in zip(together.found, [loss.found[0] for loss in alone], strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-5)
        assert one[1][0] == pytest.approx(other[1][0], abs=1e-5)


def test_the_best_answers_are_those_of_all_pairs(tokenizer, model):
    answering = task(tokenizer, longest=4, candidates=6)
    example = answering.encode(SHORT)
    batch = answering.collate([example])
    model.eval()
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
        [(none, best)] = answering.loss(model, batch).found
    start, end = logits.start_logits[0].numpy(), logits.end_logits[0].numpy()
    inside = np.flatnonzero(example["begins"] >= 0)
    pairs = sorted(
        (
            (float(start[i] + end[j]), int(example["begins"][i]), int(example["ends"][j]))
            for i in inside
            for j in inside
            if i <= j < i + 4
        ),
        reverse=True,
    )[:6]
    assert none == pytest.approx(float(start[0] + end[0]), abs=1e-5)
    assert [one[0] for one in best] == pytest.approx([one[0] for one in pairs], abs=1e-5)
    assert [tuple(one[1:]) for one in best] == [pair[1:] for pair in pairs]


def test_a_question_is_answered_by_the_best_of_its_windows(tokenizer):
    answering = task(tokenizer)
    rows = [{**ROW, "window": number, "windows": 2} for number in (0, 1)]
    start = ROW["answers"][0]["start"]
    found = [(0.0, [[5.0, 0, 7]]), (9.0, [[6.0, start, start + 8], [5.5, start, start + 12]])]
    assert answering.measure(rows, found) == {"exact_match": 100.0, "f1": 100.0}
    found[0][1][0][0] = 7.0  # now the first window is surer, and wrong
    assert answering.measure(rows, found) == {"exact_match": 0.0, "f1": 0.0}
    assert answering.measure(rows[:1], found[:1]) == {}  # a window is missing


def test_no_answer_is_said_above_the_threshold(tokenizer):
    facts = {"counts": {IMPOSSIBLE: 1}}
    none = {**SHORT, "id": "b", "place": "q:2", "answers": []}
    rows = [SHORT, none]
    found = [(1.0, [[3.0, 17, 25]]), (4.0, [[2.0, 4, 7]])]  # differences of -2 and 2
    figures = task(tokenizer, facts).measure(rows, found)
    assert (figures["exact_match"], figures["f1"]) == (100.0, 100.0)
    assert figures["best_f1"] == 100.0
    assert figures["best_f1_threshold"] == -2.0
    high = task(tokenizer, facts, no_answer_threshold=2.5).measure(rows, found)
    assert high["exact_match"] == 50.0  # only the first is right
    assert high["no_answer_exact_match"] == 0.0
    low = task(tokenizer, facts, no_answer_threshold=-3).measure(rows, found)
    assert low["has_answer_exact_match"] == 0.0
    said = task(tokenizer, facts).predict(none, found[1])
    assert (said["answer"], said["no_answer"]) == ("", 2.0)
    assert said["candidates"][0] == {"text": "dog", "start": 4, "score": 2.0}


def test_chinese_is_compared_by_characters(tokenizer):
    context = "小明住在北京市海淀区。"
    row = {**SHORT, "context": context, "answers": [{"text": "北京市", "start": 4}]}
    found = [(0.0, [[1.0, 4, 6]])]  # two of its three characters
    assert task(tokenizer).measure([row], found)["f1"] == pytest.approx(80.0)
    assert task(tokenizer, rules="squad").measure([row], found)["f1"] == 0.0


def test_a_long_text_is_answered_from_its_end_too(tokenizer, model):
    core = LossModule(model, task(tokenizer), bf16=False)
    row = {"question": ROW["question"], "context": CONTEXT}
    [said] = predict(core, [row])
    model.eval()
    everything = [one for part in task(tokenizer).expand(row) for one in _best_of(core, part)]
    top = sorted(everything, key=lambda one: -one[0])[0]
    assert said["candidates"][0]["score"] == pytest.approx(top[0], abs=1e-5)
    assert said["candidates"][0]["text"] == CONTEXT[int(top[1]) : int(top[2])].strip()


def _best_of(core, part):
    with torch.no_grad():
        [(_, best)] = core.objective.loss(
            core.model, core.objective.collate([core.objective.encode(part)])
        ).found
    return best


def test_rows_to_be_answered_have_no_targets(tokenizer):
    answering = task(tokenizer)
    row = {"question": SHORT["question"], "context": SHORT["context"]}
    example = answering.encode(row)
    assert example["targets"].tolist() == [NOT_LEARNED] * 2
    assert int(answering.collate([example])["num_targets"]) == 0


def test_some_questions_are_measured_with_all_their_windows(tokenizer, model):
    answering = task(tokenizer)
    long = [{**ROW, "place": f"q:{number}", "id": str(number)} for number in range(4)]
    rows = RowsHeld(measured(answering, [{**SHORT, "place": "q:9", "id": "9"}, *long], "cut"))
    seen = []
    core = LossModule(model, answering, bf16=False)
    figures = evaluate_task(
        core, rows, device="cpu", tokens=400, max_rows=3, keep=lambda number, found: seen.append(rows[number])
    )
    assert "f1" in figures
    windows = len(answering.expand(ROW))
    assert [sum(row["id"] == name for row in seen) for name in "90123"] == [1, windows, 0, windows, 0]


def test_a_text_that_is_no_token_is_a_fault_with_its_place(tokenizer):
    answering = task(tokenizer)
    empty = {**SHORT, "context": "\u200b\u200b", "answers": [], "place": "q:7"}
    with pytest.raises(DataError, match=r"q:7: the tokenizer makes no token of the text '\\u200b\\u200b'"):
        measured(answering, [SHORT, empty], "cut")
    left = measured(answering, [SHORT, empty], "cut", skip=True)
    assert (len(left.rows), left.num_unusable) == (1, 1)


def test_a_run_learns_where_answers_stand(tmp_path):
    folder = tuning.finetune(
        tmp_path,
        "qa",
        finetune__train__length="40 steps",
        finetune__model__context=32,
        finetune__eval__every="40 steps",
        machine__micro_batch=32,
    )
    figures = [record for record in read_metrics(folder) if "eval/f1" in record]
    assert figures[-1]["eval/f1"] > figures[0]["eval/f1"] + 20
    assert losses(folder, "eval/loss")[40] < losses(folder, "eval/loss")[0] / 2
    assert json.loads((folder / "report.json").read_text())["final"]["eval/exact_match"] > 20
    AutoModelForQuestionAnswering.from_pretrained(folder / "model")
    with pytest.raises(UsageError, match="answered from a text, and none is given") as caught:
        judge(str(folder / "model"), [{"question": "Who?"}], runs=tmp_path)
    assert "--other" in caught.value.hint
