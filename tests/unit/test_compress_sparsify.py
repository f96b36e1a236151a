"""What layers read, block by block; and single weights that become zero."""

import copy

import pytest
import torch
from adapting import bert, gpt2, llama, t5
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from llmkit.compress.calibrate import linear_layers, reads_of, walk
from llmkit.compress.given import Given
from llmkit.compress.sparsify import apply
from llmkit.compress.structure import weight_of
from llmkit.errors import UsageError
from llmkit.objectives.base import NOT_LEARNED, TARGETS, Loss, LossModule
from llmkit.recipe.compression import Step


class Runs:
    """Runs the model on a batch as objectives do."""

    sums = ()

    def loss(self, model, batch, criterion=None):
        given = {
            name: batch[name]
            for name in ("input_ids", "attention_mask", "decoder_input_ids")
            if name in batch
        }
        return Loss({TARGETS: model(**given, use_cache=False).logits.sum()})


class Encodes(Runs):
    def loss(self, model, batch, criterion=None):
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return Loss({TARGETS: model(**given).logits.sum()})


def core_of(model, objective=None):
    return LossModule(model, objective or Runs(), bf16=False).eval()


def batches(count=4, *, rows=6, width=9, vocab=40, decoder=False, seed=1):
    """Causal rows; of the last of each batch only four positions are text."""
    chance = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(1, vocab, (rows, width), generator=chance)
        targets = ids.roll(-1, 1)
        ids[-1, 4:], targets[-1, 4:] = 0, NOT_LEARNED
        batch = {"input_ids": ids, "targets": targets, TARGETS: (targets != NOT_LEARNED).sum()}
        if decoder:
            batch |= {"decoder_input_ids": ids.flip(0), "attention_mask": (ids != 0).long()}
            batch["targets"] = targets.flip(0)
        found.append(batch)
    return found


def masked(found):
    return [{**batch, "attention_mask": (batch["input_ids"] != 0).long()} for batch in found]


def given_of(model, found=(), objective=None, told=lambda _: None):
    return Given(core_of(model, objective), list(found), None, 3, told)


def prune(**settings):
    return Step(method="prune", **{"share": 0.5, **settings})


# --- the layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "count", "first", "last"),
    [
        (lambda: llama(tied=True), 14, "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
        (bert, 12, "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"),
        (gpt2, 8, "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
        (t5, 42, "encoder.block.0.layer.0.SelfAttention.q", "decoder.block.2.layer.2.DenseReluDense.wo"),
    ],
)
def test_the_linear_layers_of_the_blocks_and_no_others(model, count, first, last):
    found = linear_layers(model())
    assert len(found) == count
    assert (next(iter(found)), list(found)[-1]) == (first, last)


def test_layers_that_are_kept_and_patterns_that_mean_none():
    found = linear_layers(llama(), ["layers.0", "q_proj|k_proj", "lm_head"])
    assert sorted(found) == [
        f"model.layers.1.{name}"
        for name in (
            "mlp.down_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "self_attn.o_proj",
            "self_attn.v_proj",
        )
    ]
    with pytest.raises(UsageError, match="keep: 'q_prj' matches no layer") as caught:
        linear_layers(llama(), ["q_prj"])
    assert "self_attn.q_proj" in caught.value.hint
    with pytest.raises(UsageError, match="no linear layer is left"):
        linear_layers(llama(), ["layers"])


def test_matrices_of_other_layers_are_named_and_left_only_when_asked_for():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, vocab_size=40, num_hidden_layers=1, num_local_experts=2)
    )
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp\.experts \(MixtralExperts\)") as caught:
        linear_layers(model)
    assert "experts" in caught.value.hint
    assert set(linear_layers(model, ["experts|gate"])) == {
        f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"
    }


# --- what they read -------------------------------------------------------------------------------------------


def heard(core, found, is_read):
    """The inputs [N, I] of all linear layers, by hooks on the model as a whole; `is_read` says which positions."""
    inputs, handles = {}, []
    for name in linear_layers(core.model):

        def keep(_, args, name=name):
            inputs.setdefault(name, []).append(args[0].detach())

        handles.append(core.model.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in found:
            core.objective.loss(core.model, batch)
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat([one[is_read(batch, name)] for one, batch in zip(seen, found, strict=True)])
        for name, seen in inputs.items()
    }


