"""Vectors: the loss over a whole step, whatever its micro-batches; equal texts; scores; what other libraries read."""

import json
import math

import numpy as np
import pytest
import torch
import tuning
from scipy.stats import spearmanr
from torch.nn import functional
from training import options, weights
from transformers import AutoModel

from llmkit.errors import DataError, UsageError
from llmkit.objectives.base import NOT_LEARNED, Material
from llmkit.objectives.embed import SHARPNESS, Embedding, cosent
from llmkit.recipe import load_recipe
from llmkit.recipe.tasks import Embeddings
from llmkit.report.console import make_reporter
from llmkit.report.run_log import read_metrics
from llmkit.run import evaluate

ROWS = [
    {"anchor": "where is the cat?", "positive": "the red cat lives in Oslo"},
    {"anchor": "where is the dog?", "positive": "the blue dog lives in Rome and walks on and on"},
    {"anchor": "a bird?", "positive": "the green bird", "negatives": ["the black bird", "no bird"]},
    {"anchor": "where is the horse?", "positive": "Paris"},
    {"anchor": "and the fish?", "positive": "the white fish lives in Vienna"},
]
SCORED = [
    {"anchor": row["anchor"], "positive": row["positive"], "score": score}
    for row, score in zip(ROWS, (0.9, 0.1, 0.5, 0.1, 0.7), strict=True)
]


@pytest.fixture(scope="module")
def tokenizer():
    return tuning.tokenizer_of("bert")


@pytest.fixture
def model():
    made = AutoModel.from_pretrained(tuning.model("bert"), dtype=torch.float32)
    made.train()
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return made


def task(tokenizer, form="pairs", **settings):
    return Embedding(Embeddings(**settings), Material(tokenizer, 64, facts={"form": form}))


def batch_of(embedding, rows):
    return embedding.collate([embedding.encode(row) for row in rows])


def vectors_of(model, tokenizer, texts):
    given = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = model(**given).last_hidden_state
    weight = given["attention_mask"].unsqueeze(2).float()
    return functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def in_pieces(embedding, model, pieces):
    """The loss of a step in micro-batches, as the training loop makes it, and its gradients."""
    batches = [batch_of(embedding, rows) if rows else _filled_up(embedding, pieces[0][0]) for rows in pieces]
    with torch.no_grad():
        seen = [embedding.glimpse(model, batch) for batch in batches]
    total = 0.0
    for batch, more in zip(
        batches, embedding.settle(seen, lambda scores, targets: scores.nll(targets)), strict=True
    ):
        loss = embedding.loss(model, {**batch, **more}).total
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def _filled_up(embedding, row):
    """A micro-batch of a process that has no row of the step left: another's, with nothing to learn."""
    example = embedding.encode(row)
    return embedding.collate([{**example, "targets": np.array([NOT_LEARNED])}])


