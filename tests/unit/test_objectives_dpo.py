"""Preferences: the losses against their formulas on transformers' own logits; what is cut; the model at first."""

import copy
import json
import math
import pickle

import pytest
import torch
from torch.nn import functional
from training import losses
from transformers import AutoModelForCausalLM, LlamaConfig
from tuning import content, finetune, model, tokenizer_of

from llmkit.data.chat import unshifted
from llmkit.errors import DataError
from llmkit.models.adapters import inject_adapter
from llmkit.models.attention import use_attention
from llmkit.models.heads import Scores, choose_heads
from llmkit.objectives.base import NOT_LEARNED, Material
from llmkit.objectives.dpo import build
from llmkit.recipe import load_recipe
from llmkit.recipe.parts import Adapter

ROWS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"] * (1 + number % 3)}],
    }
    for number, row in enumerate(map(json.loads, content("dpo", 5).splitlines()))
]


def task(context=64, **settings):
    """The task as a recipe with such settings of `dpo` makes it."""
    made = {
        "task": "dpo",
        "model": {"name": "m"},
        "data": {"files": "x"},
        "dpo": settings,
    }
    section = load_recipe({"llmkit": 1, "finetune": made}).recipe.finetune
    return build(section, Material(tokenizer_of("llama"), context))


def network(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer_of("llama")),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    use_attention(made, "sdpa", isolate=False)
    choose_heads(made, "causal")
    return made


def answers_of(net, objective, row):
    """Of each answer the sum of its tokens' log-probabilities by transformers' logits, and how many they are."""
    found = []
    for ids, targets in objective.texts(objective.encode(row)).values():
        at = torch.from_numpy(targets != NOT_LEARNED)
        logits = net(input_ids=torch.from_numpy(ids)[None]).logits[0].log_softmax(1)
        each = logits[:-1].gather(1, torch.from_numpy(ids)[1:, None]).squeeze(1)
        found += [each[at[1:]].sum(), int(at.sum())]
    return found


def by_hand(loss, beta, policy, reference, *, smoothing=0.0, margin=1.0):
    """A pair's loss by the formula of its paper, term by term."""
    chosen, len_c, rejected, len_r = policy
    if reference is not None:
        chosen_r, _, rejected_r, _ = reference
    if loss == "dpo":
        z = beta * ((chosen - chosen_r) - (rejected - rejected_r))
        return -(1 - smoothing) * functional.logsigmoid(z) - smoothing * functional.logsigmoid(-z)
    if loss == "ipo":
        h = (chosen - chosen_r) / len_c - (rejected - rejected_r) / len_r
        return (h - 1 / (2 * beta)) ** 2
    if loss == "simpo":
        return -functional.logsigmoid(beta * chosen / len_c - beta * rejected / len_r - margin)
    p, q = (chosen / len_c).exp(), (rejected / len_r).exp()
    return -beta * functional.logsigmoid((p / (1 - p)).log() - (q / (1 - q)).log())


@pytest.mark.parametrize(
    ("loss", "beta", "smoothing"),
    [("dpo", 0.1, 0.0), ("dpo", 0.5, 0.2), ("ipo", 0.1, 0.0), ("simpo", 2.0, 0.0), ("orpo", 0.1, 0.0)],
)
def test_losses_and_gradients_are_those_of_the_formulas(loss, beta, smoothing):
    objective = task(loss=loss, beta=beta, label_smoothing=smoothing)
    net, first = network(1), network(2)
    if objective.needs_reference:
        objective.refer(first)
    batch = objective.collate([objective.encode(row) for row in ROWS])
    found = objective.loss(net, batch)
    counts = {name: int(value) for name, value in batch.items() if name.startswith("num_")}
    ours = found.mean(counts)
    ours.backward()
    mine = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    policy = [answers_of(net, objective, row) for row in ROWS]
    with torch.no_grad():
        asked = [answers_of(first, objective, row) for row in ROWS]
    reference = asked if objective.needs_reference else [None] * len(ROWS)
    each = [by_hand(loss, beta, *pair, smoothing=smoothing) for pair in zip(policy, reference, strict=True)]
    expected = sum(each) / len(each)
    if loss == "orpo":  # and the mean over tokens of the chosen answers
        expected = expected - sum(pair[0] for pair in policy) / sum(pair[1] for pair in policy)
    expected.backward()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, p in net.named_parameters():
        assert torch.allclose(mine[name], p.grad, atol=1e-5, rtol=1e-3), name


