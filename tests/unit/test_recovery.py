"""Training that repairs a smaller model: zeros that stay, and a teacher for a task."""

import copy
import json
from pathlib import Path

import pytest
import torch
from sessions import Point, shared_server
from training import losses, same_bits, weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from tuning import finetune, folder_of, model, words

from llmkit.errors import UsageError
from llmkit.models.grid import Grid
from llmkit.objectives.base import NOT_LEARNED, TARGETS
from llmkit.objectives.cls import Classification
from llmkit.objectives.distil import Distilled
from llmkit.objectives.regression import Regression
from llmkit.optim import add_noise, averaged, hold_back, make_optimizer, mark_zeros, set_lr
from llmkit.recipe.objectives import Distil
from llmkit.recipe.training import Optim

OPTIMIZERS = ["adamw", "adam", "sgd", "adafactor", "lion", "muon", "adamw8bit", "schedule_free"]
FAMILIES = {
    "llama": {"num_attention_heads": 2, "intermediate_size": 48, "hidden_size": 32, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
}


def network(family="llama", seed=0, share=0.5, **fields):
    """A tiny decoder, and at its linear layers half of all numbers zero, in pairs of different places."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, vocab_size=60, **{**FAMILIES[family], **fields})
    made = AutoModelForCausalLM.from_config(config)
    for name, p in made.named_parameters():
        if is_pruned(name) and p.ndim == 2:
            with torch.no_grad():
                p.masked_fill_(torch.rand(p.shape) < share, 0.0)
    return made


def is_pruned(name):
    return "embed" not in name and "lm_head" not in name and "wte" not in name and "wpe" not in name


def zeros_of(model):
    return {
        name: p == 0
        for name, p in model.named_parameters()
        if is_pruned(name) and p.ndim == 2 and bool((p == 0).any())
    }


def learn(model, optimizer, steps, start=0):
    """Some steps as the loop makes them, on real gradients; noise comes after clipping."""
    ids = torch.randint(0, 60, (4, 12), generator=torch.Generator().manual_seed(5))
    for step in range(start, start + steps):
        model(input_ids=ids, labels=ids).loss.backward()
        hold_back(optimizer, step)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        add_noise(model, 0.01, seed=1, step=step)
        set_lr(optimizer, 0.02)
        optimizer.step()
        optimizer.zero_grad()
    return norm


# --- zeros ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_and_the_rest_learns(name, family):
    """With noise, L1, weight decay, momentum and an average: the weights and their average keep every zero."""
    made = network(family)
    before, zeros = copy.deepcopy(made.state_dict()), zeros_of(made)
    assert mark_zeros(made)[0] == sum(int(zero.sum()) for zero in zeros.values()) > 1000
    more = {"ema": 0.5} if name != "schedule_free" else {}
    optimizer = make_optimizer(made, Optim(name=name), l1=0.01, **more)
    learn(made, optimizer, 3)

    def check():
        for place, p in made.named_parameters():
            if place in zeros:
                assert not p[zeros[place]].any(), place
                moved = (p != before[place])[~zeros[place]].float().mean()
                assert moved > 0.9, (place, moved)

    check()
    with averaged(optimizer):
        check()
    tied = made.get_input_embeddings().weight
    assert (tied != before[next(n for n, p in made.named_parameters() if p is tied)]).any()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_a_mark_zeros_fill_up(name):
    made = network()
    zeros = zeros_of(made)
    learn(made, make_optimizer(made, Optim(name=name)), 2)
    filled = [float((p[zeros[n]] != 0).float().mean()) for n, p in made.named_parameters() if n in zeros]
    assert min(filled) > 0.9


def test_gradients_of_zeros_do_not_count_in_the_norm():
    """The norm that is clipped by is that of the numbers that learn."""
    made = network()
    zeros = zeros_of(made)
    mark_zeros(made)
    ids = torch.arange(24).reshape(2, 12)
    made(input_ids=ids, labels=ids).loss.backward()
    squares = [
        p.grad[~zeros[name]].square().sum() if name in zeros else p.grad.square().sum()
        for name, p in made.named_parameters()
    ]
    optimizer = make_optimizer(made, Optim())
    hold_back(optimizer, 0)
    found = torch.nn.utils.clip_grad_norm_(made.parameters(), 1e9)
    assert float(found) == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-6)


def test_embeddings_and_what_does_not_learn_are_never_marked():
    """A tied output layer is a linear layer too: the row of the padding token is zero and learns."""
    made = network(tie_word_embeddings=True, share=0.0)
    with torch.no_grad():
        made.get_input_embeddings().weight[0] = 0.0
        made.model.layers[0].mlp.up_proj.weight[0] = 0.0
        made.model.layers[1].mlp.up_proj.weight[0] = 0.0
    made.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 48) - 32 * 48
    assert mark_zeros(made) == (32, layers)


def pruned(folder, family="llama", share=0.5):
    """A model folder with zeros."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    kind = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    made = kind.from_pretrained(model(family))
    generator = torch.Generator().manual_seed(9)
    for name, p in made.named_parameters():
        if name.endswith("weight") and "layer" in name and p.ndim == 2:
            p.data.masked_fill_(torch.rand(p.shape, generator=generator) < share, 0.0)
    place = Path(folder) / f"pruned-{family}"
    made.save_pretrained(place)
    AutoTokenizer.from_pretrained(model(family)).save_pretrained(place)
    return str(place)


def test_a_run_keeps_the_zeros_of_the_model_it_starts_from(tmp_path):
    """Through the command's own code, with Muon and an average; without the setting they fill up."""
    from safetensors.numpy import load_file

    place = pruned(tmp_path)
    start = load_file(Path(place) / "model.safetensors")
    given = {
        "finetune__model": {"name": place, "context": 64},
        "finetune__train__optim": {"name": "muon", "lr": 1e-2},
    }
    kept = weights(
        finetune(tmp_path, "sft", "kept", finetune__train__keep_zeros=True, finetune__train__ema=0.5, **given)
    )
    free = weights(finetune(tmp_path, "sft", "free", **given))
    names = [name for name in start if "proj" in name]
    assert len(names) == 14
    for name in names:
        zero = start[name] == 0
        assert 0.4 < zero.mean() < 0.6
        assert not kept[name][zero].any()
        assert kept[name][~zero].all()
        assert (free[name][zero] != 0).mean() > 0.9


def test_keeping_zeros_where_there_are_none_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"none of the [\d,]+ weights of linear layers that learn is zero"):
        finetune(tmp_path, "cls", finetune__train__keep_zeros=True)


