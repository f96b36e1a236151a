"""Mixed rows: the loss by hand, its gradient, what share and partner follow from, and that nothing else changes."""

import json

import numpy as np
import pytest
import torch
from test_objectives_cls import ROWS, batch_of, head, task_of
from training import losses, same_bits, weights
from transformers import T5Config, T5ForSequenceClassification
from tuning import finetune

from llmkit.data.augment.mixing import MIXED, SHARE, Mixing, mixed
from llmkit.data.balance import by_class
from llmkit.data.order import RowOrder
from llmkit.data.sample_batches import SampleBatches
from llmkit.data.samples import Measured, RowsHeld
from llmkit.data.seeds import row_seed
from llmkit.errors import UsageError
from llmkit.objectives.losses import Weighted
from llmkit.objectives.mixing import check_mixable, check_unchanged, mixed_logits

PAIRS = [(0, 1), (1, 0), (2, 1)]
SHARES = (0.7, 0.2, 0.55)


def mixed_batch(objective, shares=SHARES, rows=ROWS):
    made = [objective.encode({**row, "seed": 0}) for row in rows]
    return objective.collate(
        [mixed(made[one], made[other], share) for (one, other), share in zip(PAIRS, shares, strict=True)]
    )


def by_hand(net, objective, rows=ROWS):
    """Each pair alone, without padding: mixed embeddings, then both classes' log-probabilities in their shares."""
    embed, total = net.get_input_embeddings(), 0.0
    for (one, other), share in zip(PAIRS, SHARES, strict=True):
        examples = [objective.encode({**rows[number], "seed": 0}) for number in (one, other)]
        longest = max(len(example["input_ids"]) for example in examples)
        vectors, types = [], []
        for example in examples:
            pad = (0, longest - len(example["input_ids"]))
            vectors.append(embed(torch.from_numpy(np.pad(example["input_ids"], pad))))
            types.append(np.pad(example["token_type_ids"], pad) if "token_type_ids" in example else None)
        larger = 0 if share >= 0.5 else 1
        length = len(examples[larger]["input_ids"])
        given = {"inputs_embeds": (share * vectors[0] + (1 - share) * vectors[1]).unsqueeze(0)}
        if types[0] is not None:
            known = np.concatenate([types[larger][:length], types[1 - larger][length:]])
            given["token_type_ids"] = torch.from_numpy(known).unsqueeze(0)
        logs = net(**given).logits[0].log_softmax(0)
        first, second = (int(example["targets"][0]) for example in examples)
        total = total - share * logs[first] - (1 - share) * logs[second]
    return total


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_the_loss_of_mixed_rows_by_hand(family):
    objective, net = task_of(family=family), head(family, num_labels=3)
    batch = mixed_batch(objective)
    assert int(batch["num_targets"]) == 3
    found, expected = objective.loss(net, batch).total, by_hand(net, objective)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    embed = net.get_input_embeddings().weight
    mine, its = (torch.autograd.grad(value, embed)[0] for value in (found, expected))
    assert torch.allclose(mine, its, atol=1e-5)
    assert float(mine.abs().max()) > 1e-4


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("share", [1.0, 0.0])
def test_a_share_of_one_is_the_plain_loss(family, share):
    objective, net = task_of(family=family), head(family, num_labels=3)
    whole = [ROWS[pair[share == 0.0]] for pair in PAIRS]
    with torch.no_grad():
        plain = objective.loss(net, batch_of(objective, whole)).total
        found = objective.loss(net, mixed_batch(objective, [share] * 3)).total
    assert float(found) == pytest.approx(float(plain), rel=1e-6)


def test_the_gradient_is_that_of_the_loss():
    """Against differences of the loss in double precision, along a random direction of the embeddings."""
    objective, net = task_of(), head("bert", num_labels=3).double()
    batch = mixed_batch(objective)
    batch[SHARE] = batch[SHARE].double()
    embed = net.get_input_embeddings().weight
    along = torch.randn(embed.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    along[net.config.pad_token_id] = 0  # torch keeps it as it is

    def value():
        return -(
            batch[SHARE]
            * mixed_logits(net, batch).log_softmax(1).gather(1, batch["targets"].view(-1, 1))[:, 0]
            + (1 - batch[SHARE])
            * mixed_logits(net, batch).log_softmax(1).gather(1, batch["targets" + MIXED].view(-1, 1))[:, 0]
        ).sum()

    slope = float((torch.autograd.grad(value(), embed)[0] * along).sum())
    with torch.no_grad():
        embed += 1e-6 * along
        above = float(value())
        embed -= 2e-6 * along
        below = float(value())
    assert slope == pytest.approx((above - below) / 2e-6, rel=1e-5)


def test_weights_of_classes_count_each_row_in_its_share():
    objective, net = task_of(), head("bert", num_labels=3)
    class_weights, batch = torch.tensor([1.0, 2.0, 0.5]), mixed_batch(objective)
    logs = mixed_logits(net, batch).log_softmax(1)
    expected = 0.0
    for row, share in enumerate(SHARES):
        for part, name in ((share, "targets"), (1 - share, "targets" + MIXED)):
            label = int(batch[name][row])
            expected -= part * float(class_weights[label] * logs[row, label])
    found = objective.loss(net, batch, Weighted(class_weights)).total
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_each_of_several_labels_is_mixed():
    objective, net = task_of(cls={"multiple": True}), head("bert", num_labels=3)
    rows = [
        {**row, "label": labels} for row, labels in zip(ROWS, (["good"], ["bad", "odd"], []), strict=True)
    ]
    batch = mixed_batch(objective, rows=rows)
    assert batch["targets"].shape == batch["targets" + MIXED].shape == (3, 3)
    assert int(batch["num_targets"]) == 9
    share_31 = torch.tensor(SHARES).view(3, 1)
    bits = share_31 * batch["targets"] + (1 - share_31) * batch["targets" + MIXED]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        mixed_logits(net, batch), bits, reduction="sum"
    )
    assert float(objective.loss(net, batch).total) == pytest.approx(float(expected), rel=1e-5)


