"""KTO: the loss against the paper's equation on transformers' own logits; the reference point; rows and figures."""

import copy
import itertools
import json
import pickle
import random

import numpy as np
import pytest
import torch
from test_objectives_dpo import LONG, answers_of, network
from training import losses
from tuning import content, finetune, rows_file, tokenizer_of

from llmkit.errors import DataError
from llmkit.models.adapters import inject_adapter
from llmkit.objectives.base import Counts, Expands, Judges, LooksAhead, Material, Refers, Relates
from llmkit.objectives.detail import Details, Regroups
from llmkit.objectives.dpo import build
from llmkit.objectives.judged import Judged
from llmkit.recipe import load_recipe
from llmkit.recipe.parts import Adapter
from llmkit.recipe.tasks import Preferences


def rows_of(count, task="kto"):
    """Canonical rows, `place` among them."""
    found = []
    for number, row in enumerate(map(json.loads, content(task, count).splitlines())):
        turns = {
            key: [{"role": "user" if key == "prompt" else "assistant", "content": row[key]}]
            for key in ("prompt", "completion", "chosen", "rejected")
            if key in row
        }
        label = {"label": row["label"]} if "label" in row else {}
        found.append({**turns, **label, "place": f"a.jsonl:{number + 1}"})
    return found


def task(context=64, counts=(3, 2), **settings):
    """The task as a recipe with such settings of `dpo` makes it."""
    made = {
        "task": "dpo",
        "model": {"name": "m"},
        "data": {"files": "x"},
        "dpo": {"loss": "kto", **settings},
    }
    section = load_recipe({"llmkit": 1, "finetune": made}).recipe.finetune
    facts = {"train_classes": {"good": counts[0], "bad": counts[1]}}
    return build(section, Material(tokenizer_of("llama"), context, facts=facts))


ROWS = [part for row in task().relate(rows_of(5)) for part in task().expand(row)]


def batch_of(objective, rows=ROWS):
    return objective.collate([objective.encode(row) for row in rows])


# --- the loss ---------------------------------------------------------------------------------------------------


def test_a_small_example_by_hand():
    """Log ratios +2 and -1 of good answers, +3 of a bad one; the reference point (1 + 2.5 - 0.5) / 3 = 1; beta 0.5.

    1 - sigmoid(0.5 (2 - 1)) = 0.377540669; 1 - sigmoid(0.5 (-1 - 1)) = 0.731058579, both times 1;
    1 - sigmoid(0.5 (1 - 3)) = 0.731058579, times 2.
    """
    objective = task(beta=0.5, desirable_weight=1, undesirable_weight=2)
    ratios = {"input_ids": [2.0, -1.0, 3.0], "other_ids": [1.0, 2.5, -0.5]}
    objective._log_ratios = lambda model, batch, names: torch.tensor(ratios[names[0]])
    batch = {"targets": torch.ones(3, 1), "other_targets": torch.ones(3, 1), "label": torch.tensor([1, 1, 0])}
    net = network(1)
    total = objective.loss(net.train(), batch).total
    assert float(total) == pytest.approx(0.377540669 + 0.731058579 + 2 * 0.731058579, abs=1e-6)
    found = objective.loss(net.eval(), batch).found
    figures = objective.measure(rows_of(3), found)
    assert figures["loss"] == pytest.approx((0.377540669 + 3 * 0.731058579) / 3, abs=1e-9)
    assert figures["kl"] == 1.0
    # good ones are worth 0.5 (2 - 1) / 2 = 0.25 on average, the bad one 1.5
    assert (figures["chosen"], figures["rejected"], figures["margin"]) == (0.25, 1.5, -1.25)
    assert figures["accuracy"] == 0.0


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_loss_and_gradients_are_those_of_the_equation(beta):
    objective = task(beta=beta, undesirable_weight=1.5)
    net, first = network(1), network(2)
    objective.refer(first)
    batch = batch_of(objective)
    ours = objective.loss(net.train(), batch).mean({"num_targets": int(batch["num_targets"])})
    ours.backward()
    mine = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    ratios, others = [], []
    for row in ROWS:
        now = answers_of(net, objective, row)
        swapped = answers_of(net, objective, {**row, "completion": row["other"]})
        with torch.no_grad():
            ratios.append(now[0] - answers_of(first, objective, row)[0])
            others.append(swapped[0] - answers_of(first, objective, {**row, "completion": row["other"]})[0])
        ratios[-1] = now[0] - (now[0] - ratios[-1]).detach()
    z0 = max(0.0, float(torch.stack(others).mean()))
    each = [
        1 - torch.sigmoid(beta * (r - z0)) if row["label"] else 1.5 * (1 - torch.sigmoid(beta * (z0 - r)))
        for row, r in zip(ROWS, ratios, strict=True)
    ]
    expected = sum(each) / len(each)
    expected.backward()
    assert z0 > 0
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in net.named_parameters():
        assert torch.allclose(mine[name], p.grad, atol=1e-5, rtol=1e-3), name