def test_a_small_example_by_hand():
    """Chosen 1 nat likelier than at first, rejected 3 nats less likely: by beta 0.1 a difference of 0.4."""
    objective = task()
    log_probs, asked = torch.tensor([-4.0, -9.0]), torch.tensor([-5.0, -6.0])
    lengths = torch.tensor([2, 3])
    rewards = objective._rewards(log_probs, asked, lengths)
    assert rewards.tolist() == pytest.approx([0.1, -0.3])
    assert objective._losses(rewards[:1] - rewards[1:]).item() == pytest.approx(math.log(1 + math.exp(-0.4)))
    ipo = task(loss="ipo")  # 1/2 - (-3/3) = 1.5 per token; (1.5 - 5)^2
    rewards = ipo._rewards(log_probs, asked, lengths)
    assert ipo._losses(rewards[:1] - rewards[1:]).item() == pytest.approx(12.25)
    simpo = task(loss="simpo")  # 2 * (-2) - 2 * (-3) - 1 = 1
    rewards = simpo._rewards(log_probs, None, lengths)
    assert simpo._losses(rewards[:1] - rewards[1:]).item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_how_pairs_are_grouped_changes_nothing():
    objective = task()
    objective.refer(network(2))
    net = network(1)
    examples = [objective.encode(row) for row in ROWS]
    with torch.no_grad():
        found = [
            objective.loss(net, objective.collate(part)) for part in (examples, examples[:2], examples[2:])
        ]
    assert found[0].total.item() == pytest.approx((found[1].total + found[2].total).item(), rel=1e-5)
    for name in ("correct", "margin", "chosen", "rejected"):
        whole, *parts = (float(loss.sums[name]) for loss in found)
        assert whole == pytest.approx(sum(parts), rel=1e-4)


def test_metrics_say_which_answer_is_worth_more():
    objective = task()
    objective.refer(network(1))
    net = network(1)
    batch = objective.collate([objective.encode(row) for row in ROWS])
    with torch.no_grad():
        start = objective.loss(net, batch)
    sums = {name: float(value) for name, value in start.sums.items()}
    metrics = objective.summarise(
        {**sums, "total": float(start.total), "num_targets": float(batch["num_targets"])}
    )
    # The model as it was at first: every pair is a tie.
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["accuracy"] == 0.5
    assert metrics["margin"] == pytest.approx(0, abs=1e-5)


def test_the_model_without_its_adapter_is_the_one_at_first():
    objective, other = task(), task()
    net = network(1)
    first = copy.deepcopy(net)
    inject_adapter(net, Adapter(rank=4), seed=3)
    torch.manual_seed(5)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    other.refer(first)
    net.train()
    batch = objective.collate([objective.encode(row) for row in ROWS])
    ours, theirs = objective.loss(net, batch), other.loss(net, batch)
    assert ours.total.item() == pytest.approx(theirs.total.item(), rel=1e-5)
    assert ours.total.item() != pytest.approx(len(ROWS) * math.log(2), rel=1e-3)
    ours.total.backward()
    learned = {name for name, p in net.named_parameters() if p.grad is not None}
    assert learned == {name for name, p in net.named_parameters() if "lora" in name}
    assert net.training
    assert all(module.training for module in net.modules())


