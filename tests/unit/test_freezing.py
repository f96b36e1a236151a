"""What learns: layers counted, patterns, rates that fall with depth, thawing; and checkpoints of a part of a model."""

import copy

import pytest
import torch
from adapting import MODELS, bert, gpt2, ids, llama, logits, scrambled, t5
from safetensors.torch import load_file
from transformers import BertForMaskedLM, ElectraConfig, ElectraForTokenClassification

from llmkit.errors import RunError, UsageError
from llmkit.models.adapters import inject_adapter
from llmkit.models.freezing import (
    Counts,
    Depth,
    apply_freezing,
    count_learning,
    depths_of,
    describe_thawing,
    frozen_hash,
    paces_of,
)
from llmkit.models.recurrent import RecurrentForCausalLM
from llmkit.optim import describe_groups, hold_back, make_optimizer, set_lr
from llmkit.recipe.parts import Adapter, Freeze, Unfreeze
from llmkit.recipe.training import Group, Optim
from llmkit.train.checkpoint import Checkpoints
from llmkit.train.state import TrainState


def at(model):
    """(layer, below the head) -> the parts of names that all its parameters begin with, up to the first number."""
    found = {}
    for name, depth in depths_of(model).items():
        found.setdefault((depth.layer, depth.below_head), set()).add(name)
    return found


def starts(names, *wanted):
    return all(any(name.startswith(w) for w in wanted) for name in names) and all(
        any(name.startswith(w) for name in names) for w in wanted
    )


def test_layers_of_an_encoder_with_a_head():
    found = at(bert())
    assert starts(
        found[0, 3], "bert.embeddings.word_embeddings", "bert.embeddings.LayerNorm", "bert.embeddings."
    )
    assert starts(found[1, 2], "bert.encoder.layer.0.")
    assert starts(found[2, 1], "bert.encoder.layer.1.")
    assert starts(found[3, 0], "bert.pooler.dense", "classifier")
    assert len(found) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_layers_of_a_decoder_and_its_head_if_it_has_one_of_its_own(tied):
    found = at(llama(layers=3, tied=tied))
    assert found[0, 4] == {"model.embed_tokens.weight"}
    assert starts(found[2, 2], "model.layers.1.")
    assert starts(found[3, 1], "model.layers.2.", "model.norm.weight")
    assert found.get((4, 0)) == (None if tied else {"lm_head.weight"})


def test_layers_of_an_encoder_decoder_count_from_the_bottom_and_to_the_top_of_each_side():
    found = at(t5(layers=2))  # and three in the decoder
    assert found[0, 4] == {"shared.weight"}
    assert starts(found[1, 2], "encoder.block.0.")
    assert starts(found[1, 3], "decoder.block.0.")
    assert starts(found[2, 1], "encoder.block.1.")
    assert starts(found[3, 1], "decoder.block.2.", "encoder.final_layer_norm", "decoder.final_layer_norm")


def test_layers_of_other_families():
    assert starts(at(gpt2())[0, 3], "transformer.wte", "transformer.wpe")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    electra = at(ElectraForTokenClassification(ElectraConfig(vocab_size=40, embedding_size=8, **sizes)))
    assert starts(electra[0, 3], "electra.embeddings.", "electra.embeddings_project")
    assert starts(electra[3, 0], "classifier")
    masked = at(BertForMaskedLM(bert().config))
    assert "bert.embeddings.word_embeddings.weight" in masked[0, 3]
    assert starts(masked[3, 0], "cls.predictions.")


def frozen(model, **settings):
    apply_freezing(model, Freeze(**settings))
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_freezing_the_lowest_layers():
    assert starts(frozen(bert(), layers=1), "bert.embeddings.", "bert.encoder.layer.0.")
    assert starts(frozen(bert(), layers=0), "bert.embeddings.")
    stays = frozen(t5(layers=2), layers=2)
    assert starts(stays, "shared", *(f"{side}.block.{i}." for side in ("encoder", "decoder") for i in (0, 1)))


