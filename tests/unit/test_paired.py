"""Two models side by side, target by target: against numbers that are made by hand."""

import copy
import math

import numpy as np
import objectives
import pytest
import torch
import tuning
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from llmkit.evaluate import paired
from llmkit.evaluate.paired import compare_targets
from llmkit.models.heads import Scores, choose_heads
from llmkit.objectives.base import NOT_LEARNED, TARGETS, Loss, LossModule, Material
from llmkit.objectives.embed import Embedding
from llmkit.objectives.qa import Answering
from llmkit.objectives.regression import Regression
from llmkit.recipe.tasks import Answers, Embeddings


class Told:
    """An objective whose logits are what the model holds: [rows, positions, classes]."""

    sums = ()

    def __init__(self, calls=1):
        self._calls = calls

    def loss(self, model, batch, criterion):
        logits_BTC = model.logits_BTC[batch["rows"]]
        for _ in range(self._calls):
            total = criterion(Scores(logits_BTC.flatten(0, 1)), batch["targets"].flatten())
        return Loss({TARGETS: total})


class Says(torch.nn.Module):
    def __init__(self, logits_BTC):
        super().__init__()
        self.logits_BTC = torch.as_tensor(logits_BTC, dtype=torch.float32)
        self.device = torch.device("cpu")
        self.config = object()


def core_of(model, objective):
    return LossModule(model, objective, bf16=False).eval()


def told(first, second, targets, **given):
    batch = {"rows": torch.arange(len(targets)), "targets": torch.tensor(targets), **given}
    return compare_targets(core_of(Says(first), Told()), core_of(Says(second), Told()), [batch])


