"""ELECTRA: transformers' two losses, draws that belong to their rows, and a generator that is a part of the run."""

import pickle
import shutil

import numpy as np
import objectives
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn import functional
from training import losses, options, pretrain, recipe, same_bits, weights
from transformers import AutoModelForMaskedLM, AutoTokenizer, ElectraConfig, ElectraForPreTraining

from llmkit.errors import MissingError
from llmkit.models.heads import Scores, choose_heads
from llmkit.objectives.base import NOT_LEARNED, LossModule
from llmkit.objectives.electra import _DRAWS, _drawn
from llmkit.recipe import load_recipe
from llmkit.report.console import make_reporter
from llmkit.run import evaluate


def built(**settings):
    vocabulary = objectives.vocabulary("electra")
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=vocabulary.size,
        embedding_size=24,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=objectives.CONTEXT,
        pad_token_id=vocabulary.role("pad_token"),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ElectraForPreTraining(config).eval()
    choose_heads(model, "detector")
    made = objectives.make("electra", electra=settings)
    generator = made.parts(model)["generator"]
    for parameter in {*model.parameters(), *generator.parameters()}:
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made, model, generator


def batch_of(made, count=4, cut=None):
    rows = objectives.rows("electra", count)
    if cut is not None:
        rows[1] = {name: array[:cut] if array.ndim else array for name, array in rows[1].items()}
    return made.collate([made.encode(row) for row in rows])


@pytest.mark.parametrize("cut", [None, 9])
def test_the_losses_are_those_of_transformers(cut):
    made, model, generator = built()
    batch = batch_of(made, cut=cut)
    mask = batch.get("attention_mask")
    assert (mask is None) == (cut is None)
    inputs, targets = batch["input_ids"], batch["targets"]
    commonest = targets[targets != NOT_LEARNED].mode().values
    generator.generator_lm_head.bias.data[commonest] += (
        20  # drawn everywhere, so some draws are the text's own
    )
    theirs = generator(input_ids=inputs, attention_mask=mask, labels=targets)
    loss = made.loss(model, batch)
    mean = {name: float(total) / int(batch[name]) for name, total in loss.totals.items()}
    assert mean["num_targets"] == pytest.approx(float(theirs.loss), rel=1e-5)
    scores = Scores(theirs.logits.flatten(0, 1))
    drawn = _drawn(scores, targets.flatten(), batch["draws"].flatten()).view_as(targets)
    read = torch.where(targets == NOT_LEARNED, inputs, drawn)
    replaced = (targets != NOT_LEARNED) & (drawn != targets)
    assert 0 < replaced.sum() < int(batch["num_targets"])
    judged = model(input_ids=read, attention_mask=mask, labels=replaced.long())
    assert mean["num_tokens"] == pytest.approx(50 * float(judged.loss), rel=1e-5)
    there = torch.ones_like(targets) if mask is None else mask
    assert int(batch["num_tokens"]) == int(there.sum())
    assert float(loss.sums["detector_total"]) * 50 == pytest.approx(float(loss.totals["num_tokens"]))
    found = judged.logits > 0
    assert float(loss.sums["detector_correct"]) == float(((found == replaced) & (there == 1)).sum())
    assert float(loss.sums["found"]) == float((found & replaced).sum())
    assert float(loss.sums["replaced"]) == float(replaced.sum())


def test_every_hidden_token_is_the_mask_and_no_other():
    made, *_ = built()
    batch = batch_of(made, 16)
    mask = objectives.vocabulary("electra").role("mask_token")
    assert torch.equal(batch["input_ids"] == mask, batch["targets"] != NOT_LEARNED)


def test_the_generator_shares_its_embeddings_and_has_the_width_asked_for():
    for ratio, width in ((0.25, 16), (0.5, 32), (0.01, 16), (1.0, 64)):
        _, model, generator = built(generator_ratio=ratio)
        assert generator.config.hidden_size == width
        assert generator.config.hidden_size // generator.config.num_attention_heads == 16
        table = model.electra.embeddings.word_embeddings.weight
        assert generator.electra.embeddings.word_embeddings.weight is table
        assert generator.generator_lm_head.weight is table
        assert (
            generator.electra.embeddings.position_embeddings is model.electra.embeddings.position_embeddings
        )