def test_freezing_by_names():
    assert frozen(llama(), match="q_proj|*norm") == {
        *(f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)),
        *(f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")),
        "model.norm.weight",
    }
    assert starts(frozen(bert(), match="head"), "bert.pooler", "classifier")


def test_freezing_all_but_some():
    model = bert()
    counts = apply_freezing(model, Freeze(all_but="head"))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {
        f"{part}.{kind}" for part in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")
    }
    assert counts == Counts(16 * 16 + 16 + 3 * 16 + 3, counts.frozen)
    assert counts.trained + counts.frozen == sum(p.numel() for p in model.parameters())
    assert 0 < counts.share < 0.1
    only_biases = frozen(bert(), all_but="bias")
    assert only_biases == {name for name, _ in bert().named_parameters() if not name.endswith(".bias")}


def test_a_head_can_be_kept_where_layers_cannot_be_told_apart():
    from llmkit.models.configs import RecurrentConfig

    config = RecurrentConfig(vocab_size=40, hidden_size=8, num_hidden_layers=2, tie_word_embeddings=False)
    model = RecurrentForCausalLM(config)
    stays = frozen(model, all_but="head")
    assert {name for name, _ in model.named_parameters()} - stays == {"lm_head.weight"}
    with pytest.raises(UsageError, match="no layers that could be told apart"):
        frozen(model, layers=1)


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (bert, {"layers": 3}, "freeze.layers is 3, and this bert has 2 layers"),
        (t5, {"layers": 3}, "has 2 layers on one side"),
        (llama, {"match": "q_proj|v_porj"}, "freeze.match: 'v_porj' matches no parameter"),
        (llama, {"match": "model|lm_head"}, "nothing is left to learn"),
        (lambda: llama(tied=True), {"all_but": "head"}, "this llama has no head of its own"),
    ],
)
def test_freezing_that_makes_no_sense(make, settings, words):
    with pytest.raises(UsageError, match=words.replace("|", r"\|")):
        frozen(make(), **settings)


def trained(model, steps=3, spec=None, **paces):
    """Real steps; the model, its optimizer, and what it was at the beginning."""
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, spec or Optim(), paces=paces_of(model, **paces) if paces else None)
    run(model, optimizer, 0, steps)
    return optimizer, before


def run(model, optimizer, start, stop):
    model.train()
    for step in range(start, stop):
        torch.manual_seed(step)
        model(input_ids=ids(), **wanted(model)).loss.backward()
        hold_back(optimizer, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_lr(optimizer, 1e-2)
        optimizer.step()
        optimizer.zero_grad()


def wanted(model):
    return (
        {"labels": torch.tensor([0, 2, 1])} if "Classification" in type(model).__name__ else {"labels": ids()}
    )


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bert", {"layers": 1}),
        ("bert", {"all_but": "head"}),
        ("llama", {"match": "embed*|mlp"}),
        ("t5", {"layers": 1}),
        ("gpt2", {"layers": 0}),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_frozen_is_the_same_to_the_last_bit_and_all_else_learns(kind, settings, optimizer):
    model = MODELS[kind]()
    stays = frozen(model, **settings)
    made, before = trained(model, spec=Optim(name=optimizer, weight_decay=0.5))
    tied = {name for name in model.state_dict() if name not in dict(model.named_parameters())}
    assert changed(model, before) - tied == {name for name, _ in model.named_parameters()} - stays
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(model.parameters())) - len(
        stays
    )


def test_under_an_adapter_the_base_is_the_same_to_the_last_bit():
    model = bert()
    inject_adapter(model, Adapter(rank=2), seed=0, new=["classifier"])
    _, before = trained(model, spec=Optim(weight_decay=0.5))
    learned = changed(model, before)
    assert learned
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in learned)


def test_rates_fall_with_depth():
    model = llama(layers=3)
    optimizer, _ = trained(model, steps=0, lr_decay=0.5)
    set_lr(optimizer, 0.8)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates["lm_head.weight"] == 0.8
    assert rates["model.norm.weight"] == rates["model.layers.2.mlp.up_proj.weight"] == 0.4
    assert rates["model.layers.1.self_attn.q_proj.weight"] == 0.2
    assert rates["model.layers.0.input_layernorm.weight"] == 0.1
    assert rates["model.embed_tokens.weight"] == 0.05


