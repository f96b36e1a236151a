"""One process and many, whatever they share: the same losses, the same gradient norms, the same weights.

With dropout, but for attention under `tensor`, where each process draws the masks of its own heads.
"""

import os

import pytest
from layouts import (
    ALONE,
    DDP2,
    DDP4,
    DDP_TP4,
    EP2,
    FSDP2,
    FSDP4,
    FSDP_EP4,
    FSDP_TP4,
    HSDP4,
    LLAMA,
    MIXTRAL,
    QWEN_MOE,
    SHORT,
    TP2,
    apart,
    farthest,
    figures,
    named,
    train,
)
from training import same_bits, weights

from llmkit.train import trial

LOSS, WEIGHTS = 1e-5, 5e-3
"""The most that losses differ, in nats; and weights, as a share of the largest of their tensor: AdamW makes a full step
of a gradient that is hardly more than rounding."""
KEYS = ("train/loss", "eval/loss", "train/grad_norm")
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
NO_DROPOUT = {"pretrain__model__dropout": 0.0}
UNTIED = {**LLAMA, "tie_word_embeddings": False}
"""Its output layer decays as the split layers do, and is whole."""
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 8}
"""With norms of single heads, which all heads share: their gradients are sums over processes."""
MLM = {"pretrain__objective": "mlm", "pretrain__model__config": BERT, "pretrain__prompts": []}


def slow(*values, id):
    """A cell for `make test-distributed`."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def same_run(ours, theirs, loss=LOSS, weight=WEIGHTS):
    """The same figures and the same model, to rounding; `pytest -rP` shows how far apart they are."""
    found = {key: farthest(figures(ours, key), figures(theirs, key)) for key in KEYS}
    found["weights"] = apart(moved(ours), moved(theirs))
    print(", ".join(f"{key} {value:.1e}" for key, value in found.items()))  # noqa: T201 - for -rP
    for key in KEYS:
        assert found[key] < loss, key
    assert found["weights"] < weight


def moved(folder):
    """The weights but for the biases of keys, which attention does not see: their gradient is rounding alone."""
    return {name: tensor for name, tensor in weights(folder).items() if not name.endswith("key.bias")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One corpus and one tokenizer for all."""
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def alone(place):
    """The run of a single process, made once for each recipe."""
    known = {}

    def run(task=None, **changes):
        key = repr((task, sorted(changes.items())))
        if key not in known:
            known[key] = train(place, ALONE, task, name=f"alone-{len(known)}", **changes)
        return known[key]

    return run


PRETRAINED = [
    pytest.param(FSDP2, {}, id="fsdp2"),
    pytest.param(TP2, NO_DROPOUT, id="tensor2"),
    slow(DDP2, {}, id="ddp2"),
    slow(DDP4, {}, id="ddp4"),
    slow(FSDP4, {}, id="fsdp4"),
    slow(HSDP4, {}, id="hsdp2x2"),
    slow(FSDP_TP4, NO_DROPOUT, id="fsdp2-tensor2"),
    slow(DDP_TP4, NO_DROPOUT, id="ddp2-tensor2"),
    slow(FSDP_TP4, {**NO_DROPOUT, "pretrain__model__config": QWEN}, id="fsdp2-tensor2-qwen3"),
    slow(FSDP2, MLM, id="fsdp2-mlm"),
    slow(HSDP4, MLM, id="hsdp2x2-mlm"),
    slow(DDP2, MLM, id="ddp2-mlm"),
    slow(FSDP2, {"machine__recompute": "full"}, id="fsdp2-full"),
    slow(TP2, {**NO_DROPOUT, "pretrain__model__config": UNTIED}, id="tensor2-untied"),
    slow(FSDP_TP4, {**NO_DROPOUT, "pretrain__model__config": UNTIED}, id="fsdp2-tensor2-untied"),
    slow(EP2, {"pretrain__model__config": MIXTRAL}, id="expert2-mixtral"),
    slow(FSDP_EP4, {"pretrain__model__config": MIXTRAL}, id="fsdp2-expert2-mixtral"),
    slow(FSDP_EP4, {"pretrain__model__config": QWEN_MOE}, id="fsdp2-expert2-qwen3_moe"),
    slow(EP2, {"pretrain__model__config": MIXTRAL, "machine__recompute": "full"}, id="expert2-full"),
    slow(FSDP_TP4, {**NO_DROPOUT, "machine__recompute": "selective"}, id="fsdp2-tensor2-selective"),
]