def test_tokens_are_drawn_by_the_generators_probabilities():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    count = 40_000
    scores = Scores(probabilities.log().expand(count, 4))
    draws = torch.from_numpy(np.random.default_rng(0).integers(_DRAWS, size=count))
    drawn = _drawn(scores, torch.ones(count, dtype=torch.int64), draws)
    shares = torch.bincount(drawn, minlength=4) / count
    assert shares[1] == 0
    assert (shares - probabilities).abs().max() < 5 * (0.25 / count) ** 0.5
    edges = _drawn(
        Scores(scores.features_NH[:2]), torch.ones(2, dtype=torch.int64), torch.tensor([0, _DRAWS - 1])
    )
    assert edges.tolist() == [0, 3]


def test_what_is_drawn_belongs_to_the_row_not_to_its_batch():
    made, model, _ = built()
    rows = [made.encode(row) for row in objectives.rows("electra", 6)]
    together = made.loss(model, made.collate(rows))
    alone = [made.loss(model, made.collate([row])) for row in rows]
    for name in together.totals:
        assert float(together.totals[name]) == pytest.approx(
            sum(float(one.totals[name]) for one in alone), rel=1e-5
        )
    assert float(together.sums["replaced"]) == sum(float(one.sums["replaced"]) for one in alone)


def test_the_detector_teaches_the_generator_nothing_but_through_embeddings():
    made, model, generator = built()
    made.loss(model, batch_of(made)).totals["num_tokens"].backward()
    shared = {id(parameter) for parameter in model.parameters()}
    own = [p for p in generator.parameters() if id(p) not in shared]
    assert len(own) > 10
    assert all(p.grad is None for p in own)
    made.loss(model, batch_of(made)).totals["num_targets"].backward()
    core = LossModule(model, made, bf16=False, parts={"generator": generator})
    assert [name for name, p in core.named_parameters() if p.grad is None] == []
    assert len({id(p) for p in core.trained.parameters()}) == len(list(core.parameters()))


def test_loader_processes_do_not_get_the_generator():
    made, *_ = built()
    fresh = objectives.make("electra")
    assert len(pickle.dumps(made)) == len(pickle.dumps(fresh))


SETTING = {**objectives.changes("electra"), "pretrain__prompts": []}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("electra")
    return place, pretrain(place, **SETTING)


def test_a_resumed_run_has_the_same_bits_in_both_networks(run):
    place, folder = run
    before = weights(folder), load_file(folder / "generator/model.safetensors")
    for step in (15, 20):
        shutil.rmtree(folder / f"checkpoints/step_{step:08d}")
    for name in ("model", "generator"):
        shutil.rmtree(folder / name)
    (folder / "report.json").unlink()
    assert pretrain(place, **SETTING) == folder
    assert same_bits(weights(folder), before[0])
    assert same_bits(load_file(folder / "generator/model.safetensors"), before[1])


def test_the_export_is_both_networks_and_their_figures_are_measured_again(run):
    place, folder = run
    loaded = load_recipe(recipe(place, **SETTING))
    measured = evaluate(None, loaded, options(place), make_reporter(quiet=True)).summary["metrics"]
    for name in ("loss", "detector_loss", "accuracy", "recall"):
        assert measured[name] == pytest.approx(losses(folder, f"eval/{name}")[20], rel=1e-5), name
    tokenizer = AutoTokenizer.from_pretrained(folder / "generator")
    generator = AutoModelForMaskedLM.from_pretrained(folder / "generator").eval()
    ids = tokenizer(f"def {tokenizer.mask_token}(self)", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.cls_token_id
    assert ids[0, -1] == tokenizer.sep_token_id
    tables = [
        load_file(folder / name / "model.safetensors")["electra.embeddings.word_embeddings.weight"]
        for name in ("model", "generator")
    ]
    assert np.array_equal(*tables)
    assert functional.softmax(generator(input_ids=ids).logits, -1).isfinite().all()
    shutil.move(folder / "generator", folder / "elsewhere")
    with pytest.raises(MissingError, match="its generator"):
        evaluate(None, loaded, options(place), make_reporter(quiet=True))
    shutil.move(folder / "elsewhere", folder / "generator")
