"""Layers, heads and channels taken out: what is left computes what the model does without them, and loads anywhere."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SmolLM3Config,
    T5Config,
)

from llmkit.compress import distil, prune
from llmkit.compress.calibrate import Read
from llmkit.compress.given import Given
from llmkit.compress.importance import by_activation, by_gradient, by_magnitude, influences
from llmkit.compress.structure import (
    block_names,
    feed_sites,
    head_sites,
    spread,
    weight_of,
    with_channels,
    with_heads,
    with_layers,
)
from llmkit.errors import UsageError
from llmkit.objectives.base import Loss, LossModule
from llmkit.recipe.compression import Step

SIZE = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 6}
GROUPED = {**SIZE, "num_key_value_heads": 3}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": (LlamaConfig, {**GROUPED, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, GROUPED),
    "qwen2": (
        Qwen2Config,
        {**GROUPED, "layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 3}
        | {"use_sliding_window": True},
    ),
    "qwen3": (Qwen3Config, {**GROUPED, "head_dim": 16}),
    "smollm3": (SmolLM3Config, {**GROUPED, "no_rope_layers": [1, 0, 1, 0]}),
    "gemma": (GemmaConfig, {**SIZE, "num_key_value_heads": 1, "head_dim": 8}),
    "gpt2": (GPT2Config, {"n_embd": 48, "n_layer": 4, "n_head": 4}),
    "bert": (BertConfig, SIZE),
    "roberta": (RobertaConfig, SIZE),
    "electra": (ElectraConfig, {**SIZE, "embedding_size": 24}),
    "distilbert": (DistilBertConfig, {"dim": 48, "hidden_dim": 40, "n_layers": 4, "n_heads": 6}),
    "modernbert": (ModernBertConfig, {**SIZE, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}),
    "t5": (
        T5Config,
        {"d_model": 48, "d_ff": 40, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 6, "d_kv": 8},
    ),
    "bart": (
        BartConfig,
        {"d_model": 48, "encoder_ffn_dim": 40, "decoder_ffn_dim": 32, "encoder_layers": 4}
        | {"decoder_layers": 3, "encoder_attention_heads": 6, "decoder_attention_heads": 6}
        | {"forced_eos_token_id": 2},
    ),
}
CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gpt2")
WITH_HEADS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "t5")


def class_of(name):
    if name in CAUSAL:
        return AutoModelForCausalLM
    return AutoModelForSeq2SeqLM if name in ("t5", "bart") else AutoModelForMaskedLM


def build(name, **changes):
    kind, fields = CONFIGS[name]
    start = {"decoder_start_token_id": 0} if name in ("t5", "bart") else {}
    torch.manual_seed(4)
    model = class_of(name).from_config(kind(vocab_size=40, **ENDS, **start, **(fields | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model


def ids(rows=2, width=9, seed=5):
    return torch.randint(3, 40, (rows, width), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, **more):
    if model.config.is_encoder_decoder:
        more = {"decoder_input_ids": ids(width=6)}
    return model(input_ids=ids(), **more).logits


class Rows:
    """An objective of the test's: the next, or the same, token at each position that is read."""

    sums = ()

    def loss(self, model, batch, criterion=None):
        more = {"decoder_input_ids": batch["written"]} if "written" in batch else {}
        mask = batch.get("attention_mask")
        found = model(input_ids=batch["input_ids"], attention_mask=mask, **more).logits
        total = functional.cross_entropy(found.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
        return Loss({"num_targets": total})


def batches(model, rows=6, width=12, count=3, lengths=None):
    """Micro-batches; with lengths, each row's is as long as these say."""
    made = []
    for seed in range(count):
        read = ids(rows, width, seed)
        batch = {"input_ids": read, "targets": read.roll(-1, 1)}
        if lengths:
            mask = torch.arange(width) < torch.tensor(lengths)[:, None]
            batch |= {"attention_mask": mask.long(), "targets": batch["targets"].masked_fill(~mask, -100)}
        if model.config.is_encoder_decoder:
            batch |= {"written": read[:, :7], "targets": read[:, 1:8].clone()}
        made.append({**batch, "num_targets": (batch["targets"] != -100).sum()})
    return made


def given(model, found=None):
    core = LossModule(model, Rows(), bf16=False).eval()
    return Given(core, batches(model) if found is None else found, Path(), 0, lambda _: None)


def step(**settings):
    return Step.model_validate({"method": "prune", **settings})


def without(model, sites, kept):
    """The model with no weights for what comes from units that do not stay."""
    made = copy.deepcopy(model)
    for site in sites:
        gone = [unit for unit in range(site.num_units) if unit not in kept[site.name].tolist()]
        weight_of(made.get_submodule(site.name))[:, spread(torch.tensor(gone), site.width)] = 0
    return made


def some(sites, count):
    """As many units of each site, of sites that go together the same."""
    chance, joint = torch.Generator().manual_seed(1), {}
    found = {}
    for site in sites:
        drawn = torch.randperm(site.num_units, generator=chance)[:count].sort().values
        found[site.name] = joint.setdefault(site.joint, drawn) if site.joint else drawn
    return found


# --- the smaller model ----------------------------------------------------------------------------------------


def smaller(name):
    """(what went, the model with as much of it at zero or passed over, the smaller model)."""
    model = build(name)
    kept = [[0, *range(2, len(side))] for side in block_names(model)]
    passed = copy.deepcopy(model)
    for side in block_names(model):
        passed.get_submodule(side[1]).forward = passing(name)
    yield "layers", passed, with_layers(model, kept)
    channels = some(feed_sites(model), 20)
    yield "channels", without(model, feed_sites(model), channels), with_channels(model, channels)
    if name in WITH_HEADS:
        count = 2 if name != "llama" else 1
        heads = some(head_sites(model), count)
        yield "heads", without(model, head_sites(model), heads), with_heads(model, heads)


def passing(name):
    """What a block does that does nothing."""
    if name == "t5":
        return lambda states, mask, bias, *more, **_: (states, bias, more[2] if len(more) > 2 else None)
    return lambda states, *_, **__: states


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_the_larger_one_does_without_these_parts_and_loads(name, tmp_path):
    before = build(name)
    for what, reference, made in smaller(name):
        assert (logits(made) - logits(reference)).abs().max() < 2e-5, what
        assert (logits(made) - logits(before)).abs().max() > 1e-3, what
        assert made.num_parameters() < before.num_parameters()
        made.save_pretrained(tmp_path / what)
        loaded, info = class_of(name).from_pretrained(tmp_path / what, output_loading_info=True)
        assert torch.equal(logits(loaded), logits(made)), what
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        assert type(loaded) is type(before)
        if before.config.tie_word_embeddings and name not in ("distilbert",):
            assert made.get_input_embeddings().weight is made.get_output_embeddings().weight
        if name in CAUSAL:  # the cache goes by the numbers of layers
            written = loaded.generate(ids(1, 4), max_new_tokens=5, do_sample=False, use_cache=True)
            plain = loaded.generate(ids(1, 4), max_new_tokens=5, do_sample=False, use_cache=False)
            assert written.tolist() == plain.tolist()


def test_all_parts_kept_are_the_same_model():
    for name in ("llama", "t5", "modernbert"):
        model = build(name)
        whole = with_layers(model, [list(range(len(side))) for side in block_names(model)])
        assert torch.equal(logits(whole), logits(model))
    assert with_layers(build("qwen2"), [[1, 2, 3]]).config.layer_types == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]