def test_chunks_of_logits_have_the_gradient_of_all():
    torch.manual_seed(0)
    features, weight = torch.randn(1200, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(0, 30, (1200,))
    targets[::3] = NOT_LEARNED
    sign = torch.randn(1200)
    (Scores(features, weight).log_probs(targets) * sign).sum().backward()
    mine = [features.grad.clone(), weight.grad.clone()]
    features.grad = weight.grad = None
    each = functional.cross_entropy(features @ weight.T, targets, reduction="none", ignore_index=NOT_LEARNED)
    (-each * sign).sum().backward()
    for ours, theirs in zip(mine, (features.grad, weight.grad), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    features.grad = weight.grad = None
    # Nothing to learn: zeros, but of every weight, lest another process wait for it.
    Scores(features, weight).log_probs(torch.full((1200,), NOT_LEARNED)).sum().backward()
    assert not features.grad.any()
    assert not weight.grad.any()


# --- what is cut --------------------------------------------------------------------------------------------------


LONG = {
    "prompt": [
        {"role": "user", "content": "the red cat lives in Rome " * 5},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "which one?"},
    ],
    "chosen": [{"role": "assistant", "content": "the red one"}],
    "rejected": [{"role": "assistant", "content": "the red one and walks on and on and on and on"}],
}


def test_the_prompt_is_cut_once_for_both_answers():
    whole = task(context=200).encode(LONG)
    length = len(whole["ids_chosen"]) + 4  # room for the chosen answer, not for the rejected one
    objective = task(context=length)
    texts = objective.texts(objective.encode(LONG))
    prompts = [ids[targets == NOT_LEARNED].tolist() for ids, targets in texts.values()]
    assert prompts[0] == prompts[1]
    tokenizer = tokenizer_of("llama")
    assert tokenizer.decode(prompts[0]) == "<|im_start|>user\nwhich one?<|im_end|>\n<|im_start|>assistant\n"
    kept = sum(len(ids) for ids, _ in texts.values())
    total = sum(len(ids) for ids, _ in task(context=200).texts(whole).values())
    assert int(objective.encode(LONG)["cut"]) == total - kept
    assert int(whole["cut"]) == 0


def test_only_the_answers_are_learned_each_with_its_end():
    tokenizer = tokenizer_of("llama")
    for (ids, targets), side in zip(
        task().texts(task().encode(LONG)).values(), ("chosen", "rejected"), strict=True
    ):
        assert tokenizer.decode(targets[targets != NOT_LEARNED]) == LONG[side][0]["content"] + "<|im_end|>"
        assert ids[targets != NOT_LEARNED].tolist() == targets[targets != NOT_LEARNED].tolist()


def test_a_pair_of_which_one_answer_is_cut_off_counts_as_none():
    objective = task(context=12)
    short, long = ROWS[0], {**LONG, "prompt": [{"role": "user", "content": "red cat " * 20}]}
    batch = objective.collate([objective.encode(long), objective.encode(long)])
    assert int(batch["num_targets"]) == 0
    objective.refer(network(2))
    found = objective.loss(network(1), batch)
    assert found.total.item() == 0
    found.total.backward()  # an empty share of a step still has gradients: zeros
    assert int(task().collate([task().encode(short), task().encode(long)])["num_targets"]) in (1, 2)


def test_answers_of_several_turns_are_learned_whole():
    tokenizer = tokenizer_of("llama")
    more = [
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "blue"},
    ]
    objective = task(context=200)  # the assistant's turn in the prompt stays, and is not learned
    texts = objective.texts(objective.encode({**LONG, "chosen": more}))
    _, targets = texts["chosen"]
    assert tokenizer.decode(targets[targets != NOT_LEARNED]) == "red<|im_end|>blue<|im_end|>"


def test_rows_with_one_answer_are_refused():
    with pytest.raises(DataError, match="KTO"):
        task().encode({"prompt": LONG["prompt"], "completion": LONG["chosen"], "label": True})


# --- whole runs ---------------------------------------------------------------------------------------------------


def test_a_run_prefers_what_is_chosen_and_leaves_the_reference_alone(tmp_path):
    run = finetune(tmp_path, "dpo", finetune__model__dropout=0.0)
    first = losses(run)[1]
    accuracy, margin = (losses(run, f"eval/{name}") for name in ("accuracy", "margin"))
    assert first == pytest.approx(math.log(2), rel=1e-4)
    assert (accuracy[0], accuracy[6]) == (0.5, 1.0)
    assert margin[6] > 0.1
    plan = json.loads((run / "plan.json").read_text())
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model("llama")).parameters())
    assert (plan["memory"]["weights"], plan["memory"]["teacher"]) == (4 * parameters, 4 * parameters)
    # What is exported is the one model.
    tensors = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    assert not any("reference" in name for name in tensors)


def test_loader_processes_get_the_task_without_the_model():
    objective = task()
    alone = len(pickle.dumps(objective))
    objective.refer(network(1))
    assert len(pickle.dumps(objective)) == alone
    again = pickle.loads(pickle.dumps(objective))
    assert again._reference == []
    ids, targets = unshifted(*(again.encode(ROWS[0])[name] for name in ("ids_chosen", "targets_chosen")))
    assert len(ids) == len(targets)