def test_the_loss_is_the_cross_entropy_of_each_anchors_document_among_all(tokenizer, model):
    embedding = task(tokenizer, temperature=0.1)
    anchors = vectors_of(model, tokenizer, [row["anchor"] for row in ROWS])
    documents = [text for row in ROWS for text in (row["positive"], *row.get("negatives", ()))]
    cosines = anchors @ vectors_of(model, tokenizer, documents).T
    expected = functional.cross_entropy(cosines / 0.1, torch.tensor([0, 1, 2, 5, 6]), reduction="sum")
    loss = embedding.loss(model, batch_of(embedding, ROWS))
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("form", "rows"), [("pairs", ROWS), ("pairs", [*ROWS[:4], ROWS[0]]), ("scored", SCORED)]
)
@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 1, 1, 1, 1), (4, 1, 0)])
def test_a_step_in_micro_batches_learns_what_the_step_in_one_piece_does(tokenizer, model, form, rows, sizes):
    embedding = task(tokenizer, form)
    whole = embedding.loss(model, batch_of(embedding, rows)).total
    whole.backward()
    expected = gradients(model)
    ends = np.cumsum(sizes)
    total, found = in_pieces(
        embedding, model, [rows[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    )
    assert total == pytest.approx(float(whole.detach()), rel=1e-5)
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < 1e-5 * largest, name


def test_equal_documents_and_documents_of_equal_anchors_are_no_wrong_answers(tokenizer, model):
    embedding = task(tokenizer, temperature=1.0)
    rows = [
        {"anchor": "a cat", "positive": "red"},
        {"anchor": "a dog", "positive": "red"},  # the same document
        {"anchor": "a cat", "positive": "blue"},  # another that is right for the first anchor
        {"anchor": "a fish", "positive": "a cat"},  # the first anchor's own text
    ]
    anchors = vectors_of(model, tokenizer, [row["anchor"] for row in rows])
    cosines = anchors @ vectors_of(model, tokenizer, [row["positive"] for row in rows]).T
    left = [[0], [1, 2, 3], [2], [3, 0, 1, 2]]  # of each row: its own document first, then wrong answers
    expected = sum(
        float(torch.logsumexp(cosines[n][some], 0) - cosines[n][some[0]]) for n, some in enumerate(left)
    )
    loss = embedding.loss(model, batch_of(embedding, rows))
    assert float(loss.total.detach()) == pytest.approx(expected, abs=1e-5)


def test_a_row_that_only_fills_up_says_nothing_of_what_is_right(tokenizer, model):
    """Were its document right for its anchor, that would be no wrong answer to a row of the step any more."""
    embedding = task(tokenizer, temperature=1.0)
    expected = embedding.loss(model, batch_of(embedding, ROWS[:2])).total
    filler = embedding.encode({"anchor": ROWS[0]["anchor"], "positive": ROWS[1]["positive"]})
    examples = [embedding.encode(row) for row in ROWS[:2]]
    batch = embedding.collate([*examples, {**filler, "targets": np.array([NOT_LEARNED])}])
    assert int(batch["num_targets"]) == 2
    found = embedding.loss(model, batch).total
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_scored_pairs_learn_their_order_or_their_scores(tokenizer, model):
    cosines, scores = torch.tensor([0.2, 0.5, 0.4]), torch.tensor([3.0, 1.0, 2.0])
    # Above: first over second and third, third over second.
    wrong = [0.5 - 0.2, 0.4 - 0.2, 0.5 - 0.4]
    expected = math.log(1 + sum(math.exp(SHARPNESS * gap) for gap in wrong))
    assert float(cosent(cosines, scores)) == pytest.approx(expected, rel=1e-6)
    assert float(cosent(cosines, torch.ones(3))) == 0.0
    embedding = task(tokenizer, "scored", scored="cosine")
    assert not embedding.looks_ahead
    one, other = (
        vectors_of(model, tokenizer, [row[name] for row in SCORED]) for name in ("anchor", "positive")
    )
    wanted = torch.tensor([row["score"] for row in SCORED])
    loss = embedding.loss(model, batch_of(embedding, SCORED)).total
    assert float(loss.detach()) == pytest.approx(
        float(((one * other).sum(1) - wanted).square().sum().detach()), rel=1e-5
    )
    with pytest.raises(DataError, match=r"the score is 4\.5"):
        embedding.encode({**SCORED[0], "score": 4.5})


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_a_vector_can_be_that_of_the_first_or_the_last_token(tokenizer, model, pooling):
    embedding = task(tokenizer, pooling=pooling)
    model.eval()
    with torch.no_grad():
        found = embedding.loss(model, batch_of(embedding, ROWS[:2])).found
        for row, made in zip(ROWS, found, strict=False):
            hidden = model(**tokenizer(row["anchor"], return_tensors="pt")).last_hidden_state[0]
            expected = functional.normalize(hidden[0 if pooling == "cls" else -1], dim=0)
            assert made[0] == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_decoders_and_encoders_of_two_give_vectors_too(family):
    model = AutoModel.from_pretrained(tuning.model(family), dtype=torch.float32)
    embedding = task(tuning.tokenizer_of(family))
    embedding.prepare(model)
    model.train()
    embedding.loss(model, batch_of(embedding, ROWS)).total.backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in model.named_parameters() if p.grad is not None}
    assert not any(name.startswith("decoder.") for name in learning)
    model.eval()
    with torch.no_grad():
        together = embedding.loss(model, batch_of(embedding, ROWS)).found
        alone = [embedding.loss(model, batch_of(embedding, [row])).found[0] for row in ROWS]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_figures_are_of_all_held_out_rows_together(tokenizer, model):
    embedding = task(tokenizer, temperature=0.1)
    rows = [ROWS[0], ROWS[2], {"anchor": ROWS[0]["anchor"], "positive": "Paris"}, ROWS[3]]
    model.eval()
    with torch.no_grad():
        found = [embedding.loss(model, batch_of(embedding, [row])).found[0] for row in rows]
        anchors = vectors_of(model, tokenizer, [rows[n]["anchor"] for n in (0, 1, 3)])
        texts = [rows[0]["positive"], rows[1]["positive"], *rows[1]["negatives"], "Paris"]
        scores = anchors @ vectors_of(model, tokenizer, texts).T / 0.1
    # The first anchor has two documents, of which neither is a wrong answer; the last shares one with it.
    cases = [(0, 0, [0, 1, 2, 3]), (0, 4, [4, 1, 2, 3]), (1, 1, [0, 1, 2, 3, 4]), (2, 4, [0, 1, 2, 3, 4])]
    losses = [float(torch.logsumexp(scores[n][some], 0) - scores[n][own]) for n, own, some in cases]
    figures = embedding.measure(rows, found)
    assert figures["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    best = scores.argsort(dim=1, descending=True)
    ranks = [
        [int((best[n] == own).nonzero()) for own in some] for n, some in ((0, (0, 4)), (1, (1,)), (2, (4,)))
    ]
    assert figures["mrr"] == pytest.approx(np.mean([1 / (1 + min(some)) for some in ranks]))
    assert figures["recall_at_1"] == pytest.approx(
        np.mean([np.mean([rank < 1 for rank in some]) for some in ranks])
    )


def test_scored_rows_are_measured_by_ranks(tokenizer, model):
    embedding = task(tokenizer, "scored")
    model.eval()
    with torch.no_grad():
        found = embedding.loss(model, batch_of(embedding, SCORED)).found
    cosines = [float(made[0] @ made[1]) for made in found]
    scores = [row["score"] for row in SCORED]
    figures = embedding.measure(SCORED, found)
    assert figures["spearman"] == pytest.approx(spearmanr(cosines, scores).statistic)
    expected = cosent(torch.tensor(cosines, dtype=torch.float64), torch.tensor(scores))
    assert figures["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_texts_alone_become_vectors_and_prefixes_stand_before_them(tokenizer, model):
    embedding = task(tokenizer, anchor_prefix="the ", document_prefix="a ")
    example = embedding.encode({"anchor": "cat", "positive": "dog"})
    first, second = np.split(example["input_ids"], np.cumsum(example["lengths"])[:-1])
    assert first.tolist() == tokenizer("the cat")["input_ids"]
    assert second.tolist() == tokenizer("a dog")["input_ids"]
    model.eval()
    with torch.no_grad():
        [found] = embedding.loss(model, batch_of(embedding, [{"text": "cat"}])).found
        expected = vectors_of(model, tokenizer, ["the cat"])[0]
    assert embedding.predict({}, found)["vector"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_labels_that_are_not_there_cannot_be_smoothed(tmp_path):
    with pytest.raises(UsageError, match="no labels to smooth"):
        tuning.finetune(tmp_path, "embed", finetune__train__label_smoothing=0.1)


def written(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_with_a_score_are_not_measured_as_others_nor_the_other_way(tmp_path):
    pairs = [{name: row[name] for name in ("anchor", "positive")} for row in ROWS]
    files = {
        "scored": written(tmp_path, "scored.jsonl", SCORED),
        "pairs": written(tmp_path, "pairs.jsonl", pairs),
    }
    for own, other in (("scored", "pairs"), ("pairs", "scored")):
        tuning.finetune(
            tmp_path, "embed", own, finetune__data={"files": files[own]}, finetune__train__length="1 steps",
            finetune__train__batch="2 samples",
        )  # fmt: skip
        with pytest.raises(DataError, match=f"these rows are `{other}`.*learned from rows that are `{own}`"):
            measure(tmp_path, own, files[other])
        assert "loss" in measure(tmp_path, own, files[own])


def test_rows_that_cannot_be_used_are_left_out_where_the_recipe_says_so(tmp_path):
    """With `scored: cosine` a score above 1 is a fault."""
    tuning.finetune(
        tmp_path, "embed", finetune__data={"files": written(tmp_path, "scored.jsonl", SCORED)},
        finetune__train__length="1 steps", finetune__embed={"scored": "cosine"}, finetune__train__batch="2 samples",
    )  # fmt: skip
    other = written(tmp_path, "other.jsonl", [*SCORED, {**SCORED[0], "score": 4.5}])
    with pytest.raises(DataError, match=r"the score is 4\.5"):
        measure(tmp_path, "embed", other)
    assert "spearman" in measure(tmp_path, "embed", other, on_error="skip")


def measure(folder, name, files, **more):
    made = {"llmkit": 1, "name": name, "eval": {"data": {"files": files, **more}}}
    return evaluate(name, load_recipe(made), options(folder), make_reporter(quiet=True)).summary["metrics"]


def test_a_run_learns_leaves_the_pooler_alone_and_is_read_by_sentence_transformers(tmp_path):
    folder = tuning.finetune(
        tmp_path,
        "embed",
        finetune__train__length="30 steps",
        finetune__eval__every="30 steps",
        finetune__embed={"temperature": 0.1, "anchor_prefix": "query: "},
        machine__micro_batch=8,
    )
    figures = [record for record in read_metrics(folder) if "eval/mrr" in record]
    assert figures[-1]["eval/mrr"] > figures[0]["eval/mrr"] + 0.3
    model = folder / "model"
    pooling = json.loads((model / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"]
    assert not pooling["pooling_mode_cls_token"]
    assert pooling["word_embedding_dimension"] == 32
    kinds = [one["type"].split(".")[-1] for one in json.loads((model / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Normalize"]
    prompts = json.loads((model / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == {"query": "query: ", "document": ""}
    AutoModel.from_pretrained(model)
    assert "pooler.dense.weight" in weights(folder)