# --- importance -----------------------------------------------------------------------------------------------


def test_influence_is_one_minus_the_cosine_of_a_blocks_input_and_output():
    model = build("llama")
    found = batches(model, lengths=[12, 5, 9, 12, 7, 3])
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    last = []
    model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))  # not yet normalised
    with torch.no_grad():
        for batch in found:
            out = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                output_hidden_states=True,
            )
            states = [*out.hidden_states[:4], last[-1]]
            mask = batch["attention_mask"].bool()
            count += int(mask.sum())
            for number in range(4):
                before, after = states[number][mask].double(), states[number + 1][mask].double()
                cosine = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
                sums[number] += (1 - cosine).sum()
    assert influences(given(model).core, found) == [pytest.approx((sums / count).tolist(), rel=1e-5)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "modernbert", "t5"])
def test_magnitude_and_activation_of_a_unit(name):
    model = build(name)
    for sites in (feed_sites(model), head_sites(model) if name in WITH_HEADS else []):
        for site in sites[:2]:
            states = torch.randn(30, weight_of(site.out).shape[1], dtype=torch.float64)
            found = by_activation(site, states.T @ states, 30)
            sizes = by_magnitude(site)
            for unit in (0, site.num_units - 1):
                columns = spread(torch.tensor([unit]), site.width)
                adds = states[:, columns] @ weight_of(site.out)[:, columns].double().T
                assert float(found[unit]) == pytest.approx(
                    float(adds.square().sum(1).mean().sqrt()), rel=1e-6
                )
                parts = [weight_of(site.out)[:, columns].double().square().sum()]
                for layer, rows, fused in site.into.values():
                    whole = weight_of(layer).double().chunk(fused)
                    parts += [part[unit * rows : (unit + 1) * rows].square().sum() for part in whole]
                assert float(sizes[unit]) == pytest.approx(float(sum(parts) ** 0.5), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradient_is_what_the_loss_changes_by_as_a_unit_fades(name):
    model = build(name)
    core, found = given(model).core, batches(model, rows=2, count=2)
    sites = head_sites(model)[1:2] if name == "llama" else feed_sites(model)[1:2]
    scores = by_gradient(core, found, sites)[sites[0].name]
    assert not any(p.grad is not None or not p.requires_grad for p in model.parameters())
    unit, site = 2, sites[0]
    columns = spread(torch.tensor([unit]), site.width)

    def loss_at(row, size):
        def fade(_, args):
            states = args[0].clone()
            states[..., columns] *= size
            return (states,)

        hook = site.out.register_forward_pre_hook(fade)
        with torch.no_grad():
            total = float(core.objective.loss(model.double(), row).total)
        hook.remove()
        return total

    slopes = 0.0
    for batch in found:
        for number in range(2):
            row = {k: v[number : number + 1] for k, v in batch.items() if k != "num_targets"}
            slopes += abs(loss_at(row, 1.01) - loss_at(row, 0.99)) / 0.02
    assert float(scores[unit]) == pytest.approx(slopes, rel=2e-3)


# --- repair ---------------------------------------------------------------------------------------------------


def test_repair_is_least_squares():
    chance = torch.Generator().manual_seed(2)
    mixed = torch.randn(10, 10, generator=chance, dtype=torch.float64)
    states = torch.randn(200, 10, generator=chance, dtype=torch.float64) @ mixed
    weight = torch.randn(4, 10, generator=chance, dtype=torch.float64)
    kept = torch.tensor([0, 2, 3, 7, 9])
    found = prune.repaired(weight, states.T @ states, kept, damping=1e-9)
    wanted = torch.linalg.lstsq(states[:, kept], states @ weight.T).solution.T
    assert torch.allclose(found, wanted, atol=1e-5)
    strong = prune.repaired(weight, states.T @ states, kept, damping=1e9)
    assert torch.allclose(strong, weight[:, kept], atol=1e-6)  # much damping leaves what was there


def test_a_bias_takes_the_mean_of_what_goes():
    model = build("bert")
    site = feed_sites(model)[0]
    states = torch.zeros(50, site.num_units, dtype=torch.float64)
    states[:, 1] = 3.0  # always the same: without it nothing but its mean is missing
    states[:, 0] = torch.linspace(-1, 1, 50, dtype=torch.float64)
    before = (states @ weight_of(site.out).double().T + site.out.bias.double()).detach()
    read = Read.nothing(site.num_units, gram=True)
    read.gram_II, read.sum_I, read.count = states.T @ states, states.sum(0), 50
    kept = torch.tensor([unit for unit in range(site.num_units) if unit != 1])
    assert prune.repair(site, read, kept, damping=1e-9) < 1e-9
    after = (states @ weight_of(site.out).double().T + site.out.bias.double()).detach()
    assert torch.allclose(before, after, atol=1e-5)
    assert not weight_of(site.out)[:, 1].any()


# --- the method -----------------------------------------------------------------------------------------------


def test_layers_of_least_influence_go():
    model = build("llama")
    scores = influences(given(model).core, batches(model))[0]
    made = prune.apply(given(model), step(what="layers", share="50%"))
    gone = sorted(range(4), key=scores.__getitem__)[:2]
    assert made.facts["gone"] == [sorted(gone)]
    assert made.standard
    assert made.model.config.num_hidden_layers == 2
    assert made.facts["influence"] == [pytest.approx(scores, abs=1e-5)]
    stays = prune.apply(given(model), step(what="layers", share="50%", keep=[f"layers.{gone[0]}"]))
    assert gone[0] in stays.facts["kept"][0]


@pytest.mark.parametrize("name", ["t5", "modernbert"])
def test_a_first_layer_with_something_of_its_own_stays(name):
    made = prune.apply(given(build(name)), step(what="layers", share="60%"))
    assert all(kept[0] == 0 for kept in made.facts["kept"])


@pytest.mark.parametrize(
    ("name", "what"), [("llama", "channels"), ("llama", "heads"), ("bert", "channels"), ("t5", "heads")]
)
@pytest.mark.parametrize("by", ["magnitude", "activation", "gradient"])
def test_units_that_matter_least_go_and_repair_helps(name, what, by):
    model = build(name)
    share = "50%" if what == "channels" else "34%"
    found = [] if by == "magnitude" else batches(model, rows=8, count=8)
    before = logits(model)
    made = prune.apply(given(copy.deepcopy(model), found), step(what=what, share=share, by=by))
    assert made.facts["by"] == by
    assert made.facts["repaired"] == (by != "magnitude")
    assert made.facts["num_parameters"] == made.model.num_parameters() < model.num_parameters()
    if by == "magnitude":
        return
    assert all(0 < error < 1 for error in made.facts["errors"].values())
    # the same units, their weights just left out
    damped = prune.apply(
        given(copy.deepcopy(model), found),
        step(what=what, share=share, by=by).model_copy(update={"damping": 1e9}),
    )
    lost, plain = ((logits(one.model) - before).square().mean() for one in (made, damped))
    assert lost < plain


def test_heads_of_t5_go_alike_where_they_share_a_bias():
    model = build("t5")
    core = given(model)
    kept, _ = prune._chosen(
        core,
        head_sites(model),
        dict.fromkeys([s.name for s in head_sites(model)], 4),
        by="auto",
        damping=0.01,
    )
    own = {name: kept[name].tolist() for name in kept if "SelfAttention" in name}
    for side in ("encoder", "decoder"):
        assert len({tuple(v) for k, v in own.items() if k.startswith(side)}) == 1


def test_wide_layers_keep_a_multiple_of_32_channels():
    made = prune.apply(
        given(build("llama", intermediate_size=512, num_hidden_layers=1), []),
        step(what="channels", share="30%", by="magnitude"),
    )
    assert made.model.config.intermediate_size == 352  # 0.7 of 512 is 358.4
    made = prune.apply(given(build("llama"), []), step(what="channels", share="30%", by="magnitude"))
    assert made.model.config.intermediate_size == 28


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("bert", {"what": "heads", "share": "50%"}, "llama, mistral"),
        ("llama", {"what": "layers", "share": "10%"}, "10|none of them"),
        ("llama", {"what": "layers", "share": "50%", "keep": ["layers.9"]}, "matches no layer"),
        ("llama", {"what": "layers", "share": "50%", "keep": ["mlp"]}, "4 must stay"),
        ("llama", {"what": "channels", "share": "50%", "keep": ["layers.0"]}, "none can stay"),
    ],
)
def test_what_cannot_be_is_refused(name, settings, said):
    with pytest.raises(UsageError) as caught:
        prune.apply(given(build(name)), step(**settings))
    assert any(part in str(caught.value) for part in said.split("|"))


