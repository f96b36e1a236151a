"""Classes and numbers: losses beside transformers' own, weights and passes by hand, sampling by count."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from training import losses, options
from transformers import AutoModelForSequenceClassification
from tuning import CONTEXT, finetune, model, recipe, rows_file, tokenizer_of

from llmkit.data.balance import by_class
from llmkit.data.order import RowOrder
from llmkit.errors import MissingError, UsageError
from llmkit.models.heads import Scores
from llmkit.models.tasks import build_task_model, in_order_of_model
from llmkit.objectives.base import NOT_LEARNED, Material, cross_entropy
from llmkit.objectives.losses import Weighted, agreeing, class_weights, make_criterion, twofold
from llmkit.objectives.make import make_task
from llmkit.recipe import load_recipe
from llmkit.recipe.schema import Finetune
from llmkit.report.console import make_reporter
from llmkit.run.rows import prepare_rows

LABELS = ("bad", "good", "odd")
COUNTS = {"bad": 6, "good": 3, "odd": 1}
ROWS = [
    {"text": "the red cat", "label": "good"},
    {"text": "the blue dog lives in Oslo and walks on and on", "label": "bad"},
    {"text": "a fish", "other": "in Rome", "label": "odd"},
]


def section(task="cls", **settings):
    return Finetune.model_validate({"task": task, "model": {"name": "m"}, "data": {"files": "x"}, **settings})


def material(family="bert", labels=LABELS):
    return Material(tokenizer_of(family), CONTEXT, labels, facts={"train_classes": COUNTS})


def task_of(name="cls", family="bert", labels=LABELS, **settings):
    return make_task(section(name, **settings), material(family, labels))


def head(family, **more):
    torch.manual_seed(5)
    pad = {"pad_token_id": tokenizer_of(family).pad_token_id or 0}
    return AutoModelForSequenceClassification.from_pretrained(model(family), **pad, **more).eval()


def batch_of(objective, rows):
    return objective.collate([objective.encode({**row, "seed": 0}) for row in rows])


def inputs(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
@torch.no_grad()
def test_the_loss_is_that_of_transformers_for_encoders_decoders_and_both(family):
    rows = ROWS[:2] if family == "t5" else ROWS  # its head wants one end of text a row
    objective, net = task_of(family=family), head(family, num_labels=3)
    batch = batch_of(objective, rows)
    loss = objective.loss(net, batch)
    own = net(**inputs(batch), labels=batch["targets"])
    assert int(batch["num_targets"]) == len(rows)
    assert float(loss.total) / len(rows) == pytest.approx(float(own.loss), rel=1e-6)
    probabilities = own.logits.softmax(1).numpy()
    assert np.allclose(np.stack(loss.found), probabilities, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "llama"])
@torch.no_grad()
def test_padding_changes_nothing(family):
    objective, net = task_of(family=family), head(family, num_labels=3)
    alone = sum(float(objective.loss(net, batch_of(objective, [row])).total) for row in ROWS)
    assert float(objective.loss(net, batch_of(objective, ROWS)).total) == pytest.approx(alone, rel=1e-5)


@torch.no_grad()
def test_several_labels_have_the_loss_of_transformers():
    objective = task_of(cls={"multiple": True})
    net = head("bert", num_labels=3, problem_type="multi_label_classification")
    batch = batch_of(objective, [{**ROWS[0], "label": ["good", "odd"]}, {**ROWS[1], "label": []}])
    assert batch["targets"].tolist() == [[0, 1, 1], [0, 0, 0]]
    loss = objective.loss(net, batch)
    own = net(**inputs(batch), labels=batch["targets"].float())
    assert int(batch["num_targets"]) == 6
    assert float(loss.total) / 6 == pytest.approx(float(own.loss), rel=1e-6)
    assert np.allclose(np.stack(loss.found), own.logits.sigmoid().numpy(), atol=1e-6)
    assert objective.predict({}, [0.2, 0.9, 0.6])["label"] == ["good", "odd"]
    figures = objective.measure([{"label": ["good"]}, {"label": []}], [[0.2, 0.9, 0.6], [0.1, 0.1, 0.1]])
    assert figures["accuracy"] == 0.5
    assert figures["micro_f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("family", ["bert", "llama"])
@torch.no_grad()
def test_a_number_has_the_loss_of_transformers(family):
    objective = task_of("regression", family, labels=("score",))
    net = head(family, num_labels=1, problem_type="regression")
    batch = batch_of(objective, [{**ROWS[0], "label": 3.5}, {**ROWS[1], "label": -1.0}])
    loss = objective.loss(net, batch)
    own = net(**inputs(batch), labels=batch["numbers"])
    assert float(loss.total) / 2 == pytest.approx(float(own.loss), rel=1e-6)
    assert loss.found == pytest.approx(own.logits.squeeze(1).tolist())
    assert objective.measure([{"label": 3.5}, {"label": -1.0}], [2.5, -1.0])["mse"] == 0.5
    unknown = batch_of(objective, [{"text": "a"}])
    assert int(unknown["num_targets"]) == 0
    assert float(objective.loss(net, unknown).total) == 0.0


def test_a_text_that_is_too_long_is_cut_and_counted():
    objective = task_of()
    example = objective.encode({"text": "cat " * 200, "label": "bad"})
    assert len(example["input_ids"]) == CONTEXT
    assert int(example["cut"]) == 200 + 2 - CONTEXT


# --- losses ---------------------------------------------------------------------------------------------------

LOGITS = torch.tensor(
    [[2.0, 0.5, -1.0], [0.0, 1.0, 0.5], [1.0, 1.0, 1.0], [3.0, -2.0, 0.0]], requires_grad=True
)
TARGETS = torch.tensor([0, 2, 1, NOT_LEARNED])


def test_weights_are_one_on_average_over_rows():
    balanced = class_weights("balanced", LABELS, COUNTS)
    assert balanced == pytest.approx([10 / 18, 10 / 9, 10 / 3])  # rows / (classes x rows of the class)
    named = class_weights({"odd": 5.0}, LABELS, COUNTS)
    assert named == pytest.approx([10 / 14, 10 / 14, 50 / 14])
    assert sum(w * COUNTS[label] for w, label in zip(named, LABELS, strict=True)) == pytest.approx(10)
    with pytest.raises(UsageError, match="no label 'od'") as caught:
        class_weights({"od": 5.0}, LABELS, COUNTS)
    assert caught.value.hint == "did you mean 'odd'?"


def test_weighted_losses_are_those_of_torch():
    weights = torch.tensor([1.0, 2.0, 0.5])
    own = torch.nn.functional.cross_entropy(
        LOGITS, TARGETS, weight=weights, reduction="sum", ignore_index=NOT_LEARNED
    )
    assert float(Weighted(weights)(Scores(LOGITS), TARGETS)) == pytest.approx(float(own), rel=1e-6)
    smooth = torch.nn.functional.cross_entropy(
        LOGITS, TARGETS, label_smoothing=0.1, reduction="sum", ignore_index=NOT_LEARNED
    )
    found = Weighted(None, label_smoothing=0.1)(Scores(LOGITS), TARGETS)
    assert float(found) == pytest.approx(float(smooth), rel=1e-6)


def test_focal_loss_by_hand():
    p = LOGITS.detach().double().softmax(1)
    by_hand = sum(-((1 - p[n, t]) ** 2) * p[n, t].log() for n, t in ((0, 0), (1, 2), (2, 1)))
    assert float(Weighted(None, gamma=2.0)(Scores(LOGITS), TARGETS)) == pytest.approx(
        float(by_hand), rel=1e-5
    )
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    Weighted(None, gamma=0.5)(Scores(sure), torch.tensor([0])).backward()
    assert torch.isfinite(sure.grad).all()


def test_two_classes_of_one_logit_are_binary_cross_entropy():
    logits, bits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)) * 5, torch.eye(4, 3)
    own = torch.nn.functional.binary_cross_entropy_with_logits(logits, bits, reduction="sum")
    found = cross_entropy(Scores(twofold(logits)), bits.long().flatten())
    assert float(found) == pytest.approx(float(own), rel=1e-6)


def test_two_passes_by_hand():
    both, targets = torch.cat([LOGITS, LOGITS.roll(1, 0)]), torch.cat([TARGETS, TARGETS])
    p, q = LOGITS.double().softmax(1)[:3], LOGITS.roll(1, 0).double().softmax(1)[:3]
    apart = ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
    plain = cross_entropy(Scores(both), targets) / 2
    found = agreeing(both, targets, cross_entropy, 3.0)
    assert float(found) == pytest.approx(float(plain + 3.0 / 2 * apart), rel=1e-5)
    same = torch.cat([LOGITS, LOGITS])
    once = cross_entropy(Scores(LOGITS), TARGETS)
    assert float(agreeing(same, targets, cross_entropy, 3.0)) == pytest.approx(float(once), rel=1e-6)


def test_r_drop_sees_two_dropouts_and_without_any_is_the_plain_loss():
    objective = task_of(loss={"r_drop": 1.0})
    net = head("bert", num_labels=3).train()
    batch = batch_of(objective, ROWS)
    torch.manual_seed(1)
    with_dropout = float(objective.loss(net, batch).total)
    plain = task_of()
    for part in net.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    expected = float(plain.loss(net, batch).total)
    assert float(objective.loss(net, batch).total) == pytest.approx(expected, rel=1e-6)
    assert with_dropout != pytest.approx(expected, rel=1e-4)


def test_a_loss_of_ones_own_is_asked_for_targets_alone(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "class Hinge:\n"
        "    def __call__(self, logits, targets):\n"
        "        right = logits.gather(1, targets.unsqueeze(1))\n"
        "        return (1 + logits - right).clamp(min=0).sum() - len(targets)\n"
        "def flat(logits, targets):\n"
        "    return logits\n"
        "NUMBER = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def made(name, **more):
        return make_criterion(section(loss={"custom": name, "trust_custom_code": True, **more}), material())

    rows = LOGITS[:3].detach()
    right = rows.gather(1, TARGETS[:3].unsqueeze(1))
    by_hand = float((1 + rows - right).clamp(min=0).sum() - 3)
    assert float(made("my_losses:Hinge")(Scores(LOGITS), TARGETS)) == pytest.approx(by_hand)
    with pytest.raises(Exception, match="must be one number"):
        made("my_losses:flat")(Scores(LOGITS), TARGETS)
    with pytest.raises(MissingError, match="cannot be imported"):
        made("my_losses:Other")
    with pytest.raises(UsageError, match="is no function"):
        made("my_losses:NUMBER")
    untrusted = section().model_copy(
        update={"loss": section().loss.model_copy(update={"custom": "my_losses:Hinge"})}
    )
    with pytest.raises(UsageError, match="code of your own"):
        make_criterion(untrusted, material())


# --- sampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("balance", "shares"), [("classes", (1 / 2, 1 / 2)), ("root", (3 / 4, 1 / 4))])
def test_classes_come_in_their_shares(balance, shares):
    labels = ["often"] * 90 + ["rare"] * 10
    groups = by_class(labels, balance)
    sources, within = RowOrder([len(rows) for rows in groups.rows], groups.shares, 3).locate(np.arange(1024))
    found = [labels[groups.rows[s][w]] for s, w in zip(sources, within, strict=True)]
    assert found.count("often") / 1024 == pytest.approx(shares[0], abs=1e-3)
    rare = [int(groups.rows[s][w]) for s, w in zip(sources, within, strict=True) if s == 1]
    counts = [rare.count(number) for number in range(90, 100)]
    assert max(counts) - min(counts) <= 1, "each row of a class comes as often as the others"


def test_a_run_takes_rows_by_class_and_its_losses_are_others(tmp_path):
    text = (rows_file(tmp_path, "cls")).read_text().splitlines()
    (tmp_path / "uneven.csv").write_text(
        "\n".join([*text, *[line for line in text if ",red" in line] * 5]) + "\n"
    )
    short = {"finetune__data__files": str(tmp_path / "uneven.csv"), "finetune__train__length": "2 steps"}
    plain = finetune(tmp_path, "cls", "plain", **short)
    even = finetune(tmp_path, "cls", "even", **short, finetune__cls__balance="classes")
    weighted = finetune(tmp_path, "cls", "weighted", **short, finetune__loss__weights="balanced")
    assert len({losses(folder)[1] for folder in (plain, even, weighted)}) == 3
    assert losses(plain, "eval/loss")[0] == losses(even, "eval/loss")[0] == losses(weighted, "eval/loss")[0]
    config = json.loads((plain / "model" / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification"
    assert config["id2label"] == {"0": "black", "1": "blue", "2": "green", "3": "red", "4": "white"}


def test_labels_come_in_the_order_of_a_model_that_has_them(tmp_path):
    names = {0: "odd", 1: "bad", 2: "good"}
    head("bert", id2label=names, label2id={name: n for n, name in names.items()}).save_pretrained(tmp_path)
    assert in_order_of_model(LABELS, str(tmp_path)) == ("odd", "bad", "good")
    assert in_order_of_model(("bad", "good"), str(tmp_path)) == ("bad", "good")
    assert in_order_of_model(LABELS, model("bert")) == LABELS, "a model without a head has no names"


def test_one_label_that_applies_or_not_keeps_its_name(tmp_path):
    path = tmp_path / "one.jsonl"
    rows = [{"text": f"the {colour} cat {n}", "label": ["red"] * (colour == "red")}
            for n in range(12) for colour in ("red", "blue")]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = finetune(
        tmp_path,
        "cls",
        finetune__data={"files": str(path)},
        finetune__cls={"multiple": True},
        finetune__train__length="2 steps",
    )
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "red"}
    assert config["problem_type"] == "multi_label_classification"
    assert build_task_model(str(folder / "model"), "sequence", labels=["red"])[1] == ()


def test_weights_of_classes_count_the_rows_that_are_learned(tmp_path):
    loaded = load_recipe(recipe(tmp_path, "cls"))
    rows = prepare_rows(loaded, options(tmp_path), make_reporter(quiet=True))
    learned = Counter(json.loads(line)["label"] for line in (rows.folder / "train.jsonl").open())
    assert rows.facts["train_classes"] == dict(learned)
    assert sum(learned.values()) == 48 < sum(rows.facts["classes"].values()) == 64


def test_a_number_is_learned_and_exported_as_one_output(tmp_path):
    folder = finetune(tmp_path, "regression", finetune__train__length="30 steps")
    found = losses(folder, "eval/loss")
    assert found[30] < 0.5 * found[0]
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    figures = json.loads((folder / "report.json").read_text())["final"]
    assert figures["eval/mse"] == pytest.approx(figures["eval/loss"], rel=1e-6)