def test_numbers_are_mixed_in_their_errors():
    objective, net = task_of("regression"), head("bert", num_labels=1)
    rows = [{**row, "label": number} for row, number in zip(ROWS, (1.0, -2.0, 0.5), strict=True)]
    batch = mixed_batch(objective, rows=rows)
    said = mixed_logits(net, batch)[:, 0].tolist()
    expected = sum(
        share * (said[n] - rows[one]["label"]) ** 2 + (1 - share) * (said[n] - rows[other]["label"]) ** 2
        for n, ((one, other), share) in enumerate(zip(PAIRS, SHARES, strict=True))
    )
    assert float(objective.loss(net.train(), batch).total) != 0
    assert float(objective.loss(net.eval(), batch).total) == pytest.approx(expected, rel=1e-5)


def test_share_and_partner_follow_from_the_seed_and_are_spread_as_asked():
    rows = RowsHeld(Measured([{"n": n} for n in range(10)], [5] * 10, [1] * 10, [0] * 10, list(range(10))))
    mixing = Mixing(lambda row: {"input_ids": np.array([row["n"]])}, rows, 0.4)
    seeds = [row_seed(3, position) for position in range(2000)]
    example = mixing({"n": 3, "seed": seeds[5]})
    again = Mixing(lambda row: {"input_ids": np.array([row["n"]])}, rows, 0.4)({"n": 3, "seed": seeds[5]})
    assert {k: v.tolist() for k, v in example.items()} == {k: v.tolist() for k, v in again.items()}
    assert example["input_ids" + MIXED].tolist() == [mixing.partner(seeds[5])]
    shares = np.array([mixing.share(seed) for seed in seeds])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)  # of Beta(a, a)
    counts = np.bincount([mixing.partner(seed) for seed in seeds], minlength=10)
    assert counts.min() > 150
    assert abs(np.corrcoef(shares, [mixing.partner(seed) for seed in seeds])[0, 1]) < 0.07


def test_partners_come_by_class_where_classes_are_balanced():
    groups = by_class(["often"] * 90 + ["rare"] * 10, "classes")
    rows = RowsHeld(Measured([{}] * 100, [5] * 100, [1] * 100, [0] * 100, list(range(100))))
    mixing = Mixing(dict, rows, 1.0, groups)
    found = [mixing.partner(row_seed(3, position)) for position in range(2000)]
    assert np.mean([number >= 90 for number in found]) == pytest.approx(0.5, abs=0.04)
    assert min(np.bincount(found, minlength=100)) >= 1


def test_a_row_has_room_for_its_partner():
    lengths = [4] * 39 + [60]
    rows = RowsHeld(Measured([{"n": n} for n in range(40)], lengths, [1] * 40, [0] * 40, list(range(40))))
    mixing = Mixing(lambda row: {"input_ids": np.zeros(lengths[row["n"]])}, rows, 1.0)
    batches = SampleBatches(
        rows, RowOrder([40], None, 3), rows_per_step=40, tokens=80, packed=False, world_size=1, rank=0,
        encode=mixing, draws=True, partner=mixing.partner,
    )  # fmt: skip
    widths = []
    for step in range(6):
        for _, examples in batches.of_step(step):
            longest = max(len(e[name]) for e in examples for name in ("input_ids", "input_ids" + MIXED))
            widths.append(longest * len(examples))
    assert max(widths) <= 80
    assert sum(width > 60 for width in widths) > 6, "rows with a long partner are there"


def test_models_that_take_no_embeddings_are_refused():
    shape = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(UsageError, match="judges tokens only"):
        check_mixable(T5ForSequenceClassification(T5Config(**shape)), "my/t5")
    check_mixable(head("bert"), "mine")
    check_unchanged(head("gpt2"))
    net = head("bert")
    net.bert.embeddings.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "inputs_embeds": 2 * kwargs["inputs_embeds"]})
        if kwargs.get("inputs_embeds") is not None else None,
        with_kwargs=True,
    )  # fmt: skip
    with pytest.raises(UsageError, match="otherwise than their tokens"):
        check_unchanged(net)


def test_a_run_mixes_while_it_trains_and_measures_single_rows(tmp_path):
    short = {"finetune__train__length": "2 steps", "finetune__model__dropout": 0.0}
    plain = finetune(tmp_path, "cls", "plain", **short)
    one = finetune(tmp_path, "cls", "one", **short, finetune__loss__mixup=0.5)
    two = finetune(tmp_path, "cls", "two", **short, finetune__loss__mixup=0.5, machine__loader_workers=1)
    assert losses(plain)[1] != losses(one)[1]
    assert losses(plain, "eval/loss")[0] == losses(one, "eval/loss")[0]
    assert same_bits(weights(one), weights(two))
    assert json.loads((one / "report.json").read_text())["status"] == "done"