def test_a_number_of_heads_that_the_architecture_cannot_have():
    model = build("llama", hidden_size=40, num_attention_heads=10, num_key_value_heads=5)
    with pytest.raises(UsageError, match="80%"):  # 6 heads do not divide 40; one group of two does
        prune.apply(given(model, []), step(what="heads", share="40%", by="magnitude"))


def test_an_architecture_that_is_not_known_and_one_that_is_quantised():
    model = build("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UsageError, match="gptq already"):
        prune.apply(given(model), step(what="layers", share="50%"))
    other = SimpleNamespace(model_type="albert")
    with pytest.raises(UsageError, match=r"albert[^\n]*\n.*bert, "):
        prune.family_of(other)


# --- students -------------------------------------------------------------------------------------------------


def student(model, **settings):
    return distil.apply(given(model), Step.model_validate({"method": "distil", **settings}))


def test_a_student_begins_with_layers_of_its_teacher():
    teacher = build("bert", num_hidden_layers=6)
    made = student(teacher, layers=3)
    assert made.facts["kept"] == [[0, 2, 5]]
    assert made.model.config.num_hidden_layers == 3
    own, old = made.model.bert.encoder.layer, teacher.bert.encoder.layer
    assert torch.equal(own[1].output.dense.weight, old[2].output.dense.weight)
    assert student(teacher, layers=2, choose="first").facts["kept"] == [[0, 1]]
    scores = influences(given(teacher).core, batches(teacher))[0]
    best = sorted(sorted(range(6), key=lambda n: -scores[n])[:2])
    assert student(teacher, layers=2, choose="influence").facts["kept"] == [best]
    assert distil.evenly(12, 6) == [0, 2, 4, 7, 9, 11]


def test_a_student_keeps_a_first_layer_with_something_of_its_own(monkeypatch):
    monkeypatch.setattr(distil, "influences", lambda core, found: [[0.1, 0.9, 0.5, 0.8]])
    found = given(build("llama"))
    for first, kept in ((True, [[0, 1]]), (False, [[1, 3]])):
        assert distil._choose(found, "influence", 2, [4], first=first) == kept


def test_sites_whose_units_go_together_weigh_alike_whatever_their_scale():
    sites = [SimpleNamespace(name=name, joint="j") for name in "ab"] + [SimpleNamespace(name="c", joint="")]
    scores = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([600.0, 400.0]), "c": torch.tensor([5.0, 1.0])}
    found = prune._joined(sites, scores)
    assert torch.allclose(found["a"], torch.tensor([0.25 + 0.6, 0.75 + 0.4]))
    assert torch.equal(found["a"], found["b"])
    assert torch.equal(found["c"], scores["c"])


def test_a_student_with_fewer_channels():
    made = student(build("t5"), layers=2, channels=0.5)
    assert made.model.config.d_ff == 20
    assert (made.model.config.num_layers, made.model.config.num_decoder_layers) == (2, 2)
    assert made.facts["num_parameters"] == made.model.num_parameters()


@pytest.mark.parametrize("settings", [{}, {"layers": 4}, {"layers": 5}])
def test_a_student_that_would_be_no_smaller(settings):
    with pytest.raises(UsageError, match="teacher"):
        student(build("llama"), **settings)