def test_the_reference_point_is_never_below_zero_and_has_no_gradient():
    objective = task()
    (found,) = objective.settle([{"ratio": torch.tensor([-3.0, 1.0]), "is_one": torch.tensor([1, 1])}], None)
    assert float(found["settled_kl"]) == 0.0
    net = network(1)
    objective.refer(network(2))
    seen = objective.glimpse(net, batch_of(objective))
    assert not seen["ratio"].requires_grad
    (nothing,) = objective.settle([{"ratio": torch.tensor([5.0]), "is_one": torch.tensor([0])}], None)
    assert float(nothing["settled_kl"]) == 0.0


def test_how_the_rows_of_a_step_are_grouped_changes_no_bit_of_the_reference_point():
    objective, chance = task(), random.Random(3)
    values = [chance.gauss(1, 3) for _ in range(64)]
    ones = [int(chance.random() < 0.9) for _ in values]
    found = set()
    for _ in range(20):
        order = chance.sample(range(64), 64)
        cuts = [0, *sorted(chance.sample(range(1, 64), 5)), 64]
        seen = [
            {
                "ratio": torch.tensor([values[n] for n in order[a:b]]),
                "is_one": torch.tensor([ones[n] for n in order[a:b]]),
            }
            for a, b in itertools.pairwise(cuts)
        ]
        found |= {float(one["settled_kl"]) for one in objective.settle(seen, None)}
    assert len(found) == 1
    known = [value for value, one in zip(values, ones, strict=True) if one]
    assert found.pop() == pytest.approx(sum(known) / len(known), rel=1e-6)


def test_micro_batches_that_were_settled_have_the_loss_and_gradient_of_one_batch():
    net = network(1)
    whole, parts = task(), [ROWS[:2], ROWS[2:]]
    whole.refer(network(2))
    batches = [batch_of(whole, part) for part in parts]
    alone = whole.loss(net.train(), batch_of(whole)).total
    alone.backward()
    wanted = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    settled = whole.settle([whole.glimpse(net, batch) for batch in batches], None)
    totals = [whole.loss(net, {**batch, **more}).total for batch, more in zip(batches, settled, strict=True)]
    sum(totals).backward()
    assert sum(totals).item() == pytest.approx(alone.item(), rel=1e-6)
    assert all(torch.allclose(p.grad, wanted[name], atol=1e-7) for name, p in net.named_parameters())
    apart = sum(whole.loss(net, batch).total for batch in batches)  # each with a reference point of its own
    assert apart.item() != pytest.approx(alone.item(), rel=1e-4)
    assert net.training
    assert all(module.training for module in net.modules())


def test_dropout_is_not_in_the_reference_point():
    net, objective = network(1), task()
    objective.refer(network(2))
    wanted = objective.glimpse(net, batch_of(objective))["ratio"]
    net.train()
    for layer in net.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert torch.equal(objective.glimpse(net, batch_of(objective))["ratio"], wanted)
    assert net.model.layers[0].self_attn.training


def test_the_model_without_its_adapter_is_the_one_at_first():
    objective, other = task(), task()
    net = network(1)
    other.refer(copy.deepcopy(net))
    inject_adapter(net, Adapter(rank=4), seed=3)
    torch.manual_seed(5)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    net.train()
    ours, theirs = (some.loss(net, batch_of(some)) for some in (objective, other))
    assert ours.total.item() == pytest.approx(theirs.total.item(), rel=1e-5)
    ours.total.backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {
        name for name, p in net.named_parameters() if "lora" in name
    }


def test_it_is_what_the_loop_looks_for_and_goes_to_loader_processes_without_the_model():
    objective = task()
    for protocol in (LooksAhead, Refers, Relates, Counts, Expands, Judges, Details, Regroups):
        assert isinstance(objective, protocol)
    alone = len(pickle.dumps(objective))
    objective.refer(network(1))
    assert len(pickle.dumps(objective)) == alone