def test_rates_by_depth_multiply_those_of_groups_and_stay_apart_by_decay():
    model = llama()
    spec = Optim(groups=[Group(match="mlp", lr_ratio=0.1)], weight_decay=0.2)
    optimizer, _ = trained(model, steps=0, spec=spec, lr_decay=0.5)
    found = {(g["match"], g["weight_decay"], g["lr_ratio"]): len(g["params"]) for g in optimizer.param_groups}
    assert found == {
        (None, 0.2, 1.0): 1,  # the head
        (None, 0.2, 0.5): 4,  # attention of the top layer
        (None, 0.2, 0.25): 4,
        (None, 0.0, 0.5): 3,  # two norms and the last one
        (None, 0.0, 0.25): 2,
        (None, 0.0, 0.125): 1,  # the embeddings
        ("mlp", 0.2, 0.05): 3,
        ("mlp", 0.2, 0.025): 3,
    }


def test_rates_by_depth_reach_adapters():
    model = llama()
    inject_adapter(model, Adapter(rank=2), seed=0)
    paces = paces_of(model, lr_decay=0.5)
    found = {name: paces[id(p)].lr_ratio for name, p in model.named_parameters() if p.requires_grad}
    assert {ratio for name, ratio in found.items() if "layers.1." in name} == {0.5}
    assert {ratio for name, ratio in found.items() if "layers.0." in name} == {0.25}


THAW = {"unfreeze": Unfreeze(), "every": 2}


def steps_of(model, **settings):
    paces = paces_of(model, **{**THAW, **settings})
    return {name: paces[id(p)].from_step for name, p in model.named_parameters()}


def test_layers_thaw_from_the_top():
    found = steps_of(llama(layers=3))
    assert found["lm_head.weight"] == 0
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"] for i in (2, 1, 0)] == [2, 4, 6]
    assert (found["model.norm.weight"], found["model.embed_tokens.weight"]) == (2, 8)
    by_two = steps_of(llama(layers=3), unfreeze=Unfreeze(layers=2, start=1), every=5)
    assert [by_two[f"model.layers.{i}.mlp.up_proj.weight"] for i in (2, 1, 0)] == [0, 5, 5]
    assert by_two["model.embed_tokens.weight"] == 10


def test_what_waits_stays_the_same_to_the_last_bit_and_then_learns():
    model = llama(layers=2)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, Optim(weight_decay=0.5), paces=paces_of(model, **THAW))
    for stop, parts in (
        (2, ["lm_head"]),
        (4, ["layers.1.", "model.norm"]),
        (6, ["layers.0."]),
        (8, ["embed"]),
    ):
        waiting = {n: p.clone() for n, p in model.named_parameters() if steps_of(model)[n] >= stop}
        run(model, optimizer, stop - 2, stop)
        moved = changed(model, before)
        assert moved == {name for name, step in steps_of(model).items() if step < stop}
        assert all(torch.equal(model.get_parameter(name), value) for name, value in waiting.items())
        assert all(any(part in name for name in moved) for part in parts)
    counted = {float(s["step"]) for s in optimizer.state.values()}
    assert counted == {8.0, 6.0, 4.0, 2.0}  # each has its own count, so its own bias correction


def test_what_waits_is_not_in_the_norm_that_is_clipped():
    model, head = llama(), llama()
    optimizer = make_optimizer(model, Optim(), paces=paces_of(model, **THAW))
    apply_freezing(head, Freeze(all_but="lm_head"))
    for one in (model, head):
        one(input_ids=ids(), labels=ids()).loss.backward()
    hold_back(optimizer, 0)
    norms = [torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0) for one in (model, head)]
    assert norms[0] == norms[1]


def test_groups_say_when_they_begin():
    model = llama()
    lines = describe_groups(make_optimizer(model, Optim(), paces=paces_of(model, lr_decay=0.5, **THAW)))
    assert any("0.5 x lr" in line and "from step 2" in line for line in lines)