# --- rounded weights ------------------------------------------------------------------------------------------


def rewritten(folder, name, change):
    """A copy of the tiny llama with other weights of its blocks' linear layers."""
    from transformers import AutoTokenizer

    made = AutoModelForCausalLM.from_pretrained(model("llama"))
    for place, p in made.named_parameters():
        if "proj" in place:
            p.data.copy_(change(p.data))
    made.save_pretrained(Path(folder) / name)
    AutoTokenizer.from_pretrained(model("llama")).save_pretrained(Path(folder) / name)
    return str(Path(folder) / name)


def test_a_run_computes_with_rounded_weights_and_exports_fine_ones(tmp_path):
    """The first loss is that of a model whose weights were rounded before; the weights move by less than a step.

    The run proves itself first: what is saved is read back to the same logits.
    """
    grid = Grid(4, 32)
    plain = {
        "finetune__train__length": "3 steps",
        "finetune__train__optim": {"lr": 1e-5, "schedule": "constant"},
    }
    folders = {"fine": model("llama"), "before": rewritten(tmp_path, "before", grid.nearest)}
    runs = {
        name: finetune(
            tmp_path, "sft", name, finetune__model={"name": place, "context": 64, "dropout": 0.0}, **plain
        )
        for name, place in folders.items()
    }
    runs["while"] = finetune(
        tmp_path,
        "sft",
        "while",
        finetune__model={"name": model("llama"), "context": 64, "dropout": 0.0},
        finetune__train__quantized={"bits": 4},
        **plain,
    )
    first = {name: losses(folder)[1] for name, folder in runs.items()}
    assert first["while"] == pytest.approx(first["before"], abs=1e-6)
    assert abs(first["while"] - first["fine"]) > 1e-4
    start, found = AutoModelForCausalLM.from_pretrained(model("llama")).state_dict(), weights(runs["while"])
    for name in [name for name in found if "proj" in name]:
        moved = (torch.from_numpy(found[name]) - start[name]).abs()
        assert 1e-6 < float(moved.max()) < 1e-4, name
        assert float((torch.from_numpy(found[name]) - grid.nearest(start[name])).abs().max()) > 1e-3, name


def test_a_layer_that_cannot_be_rounded_in_groups_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"128"):
        finetune(tmp_path, "sft", finetune__train__quantized={"bits": 4, "group": 128})


# --- killed, and in several processes -------------------------------------------------------------------------