# --- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad", "settings", "expected"),
    [
        (100, 100, {}, (1, 1)),
        (130, 100, {}, (1, 1)),
        (50, 100, {}, (2, 1)),  # 2 * 50 = 100
        (400, 100, {}, (1, 3)),  # 400 = 4/3 * 3 * 100
        (400, 100, {"undesirable_weight": 1}, (1, 1)),
        (50, 100, {"desirable_weight": 1}, (1, 1)),
        (50, 100, {"undesirable_weight": 0.5}, (1, 0.5)),
        (50, 100, {"undesirable_weight": 2}, (4, 2)),
    ],
)
def test_weights_balance_good_and_bad_answers(good, bad, settings, expected):
    made = Preferences(loss="kto", **settings).weights(good, bad)
    assert made == pytest.approx(expected)
    if not settings:
        assert 1 - 1e-9 <= made[0] * good / (made[1] * bad) <= 4 / 3 + 1e-9


# --- rows -------------------------------------------------------------------------------------------------------


def test_each_answer_is_beside_one_to_another_prompt_whatever_the_order_of_the_rows():
    rows = rows_of(20)
    rows += [{**rows[0], "completion": rows[1]["completion"], "place": "b:1"}]  # a second answer to a prompt
    objective = task()
    said = {row["place"]: row["others"] for row in objective.relate(rows)}
    of_prompt = {row["completion"][0]["content"]: row["prompt"] for row in rows[:20]}
    for row in rows:
        (other,) = said[row["place"]]
        assert of_prompt[other[0]["content"]] != row["prompt"]
    assert len({other[0]["content"] for (other,) in said.values()}) > 10
    mixed = random.Random(1).sample(rows, len(rows))
    assert {row["place"]: row["others"] for row in objective.relate(mixed)} == said


def test_a_pair_is_a_good_and_a_bad_answer_and_a_pair_again():
    objective = task()
    pairs = rows_of(6, "dpo")
    related = objective.relate(pairs)
    for row, more in zip(pairs, related, strict=True):
        parts = objective.expand(more)
        assert [part["label"] for part in parts] == [True, False]
        assert [part["completion"] for part in parts] == [row["chosen"], row["rejected"]]
        assert parts[0]["other"] in [one["chosen"] for one in pairs if one is not row]
        assert parts[1]["other"] in [one["rejected"] for one in pairs]
        assert objective.whole(parts) == row
        assert objective.whole(parts[:1])["completion"] == row["chosen"]


def test_an_answer_without_another_prompt_has_no_part_in_the_reference_point():
    objective = task()
    row = {name: value for name, value in ROWS[0].items() if name != "other"}
    net = network(1)
    objective.refer(network(2))
    seen = objective.glimpse(net, batch_of(objective, [ROWS[1], row]))
    assert seen["is_one"].tolist() == [1, 0]
    assert list(objective.texts(objective.encode(row))) == ["bad"]
    assert list(objective.texts(objective.encode(ROWS[1]))) == ["good", "to another prompt"]


def test_what_is_cut_off_counts_as_none():
    objective = task(context=12)
    long = {**ROWS[0], "prompt": [{"role": "user", "content": "red cat " * 20}]}
    batch = batch_of(objective, [long, long])
    assert int(batch["num_targets"]) == 0
    objective.refer(network(2))
    net = network(1)
    found = objective.loss(net.train(), batch)
    assert found.total.item() == 0
    found.total.backward()
    assert objective.measure([long, long], objective.loss(net.eval(), batch).found) == {}
    assert objective.detail([long, long], objective.loss(net.eval(), batch).found).keys == []


def test_the_prompt_loses_its_earliest_turns_for_the_answer():
    row = {**LONG, "completion": LONG["rejected"], "label": False}
    whole = task(context=200).encode(row)
    cut = task(context=len(whole["input_ids"]) - 10).encode(row)
    text = tokenizer_of("llama").decode(cut["input_ids"])
    assert text.startswith("<|im_start|>user\nwhich one?")
    assert int(cut["cut"]) == len(whole["input_ids"]) - len(cut["input_ids"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"label": True, "other": []}] * 3, "all 3 answers to learn from are good"),
        ([{"label": False, "other": []}] * 2, "all 2 answers to learn from are bad"),
        ([{"label": True}, {"label": False}], "are to one prompt"),
    ],
)
def test_rows_that_teach_nothing_are_refused(rows, said):
    with pytest.raises(DataError, match=said):
        task().count(rows)


# --- figures ----------------------------------------------------------------------------------------------------


def found_of(count, prompts, seed=0):
    chance = np.random.default_rng(seed)
    found = [
        [chance.normal(), 1.0, float(chance.random() < 0.5), chance.normal(0.5), 1.0] for _ in range(count)
    ]
    return [f"p{chance.integers(prompts)}" for _ in range(count)], found