def changed(model, scale=0.2):
    """A copy whose weights are other ones."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight += scale * weight.std() * torch.randn_like(weight) if weight.numel() > 1 else 0
    return other


def test_numbers_made_by_hand():
    # p = (1/2, 1/2) everywhere, against (3/4, 1/4); targets 0, 1 in the first row, 0 in the second.
    even, uneven = [0.0, 0.0], [math.log(3), 0.0]
    found = told([[even, even]] * 2, [[uneven, uneven]] * 2, [[0, 1], [0, NOT_LEARNED]])
    gain, loss = math.log(0.5 / 0.75), math.log(0.5 / 0.25)
    mean = (2 * gain + loss) / 3
    residuals = [gain + loss - 2 * mean, gain - mean]
    assert (found.num_targets, found.num_rows) == (3, 2)
    assert found.nll_difference == pytest.approx(mean)
    assert found.error == pytest.approx(math.sqrt(2 / 1 * sum(one**2 for one in residuals)) / 3)
    assert found.kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert found.agreement == 1.0  # of equal ones the first counts as the likeliest


def test_equal_models_do_not_differ():
    logits = torch.randn(3, 4, 7).tolist()
    found = told(logits, logits, [[1, 2, 3, 4]] * 3)
    assert (found.nll_difference, found.error, found.kl, found.agreement) == (0, 0, 0, 1)


def test_agreement_is_of_the_likeliest_class():
    first = [[[5, 0, 0], [0, 5, 0]], [[5, 0, 0], [0, 0, 5]]]
    second = [[[1, 0, 0], [0, 0, 1]], [[2, 0, 0], [0, 0, 1]]]
    assert told(first, second, [[0, 0], [0, 0]]).agreement == 0.75
    assert told(first, second, [[0, NOT_LEARNED], [0, 0]]).agreement == 1.0


def test_the_error_is_that_of_rows():
    """The same differences, once alike within rows and once not: only the first leaves rows apart."""
    torch.manual_seed(0)
    flat = torch.zeros(2, 50, 2)
    alike, mixed = flat.clone(), flat.clone()
    alike[0, :, 0], alike[1, :, 0] = 1.0, -1.0
    mixed[:, ::2, 0], mixed[:, 1::2, 0] = 1.0, -1.0
    targets = [[0] * 50] * 2
    by_rows, within = told(flat, alike, targets), told(flat, mixed, targets)
    assert by_rows.nll_difference == pytest.approx(within.nll_difference)
    low, high = (math.log(2) - math.log1p(math.exp(sign)) for sign in (-1, 1))
    assert by_rows.error == pytest.approx(abs(high - low) / 2, rel=1e-5)  # of two rows half their distance
    assert within.error == pytest.approx(0, abs=1e-7)


def test_packed_rows_begin_where_positions_begin_anew():
    first, second = torch.randn(1, 6, 5), torch.randn(1, 6, 5)
    packed = told(first, second, [[1, 2, 3, 4, 0, 1]], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    apart = told(first.view(2, 3, 5), second.view(2, 3, 5), [[1, 2, 3], [4, 0, 1]])
    assert packed == apart
    assert packed.num_rows == 2
    assert told(first, second, [[1, 2, 3, 4, 0, 1]]).error is None  # one row says nothing of others


def test_chunks_change_nothing(monkeypatch):
    first, second = torch.randn(3, 5, 11), torch.randn(3, 5, 11)
    targets = torch.randint(0, 11, (3, 5)).tolist()
    whole = told(first, second, targets)
    monkeypatch.setattr(paired, "_NUMBERS_AT_ONCE", 2 * 11)
    assert whole.to_dict() == pytest.approx(told(first, second, targets).to_dict())


def test_classes_that_are_ruled_out_add_nothing():
    first = torch.tensor([[[1.0, 2.0, -torch.inf]]])
    second = torch.tensor([[[2.0, 1.0, -torch.inf]]])
    p = 1 / (1 + math.e)
    found = told(first, second, [[0]])
    assert found.kl == pytest.approx(p * -1 + (1 - p) * 1)
    assert found.agreement == 0


def test_packed_rows_begin_where_positions_do_and_with_each_line():
    """The second line goes on with what the first began, and is a row of its own all the same."""
    batch = {
        "targets": torch.zeros(2, 3, dtype=torch.long),
        "position_ids": torch.tensor([[0, 1, 0], [1, 2, 0]]),
    }
    [row_N] = paired._rows_of(batch, [6])
    assert row_N.tolist() == [0, 0, 1, 2, 2, 3]


def test_rows_of_padding_beyond_the_vocabulary_are_left_out_of_the_divergence():
    first = torch.randn(2, 3, 5)
    second = torch.cat([first, torch.full((2, 3, 2), -20.0)], 2)
    found = told(first, second, [[1, 2, 3], [0, 1, 2]])
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_a_causal_model_against_its_own_logits():
    """Through `Scores` in chunks of the output layer; the reference asks transformers for all logits."""
    torch.manual_seed(0)
    first = AutoModelForCausalLM.from_pretrained(tuning.model("llama"), dtype=torch.float32).eval()
    second = changed(first)
    cores = []
    for model in (first, second):
        choose_heads(model, "causal")
        cores.append(core_of(model, objectives.make("clm")))
    ids = torch.randint(3, 500, (4, 17))
    batches = [
        {"input_ids": ids[:2, :-1], "targets": ids[:2, 1:], TARGETS: torch.tensor(32)},
        {"input_ids": ids[2:, :-1], "targets": ids[2:, 1:], TARGETS: torch.tensor(32)},
    ]
    found = compare_targets(*cores, batches)
    with torch.no_grad():
        logs = [functional.log_softmax(m(input_ids=ids[:, :-1]).logits.double(), -1) for m in (first, second)]
    nll = [-one.gather(2, ids[:, 1:, None]).squeeze(2) for one in logs]
    difference = (nll[1] - nll[0]).sum(1) / 16
    assert found.num_targets == 64
    assert found.nll_difference == pytest.approx(float(difference.mean()), abs=1e-5)
    assert found.error == pytest.approx(float(difference.std() / 2), rel=1e-3)  # four rows of equal length
    assert found.kl == pytest.approx(float((logs[0].exp() * (logs[0] - logs[1])).sum(2).mean()), rel=1e-3)
    assert found.kl > 1e-4
    assert found.agreement == pytest.approx(float((logs[0].argmax(2) == logs[1].argmax(2)).double().mean()))
    assert not first.training


def test_answers_are_two_targets_of_a_row():
    tokenizer = tuning.tokenizer_of("bert")
    torch.manual_seed(0)
    first = AutoModelForQuestionAnswering.from_pretrained(tuning.model("bert"), dtype=torch.float32).eval()
    second = changed(first)
    task = Answering(Answers(), Material(tokenizer, 64))
    texts = ["the dog lives in New York", "the red cat lives in Rome and walks"]
    rows = [
        {"question": "where?", "context": text, "answers": [{"text": text[17:21], "start": 17}]}
        for text in texts
    ]
    batch = task.collate([task.encode(row) for row in rows])
    found = compare_targets(core_of(first, task), core_of(second, task), [batch])
    nll = []
    for model in (first, second):
        with torch.no_grad():
            losses = task.loss(model, batch)
        nll.append(float(losses.total))
    assert (found.num_targets, found.num_rows) == (4, 2)
    assert found.nll_difference == pytest.approx((nll[1] - nll[0]) / 2, abs=1e-5)
    assert found.error is not None


def test_an_encoder_decoder_writes_nothing_meanwhile(monkeypatch):
    torch.manual_seed(0)
    first = AutoModelForSeq2SeqLM.from_pretrained(tuning.model("t5"), dtype=torch.float32).eval()
    choose_heads(first, "seq2seq")
    seen = []

    class Task:
        sums = ()

        def loss(self, model, batch, criterion):
            seen.append((model.training, any(part.training for part in model.children())))
            return Told().loss(Says(torch.ones(1, 1, 2)), batch, criterion)

    batch = {"rows": torch.tensor([0]), "targets": torch.tensor([[1]])}
    compare_targets(core_of(first, Task()), core_of(changed(first), Task()), [batch])
    assert seen == [(True, False)] * 2
    assert not first.training


def test_vectors_are_compared_by_their_cosine():
    tokenizer = tuning.tokenizer_of("bert")
    torch.manual_seed(0)
    first = AutoModel.from_pretrained(tuning.model("bert"), dtype=torch.float32).eval()
    second = changed(first)
    task = Embedding(Embeddings(), Material(tokenizer, 64, facts={"form": "pairs"}))
    rows = [{"anchor": "where is the cat?", "positive": "in Oslo"}, {"anchor": "a dog", "positive": "no"}]
    batch = task.collate([task.encode(row) for row in rows])
    found = compare_targets(core_of(first, task), core_of(second, task), [batch])
    with torch.no_grad():
        seen = [task.glimpse(model, batch) for model in (first, second)]
    cosines = [
        float(seen[0][side][row] @ seen[1][side][row]) for side in ("anchor", "document") for row in (0, 1)
    ]
    assert found.num_targets == 4
    assert found.cosine == pytest.approx(np.mean(cosines), abs=1e-5)
    assert found.cosine < 0.9999
    assert found.nll_difference is None


def test_numbers_are_compared_as_they_are():
    tokenizer = tuning.tokenizer_of("bert")
    torch.manual_seed(0)
    first = AutoModelForSequenceClassification.from_pretrained(
        tuning.model("bert"), num_labels=1, dtype=torch.float32
    ).eval()
    second = changed(first)
    task = Regression(Material(tokenizer, 64))
    batches = [
        task.collate([task.encode({"text": text, "label": 1.0}) for text in some])
        for some in (["a cat", "the red dog lives in Oslo"], ["no bird"])
    ]
    found = compare_targets(core_of(first, task), core_of(second, task), batches)
    said = []
    for model in (first, second):
        with torch.no_grad():
            said.append([value for batch in batches for value in task.loss(model, batch).found])
    assert found.num_targets == 3
    assert found.correlation == pytest.approx(np.corrcoef(*said)[0, 1])
    assert found.mean_absolute == pytest.approx(np.abs(np.subtract(*said)).mean())


def test_where_nothing_can_be_compared_it_says_so():
    class Silent:
        sums = ()

        def loss(self, model, batch, criterion):
            return Loss({TARGETS: torch.zeros(())})

    class Drawn(Told):
        def loss(self, model, batch, criterion):
            return super().loss(model, {**batch, "targets": torch.randint(0, 50, (1, 9))}, criterion)

    batch = {"rows": torch.tensor([0]), "targets": torch.tensor([[1] * 9])}
    silent = compare_targets(core_of(Says([[[0.0]]]), Silent()), core_of(Says([[[0.0]]]), Silent()), [batch])
    assert silent.to_dict() == {"num_targets": 0, "num_rows": 0, "why": silent.why}
    assert "no target" in silent.why
    logits = torch.zeros(1, 9, 50)
    drawn = compare_targets(core_of(Says(logits), Drawn()), core_of(Says(logits), Drawn()), [batch])
    assert "other targets" in drawn.why