@pytest.mark.parametrize(("layout", "changes"), PRETRAINED)
def test_many_processes_pretrain_as_one(place, alone, layout, changes):
    name = f"{named(layout)}-{len(changes)}"
    settings = {**SHORT, **changes}
    same_run(train(place, layout, name=name, fresh=True, **settings), alone(**settings))


PLAIN = {"finetune__model__dropout": 0.0}
"""Rows of many lengths: another number of processes makes other micro-batches of them, which draw other masks."""
LORA = {"finetune__adapter": {"rank": 4}}
TUNED = [
    slow(DDP2, "cls", {}, id="ddp2-cls"),
    slow(FSDP2, "cls", {}, id="fsdp2-cls"),
    slow(HSDP4, "cls", PLAIN, id="hsdp2x2-cls"),
    *(slow(layout, "sft", PLAIN, id=f"{named(layout)}-sft") for layout in (DDP2, FSDP2, HSDP4)),
    *(slow(layout, "sft", PLAIN | LORA, id=f"{named(layout)}-sft-lora") for layout in (DDP2, FSDP2, HSDP4)),
]


@pytest.mark.parametrize(("layout", "task", "changes"), TUNED)
def test_many_processes_finetune_as_one(place, alone, layout, task, changes):
    name = f"{named(layout)}-{task}-{len(changes)}"
    same_run(train(place, layout, task, name=name, fresh=True, **changes), alone(task, **changes))


@pytest.mark.parametrize("how", ["full", "selective"])
def test_what_is_computed_again_is_the_same_to_the_last_bit(place, alone, how):
    """Dropout's masks among it."""
    kept, again = alone(**SHORT), alone(**SHORT, machine__recompute=how)
    assert figures(kept, "train/loss") == figures(again, "train/loss")
    assert same_bits(weights(kept), weights(again))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [FSDP2, TP2], ids=named)
def test_shared_layers_are_computed_again_to_the_last_bit(place, layout):
    """Under `tensor` with the masks of one's own heads, drawn once more."""
    kept, again = (
        train(place, layout, name=f"{named(layout)}-{how}", **SHORT, machine__recompute=how)
        for how in ("none", "full")
    )
    assert figures(kept, "train/loss") == figures(again, "train/loss")
    assert same_bits(weights(kept), weights(again))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [FSDP2, FSDP_TP4], ids=named)
def test_blocks_gathered_in_bf16_learn_the_same_to_its_rounding(place, alone, layout):
    settings = {**SHORT, **NO_DROPOUT, "machine__precision": "bf16"}
    found, expected = train(place, layout, name=f"{named(layout)}-bf16", **settings), alone(**settings)
    assert farthest(figures(found, "train/loss"), figures(expected, "train/loss")) < 1e-3
    assert farthest(figures(found, "eval/loss"), figures(expected, "eval/loss")) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("short", ["0", "1"])
def test_processes_with_other_amounts_of_memory_try_sizes_together(place, alone, monkeypatch, short):
    """The plan fits into one's memory and not into the other's: either both try, or they wait for each other."""
    memory = {True: 10**5, False: 10**13}
    monkeypatch.setattr(trial, "usable_memory", lambda: memory[os.environ.get("RANK") == short])
    auto = {**SHORT, **NO_DROPOUT, "machine__micro_batch": "auto"}
    found = train(place, DDP2, name=f"short-{short}", fresh=True, **auto)
    same_run(found, alone(**SHORT, **NO_DROPOUT))