@pytest.mark.parametrize("prompts", [12, 10**9])
def test_accuracy_is_that_of_all_pairs(prompts):
    """Of those with the same prompt; where no prompt has two answers, of any."""
    asked, found = found_of(60, prompts)
    found[3][0] = found[7][0] = found[11][0] = 0.25
    pairs = [
        (found[i][0] > found[j][0]) + 0.5 * (found[i][0] == found[j][0])
        for i in range(60)
        for j in range(60)
        if found[i][2] and not found[j][2] and (asked[i] == asked[j] or prompts > 100)
    ]
    judged = Judged(asked, found, beta=0.1, weights=(1, 1))
    assert judged.figures()["accuracy"] == pytest.approx(sum(pairs) / len(pairs))
    items = np.arange(len(set(asked)))
    assert judged.figures(items) == pytest.approx(judged.figures())
    twice = judged.figures(np.concatenate([items, items]))
    assert twice == pytest.approx(judged.figures())


def test_the_model_at_first_gains_nothing():
    objective = task(counts=(100, 100))
    net = network(1)
    objective.refer(network(1))
    figures = objective.measure(ROWS, objective.loss(net.eval(), batch_of(objective)).found)
    assert figures["loss"] == pytest.approx(0.5, abs=1e-6)
    assert figures["accuracy"] == 0.5
    assert figures["kl"] == figures["margin"] == pytest.approx(0, abs=1e-6)


def test_detail_names_the_prompts_on_the_wrong_side():
    rows = rows_of(4)
    rows[3]["prompt"] = rows[2]["prompt"]
    found = [[2.0, 1, 1, 0, 1], [-1.0, 1, 1, 0, 1], [4.0, 1, 0, 0, 1], [1.0, 1, 1, 0, 1]]
    objective = task(beta=1.0)
    detail = objective.detail(rows, found)
    assert detail.keys == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert list(detail.owner) == [0, 1, 2, 2]
    assert [line["score"] for line in detail.lines] == [2.0, -1.0, -1.5]
    assert detail.errors == [2, 1]
    third = detail.lines[2]
    assert (third["target"], third["prediction"]) == (
        rows[3]["completion"][0]["content"],
        rows[2]["completion"][0]["content"],
    )
    assert detail.figures(np.arange(3)) == objective.measure(rows, found)


# --- whole runs -------------------------------------------------------------------------------------------------


def test_a_run_tells_good_answers_from_bad_ones(tmp_path):
    run = finetune(tmp_path, "kto", finetune__model__dropout=0.0)
    # At first each answer is on the reference point: half its weight, which is 1 or 1.5.
    first = [good / 24 + (12 - good) * 1.5 / 24 for good in range(13)]
    assert min(abs(losses(run)[1] - one) for one in first) < 1e-5
    accuracy, margin, kl = (losses(run, f"eval/{name}") for name in ("accuracy", "margin", "kl"))
    assert (accuracy[0], accuracy[6]) == (0.5, 1.0)
    assert margin[6] > 0.05
    assert kl[0] == 0.0
    facts = json.loads((run / "data.json").read_text())
    assert facts["train_classes"] == {"good": 32, "bad": 16}
    assert facts["counted"].endswith("a good one weighs 1, a bad one 1.5")  # 32 = 4/3 * 1.5 * 16


def test_pairs_are_learned_too_and_compared_by_their_prompts(tmp_path):
    run = finetune(tmp_path, "dpo", finetune__model__dropout=0.0, finetune__dpo={"loss": "kto"})
    assert losses(run, "eval/accuracy")[6] == 1.0
    facts = json.loads((run / "data.json").read_text())
    assert facts["train_classes"] == {"good": 48, "bad": 48}
    assert facts["held_out"]["num_rows"] == 32


def test_bad_rows_are_named(tmp_path):
    path = rows_file(tmp_path, "kto").rename(tmp_path / "others.jsonl")
    lines = path.read_text().splitlines()
    row = json.loads(lines[4])
    for broken, said in (
        ({**row, "label": None}, "others.jsonl:5: .*holds null, not true or false"),
        ({**row, "completion": " "}, "others.jsonl:5: .*'completion' is empty"),
        ({name: value for name, value in row.items() if name != "label"}, "others.jsonl:5: .*label"),
    ):
        path.write_text("\n".join([*lines[:4], json.dumps(broken), *lines[5:]]))
        with pytest.raises(DataError, match=said):
            finetune(tmp_path, "kto", finetune__data={"files": str(path)})
    path.write_text("".join(line + "\n" for line in lines if '"label": true' in line))
    with pytest.raises(DataError, match="are good: `kto` tells good from bad"):
        finetune(tmp_path, "kto", finetune__data={"files": str(path)})