def wide_teacher(folder):
    """A fine-tuned classifier that is wider than the tiny one, so that states are compared through projections."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    place = Path(folder) / "wide"
    config = AutoConfig.from_pretrained(model("bert"), hidden_size=48, num_attention_heads=2)
    torch.manual_seed(4)
    AutoModelForMaskedLM.from_config(config).save_pretrained(place)
    AutoTokenizer.from_pretrained(model("bert")).save_pretrained(place)
    made = finetune(folder, "cls", "wide-teacher", finetune__model={"name": str(place), "context": 64})
    return str(made)


def ways(folder):
    """Task and settings of runs that repair a model."""
    zeros = {"keep_zeros": True, "ema": 0.5, "optim": {"name": "muon", "lr": 1e-2}}
    return {
        "zeros": ("sft", {"finetune__model__name": pruned(folder), **train(zeros)}),
        "rounded": ("sft", train({"quantized": {"bits": 8, "activations": True}})),
        "taught": (
            "cls",
            {"finetune__distil": {"teacher": wide_teacher(folder), "hidden": 1.0, "attention": 0.5}},
        ),
    }


def train(settings):
    return {f"finetune__train__{name}": value for name, value in settings.items()}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zeros", "rounded", "taught"])
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path, way):
    task, changes = ways(tmp_path)[way]
    server = shared_server()
    assert server.run(words(tmp_path, task, "whole", **changes)).code == 0
    killed = words(tmp_path, task, "killed", **changes)
    assert server.run(killed, Point("SIGKILL", "update", step=3)).code == -9
    ended = server.run(killed)
    assert ended.code == 0, ended.said
    assert "from step_00000002" in ended.said
    whole, resumed = folder_of(tmp_path, "whole"), folder_of(tmp_path, "killed")
    assert same_bits(weights(resumed), weights(whole))
    assert losses(resumed) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zeros", "rounded", "taught"])
def test_two_processes_learn_what_one_learns(tmp_path, way):
    task, changes = ways(tmp_path)[way]
    changes = {**changes, "finetune__model__dropout": 0.0}
    changes.setdefault("finetune__train__optim", {"lr": 1e-3, "eps": 1e-5})
    for name, more in (("one", ()), ("two", ("--processes", "2"))):
        ended = shared_server().run(words(tmp_path, task, name, *more, **changes))
        assert ended.code == 0, ended.said
    one, two = folder_of(tmp_path, "one"), folder_of(tmp_path, "two")
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)
    mine, its = weights(one), weights(two)
    for name in mine:
        assert abs(mine[name] - its[name]).max() < 2e-4, name
        if way == "zeros" and "proj" in name:
            assert ((mine[name] == 0) == (its[name] == 0)).all(), name
            assert (mine[name] == 0).mean() > 0.4, name


# --- a teacher for a task -------------------------------------------------------------------------------------


def classifier(seed, labels=3):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "bert", vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=labels,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


def bare(kind):
    """An objective without a tokenizer: only its loss is asked."""
    made = kind.__new__(kind)
    made._r_drop = 0.0
    return made


def batch():
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    targets = torch.tensor([0, 2, 1, NOT_LEARNED])
    return {"input_ids": ids, "attention_mask": mask, "targets": targets, TARGETS: torch.tensor(3)}


def test_a_classifier_s_loss_by_hand():
    """0.7 CE + 0.3 * 4 KL(teacher | student) at temperature 2, over the rows that have a label; and its gradient."""
    student, teacher, given = classifier(1), classifier(2).eval(), batch()
    settings = Distil(teacher="t", weight=0.3, temperature=2.0)
    objective = Distilled(bare(Classification), teacher, settings, "sequence")
    found = objective.loss(student.train(), given).total
    found.backward()
    mine = student.classifier.weight.grad.clone()
    student.zero_grad()
    names = ("input_ids", "attention_mask")
    ours = student(**{name: given[name] for name in names}).logits[:3]
    with torch.no_grad():
        taught = (teacher(**{name: given[name] for name in names}).logits[:3] / 2).softmax(1)
    apart = (taught * (taught.log() - (ours / 2).log_softmax(1))).sum() * 4
    expected = (
        0.7 * torch.nn.functional.cross_entropy(ours, given["targets"][:3], reduction="sum") + 0.3 * apart
    )
    expected.backward()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(mine, student.classifier.weight.grad, atol=1e-6)


def test_a_regression_s_loss_and_gradient_are_those_of_both_squared_distances():
    student, teacher = classifier(1, labels=1), classifier(2, labels=1).eval()
    given = {**batch(), "numbers": torch.tensor([1.0, -2.0, 0.5, 9.0])}
    given["targets"] = torch.tensor([0, 0, 0, NOT_LEARNED])
    objective = Distilled(bare(Regression), teacher, Distil(teacher="t", weight=0.25), "sequence")
    found = objective.loss(student.train(), given).total
    found.backward()
    mine = student.classifier.weight.grad.clone()
    student.zero_grad()
    names = ("input_ids", "attention_mask")
    said = student(**{name: given[name] for name in names}).logits[:3, 0]
    with torch.no_grad():
        taught = teacher(**{name: given[name] for name in names}).logits[:3, 0]
    expected = 0.75 * (said - given["numbers"][:3]).square().sum() + 0.25 * (said - taught).square().sum()
    expected.backward()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(mine, student.classifier.weight.grad, atol=1e-6)


def test_layers_of_a_classifier_are_compared_where_there_is_text():
    """The mean over both layers of the mean squared difference of states, at the 32 positions that are no padding."""
    student, teacher, given = classifier(1), classifier(2).eval(), batch()
    objective = Distilled(
        bare(Classification), teacher, Distil(teacher="t", weight=0.0, hidden=1.0), "sequence"
    )
    found = objective.loss(student.train(), given).totals["num_states"]
    names = ("input_ids", "attention_mask")
    states = [
        one(**{name: given[name] for name in names}, output_hidden_states=True).hidden_states[1:]
        for one in (student, teacher)
    ]
    where = given["attention_mask"].bool()
    assert int(where.sum()) == 32
    each = [(a - b).square().mean(-1)[where].sum() for a, b in zip(*states, strict=True)]
    assert float(found) == pytest.approx(float(sum(each) / 2), rel=1e-5)


TAUGHT = [
    "cls",
    "regression",
    *(pytest.param(task, marks=pytest.mark.slow) for task in ("tag", "qa", "seq2seq", "sft")),
]


@pytest.mark.parametrize("task", TAUGHT)
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(tmp_path, task):
    """A run from the teacher's weights begins with no loss at all; one from the base that both began as, with some.

    Layers are compared too, and what the task measures of rows is measured as ever.
    """
    plain = {"finetune__model__dropout": 0.0, "finetune__train__optim": {"lr": 3e-2}}
    teacher = finetune(tmp_path, task, "teacher", **plain)
    given = {
        **plain,
        "finetune__distil": {"teacher": str(teacher), "weight": 1.0, "hidden": 0.5},
        "finetune__train__length": "1 steps",
    }
    same = finetune(
        tmp_path,
        task,
        "same",
        **{**given, "finetune__model": {"name": str(teacher), "context": 64, "dropout": 0.0}},
    )
    base = finetune(tmp_path, task, "base", **given)
    objective = losses(same, "train/objective")[1] if losses(same, "train/objective") else 0.0
    assert abs(losses(same)[1]) < 1e-6
    assert abs(objective) < 1e-6
    assert losses(base)[1] > 1e-3
    assert losses(base, "train/objective")[1] > losses(base)[1] + 1e-3
    measured = [set(json.loads((folder / "report.json").read_text())["final"]) for folder in (teacher, same)]
    assert measured[0] == measured[1]
    assert len(measured[0]) > 2


def test_a_teacher_s_labels_are_taken_in_the_run_s_order(tmp_path):
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.train.teacher import load_task_teacher

    folder = finetune(tmp_path, "cls") / "model"
    labels = list(json.loads((folder / "config.json").read_text())["id2label"].values())
    tokenizer = load_tokenizer(str(folder))
    given = {"number": False, "context": 32}
    same = load_task_teacher(str(folder), "sequence", tokenizer, labels=labels, **given)
    turned = load_task_teacher(str(folder), "sequence", tokenizer, labels=labels[::-1], **given)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(same(input_ids=ids).logits.flip(1), turned(input_ids=ids).logits)
    with pytest.raises(UsageError, match=r"knows 5 labels, this run has 2; it does not know 'pink'"):
        load_task_teacher(str(folder), "sequence", tokenizer, labels=["red", "pink"], **given)
    with pytest.raises(UsageError, match=r"was not trained for this task: it lacks bert.pooler"):
        load_task_teacher(model("bert"), "sequence", tokenizer, labels=["LABEL_0", "LABEL_1"], **given)
    with pytest.raises(UsageError, match=r"reads at most 64 tokens, fewer than `context: 100`"):
        load_task_teacher(str(folder), "sequence", tokenizer, labels=labels, number=False, context=100)


def test_a_teacher_of_another_kind_is_refused_before_rows_are_read(tmp_path):
    with pytest.raises(UsageError, match=r"finetune.distil.teacher: .* 'cls' needs"):
        finetune(
            tmp_path, "cls", finetune__distil={"teacher": model("llama")}, finetune__data__files="nowhere.csv"
        )