def test_thawing_in_words():
    assert list(describe_thawing(llama(layers=3), Unfreeze(start=1), 10, num_steps=25)) == [
        "from step 0: the head, layer 3",
        "from step 10: layer 2",
        "from step 20: layer 1",
        "never in these 25 steps: the embeddings",
    ]


def checkpoints(folder, model):
    return Checkpoints(folder, identity={"base": frozen_hash(model)})


def write(folder, model, optimizer, step, skipped=0):
    made = checkpoints(folder, model)
    on_host = ({k: v.clone() for k, v in tensors.items()} for tensors in made.tensors(model, optimizer))
    return made.write(*on_host, TrainState(step=step, skipped=skipped))


@pytest.mark.parametrize(
    "name", ["adamw", "adam", "sgd", "adafactor", "lion", "muon", "adamw8bit", "schedule_free"]
)
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_thawing_run_goes_on_to_the_same_bits(tmp_path, name, step):
    spec, whole = Optim(name=name), llama(tied=True)
    optimizer, _ = trained(whole, 7, spec, **THAW)
    model = llama(tied=True)
    optimizer, _ = trained(model, step, spec, **THAW)
    path = write(tmp_path, model, optimizer, step)
    second = scrambled(llama(tied=True), only="")
    again, _ = trained(second, 0, spec, **THAW)
    assert checkpoints(tmp_path, second).load(path, second, again).step == step
    run(second, again, step, 7)
    assert not changed(second, whole.state_dict())


def test_a_moment_that_should_be_there_and_is_not_is_an_error(tmp_path):
    model = llama()
    optimizer, _ = trained(model, 3, **THAW)
    late = model.get_parameter("model.norm.weight")  # learns from step 2 on
    del optimizer.state[late]
    path = write(tmp_path / "a", model, optimizer, 3)
    with pytest.raises(RunError, match="missing"):
        checkpoints(tmp_path / "a", model).load(
            path, model, make_optimizer(model, Optim(), paces=paces_of(model, **THAW))
        )
    path = write(
        tmp_path / "b", model, optimizer, 3, skipped=1
    )  # step 2 may have been the one that was skipped
    checkpoints(tmp_path / "b", model).load(
        path, model, make_optimizer(model, Optim(), paces=paces_of(model, **THAW))
    )


def test_a_checkpoint_holds_only_what_learns_and_fills_a_base_built_anew(tmp_path):
    def made():
        model = bert()
        inject_adapter(model, Adapter(rank=2), seed=0, new=["classifier"])
        return model

    model = made()
    optimizer, _ = trained(model)
    path = write(tmp_path, model, optimizer, 3)
    tensors = load_file(path / "model.safetensors")
    assert tensors.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert (path / "model.safetensors").stat().st_size < 4 * count_learning(model).trained + 8192
    second = scrambled(made())
    again, _ = trained(second, steps=0)
    checkpoints(tmp_path, second).load(path, second, again)
    assert torch.equal(logits(second), logits(model))


def test_another_base_is_refused(tmp_path):
    model = llama()
    frozen(model, layers=1)
    optimizer, _ = trained(model)
    path = write(tmp_path, model, optimizer, 3)
    other = llama()
    frozen(other, layers=1)
    with torch.no_grad():
        other.model.embed_tokens.weight[1, 1] += 1e-7
    again, _ = trained(other, steps=0)
    with pytest.raises(RunError, match="base:"):
        checkpoints(tmp_path, other).load(path, other, again)


def test_the_hash_is_of_what_does_not_learn():
    model, other = llama(), llama()
    assert frozen_hash(model) == ""
    frozen(model, layers=1)
    first = frozen_hash(model)
    trained(model)
    assert frozen_hash(model) == first
    frozen(other, layers=0)
    assert frozen_hash(other) not in ("", first)


def test_depths_are_of_every_parameter():
    for make in MODELS.values():
        model = make()
        assert depths_of(model).keys() == {name for name, _ in model.named_parameters()}
        assert Depth(1, 2) in depths_of(model).values()