CASES = {
    "llama": (llama, batches(), None, lambda b, _: b["input_ids"] != 0),
    "llama-mask": (llama, masked(batches()), None, lambda b, _: b["input_ids"] != 0),
    "gpt2": (gpt2, batches(), None, lambda b, _: b["input_ids"] != 0),
    "bert": (bert, masked(batches()), Encodes(), lambda b, _: b["attention_mask"].bool()),
    "t5": (
        t5,
        batches(decoder=True),
        None,
        # Keys and values of the cross-attention are made from what the encoder gives.
        lambda b, name: (
            b["targets"] != NOT_LEARNED
            if name.startswith("decoder") and not name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
            else b["attention_mask"].bool()
        ),
    ),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_what_layers_read_without_padding(case, whole):
    make, found, objective, is_read = CASES[case]
    core = core_of(make(), objective)
    wanted, reads = heard(core, found, is_read), {}
    walk(core, found, linear_layers(core.model), reads.update, sample=10, whole=whole)
    assert list(reads) == list(wanted)
    for name, inputs in wanted.items():
        read, wide = reads[name], inputs.double()
        assert read.count == len(inputs)
        assert torch.allclose(read.gram_II, wide.T @ wide, rtol=1e-4, atol=1e-4)
        assert torch.allclose(read.squares_I, wide.square().sum(0), rtol=1e-4, atol=1e-5)
        assert torch.allclose(read.sum_I, wide.sum(0), rtol=1e-4, atol=1e-4)
        assert torch.allclose(read.abs_I, wide.abs().sum(0), rtol=1e-4, atol=1e-4)
        assert torch.allclose(read.largest_I, inputs.abs().amax(0), rtol=1e-5)
        stride = 1
        while len(inputs[::stride]) >= 20:
            stride *= 2
        assert torch.allclose(read.sample_NI, inputs[::stride], atol=1e-5)
        assert 10 <= len(read.sample_NI) < 20


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_blocks_are_shown_what_those_treated_before_them_give(case):
    """Both ways; as the model as a whole computes it."""
    make, found, _, is_read = CASES[case]
    both = []
    for whole in (False, True):
        core, reads = core_of(make()), {}
        plain = heard(core, found, is_read)

        def treat(block, core=core, reads=reads):
            reads.update(block)
            for name in block:
                core.model.get_submodule(name).weight.mul_(0.5)

        walk(core, found, linear_layers(core.model), treat, whole=whole)
        both.append(reads)
        last = list(reads)[-1]
        assert not torch.allclose(reads[last].sum_I, plain[last].double().sum(0), rtol=1e-2)
        done = copy.deepcopy(core)  # all are treated: what the last block read, but for what it did to itself
        names = (
            [n for n in reads if n.rpartition("layers.")[2].startswith("1.")][:3] if case == "llama" else []
        )
        now = heard(done, found, is_read)
        for name in names:
            assert torch.allclose(reads[name].sum_I, now[name].double().sum(0), rtol=1e-4, atol=1e-4)
    for name, read in both[0].items():
        assert torch.allclose(read.gram_II, both[1][name].gram_II, rtol=1e-5, atol=1e-7)


def test_too_little_to_look_at_is_told_and_nothing_is_refused():
    core = core_of(llama())
    lines = walk(core, batches(1, rows=2), linear_layers(core.model), lambda _: None)
    assert len(lines) == 1
    assert "13 tokens were looked at, and model.layers.0.mlp.down_proj has 24 inputs" in lines[0]
    assert walk(core, batches(1, rows=6), linear_layers(core.model), lambda _: None) == []
    with pytest.raises(UsageError, match="0 tokens"):
        walk(core, [], linear_layers(core.model), lambda _: None)
    none = batches(1)
    none[0]["targets"][:] = NOT_LEARNED
    with pytest.raises(UsageError, match="no position"):
        walk(core, none, linear_layers(core.model), lambda _: None)


# --- pruning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5])
@pytest.mark.parametrize("by", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_the_share_is_reached_in_each_layer_and_nothing_else_changes(make, by, pattern):
    model = make()
    objective = Encodes() if make is bert else None
    found = masked(batches()) if make is bert else batches(decoder=make is t5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = apply(
        given_of(model, found if by != "magnitude" else (), objective), prune(by=by, pattern=pattern)
    )
    layers = linear_layers(model)
    assert made.facts["layers"] == dict.fromkeys(layers, 0.5)
    assert made.facts["share"] == 0.5
    for name, value in made.model.state_dict().items():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(value, before[name])
        elif by != "sparsegpt":  # what stays is as it was
            assert torch.equal(value[value != 0], before[name][value != 0])
    if pattern == "2:4":
        for layer in layers.values():
            few = weight_of(layer).unflatten(1, (-1, 4)) == 0
            assert few.sum(2).unique().tolist() == [2]


def test_wanda_takes_what_is_smallest_times_what_the_layer_reads():
    model, found = llama(layers=1), batches()
    before, read = copy.deepcopy(model), reads_of(core_of(model), found, linear_layers(model))
    apply(given_of(model, found), prune(by="wanda", share=0.25))
    for name, layer in linear_layers(model).items():
        weight = before.get_submodule(name).weight.double()
        score = weight.abs() * read[name].gram_II.diagonal().sqrt()
        smallest = score.kthvalue(round(0.25 * score.shape[1]), dim=1, keepdim=True).values
        assert torch.equal(layer.weight == 0, score <= smallest)


def test_globally_the_smallest_of_all_layers_go():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(0.01)
    weights = torch.cat([layer.weight.flatten().abs() for layer in linear_layers(model).values()])
    limit = weights.sort().values[round(0.3 * len(weights)) - 1]
    kept = [(layer.weight.abs() > limit).clone() for layer in linear_layers(model).values()]
    made = apply(given_of(model), prune(by="magnitude", share=0.3, scope="global"))
    for mask, layer in zip(kept, linear_layers(model).values(), strict=True):
        assert torch.equal(layer.weight != 0, mask)
    assert made.facts["num_zeros"] == round(0.3 * len(weights))
    assert made.facts["layers"]["model.layers.0.mlp.up_proj"] == 1.0


def test_the_output_layer_stays_and_stays_tied(tmp_path):
    model = llama(tied=True)
    embeddings = model.get_input_embeddings().weight.clone()
    made = apply(given_of(model, batches()), prune(keep=["k_proj"]))
    assert made.write is None
    made.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again.lm_head.weight, embeddings)
    assert (
        sum(int((layer.weight == 0).sum()) for layer in linear_layers(again).values())
        == made.facts["num_zeros"]
    )
    assert not any("k_proj" in name for name in made.facts["layers"])
    assert all(0 < made.facts["errors"][name] < 1 for name in made.facts["layers"])


def test_outputs_change_least_with_sparsegpt_then_wanda_then_magnitude():
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=40, max_position_embeddings=32)).eval()
    with torch.no_grad():
        for module in model.modules():  # inputs of very different sizes, which go together
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(torch.rand(len(module.weight)) ** 4 * 4)
    found = masked(batches(8, rows=8, width=16))
    ids = {name: found[0][name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        plain = model(**ids).logits
        gaps = []
        for by in ("sparsegpt", "wanda", "magnitude"):
            other = copy.deepcopy(model)
            apply(given_of(other, found, Encodes()), prune(by=by))
            gaps.append(float((other(**ids).logits - plain).square().mean()))
    assert gaps[0] < gaps[1] < gaps[2]


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match=r"share: 0\.3, and with the pattern 2:4 half"):
        apply(given_of(llama(), batches()), prune(share=0.3, pattern="2:4"))
    with pytest.raises(UsageError, match="scope: global does not go with pattern: 2:4"):
        apply(given_of(llama()), prune(by="magnitude", pattern="2:4", scope="global"))
    with pytest.raises(UsageError, match="0 tokens"):
        apply(given_of(llama()), prune())
    model = llama()
    model.model.layers[0].mlp.down_proj = nn.Linear(22, 16)
    with pytest.raises(UsageError, match=r"mlp\.down_proj has 22 inputs, which the pattern 4:8"):
        apply(given_of(model, batches()), prune(pattern="4:8"))
    model = llama()
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(UsageError, match="compressed-tensors already"):
        apply(given_of(model, batches()), prune())
