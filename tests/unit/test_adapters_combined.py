"""Several adapters of one base: added up, as one adapter, in the weights; the base on disk stays as it is."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from adapting import MODELS, llama, logits
from tuning import finetune, model, options

from llmkit.errors import GateError, MissingError, UsageError
from llmkit.models.adapter_files import save_adapter
from llmkit.models.adapters import inject_adapter, using_adapter
from llmkit.models.combining import JOINED, join_adapters, merge_by, put_adapters
from llmkit.models.merging import unload
from llmkit.recipe.parts import Adapter
from llmkit.report.console import make_reporter

peft = pytest.importorskip("peft")


def saved(folder, kind, seed, **settings):
    """The folder of an adapter that changes something, and of each layer the change of its weight by hand."""
    net = MODELS[kind]()
    spec = Adapter(**{"rank": 3, "alpha": 5.0, **settings})
    inject_adapter(net, spec, seed=seed)
    torch.manual_seed(seed)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.3)
    changes = {}
    for name, layer in net.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
            change = spec.scale * b @ a
            changes[f"{name}.weight"] = change.T if type(layer.base_layer).__name__ == "Conv1D" else change
    save_adapter(folder, net, facts={})
    return folder, changes


def by_hand(kind, changes):
    """The plain model with changes of its weights added."""
    net = MODELS[kind]()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name in changes:
                p += changes[name]
    return net


def summed(*pairs):
    """The sum of weighted changes."""
    names = {name for _, changes in pairs for name in changes}
    return {
        name: sum(weight * changes[name] for weight, changes in pairs if name in changes) for name in names
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_together_they_compute_the_base_and_each_product_times_its_weight(tmp_path, kind):
    (one, first), (two, second) = (saved(tmp_path / str(seed), kind, seed) for seed in (1, 2))
    net = MODELS[kind]()
    names = put_adapters(net, [(one, 0.7), (two, -0.4)])
    wanted = logits(by_hand(kind, summed((0.7, first), (-0.4, second))))
    assert torch.allclose(logits(net), wanted, atol=1e-5)
    with using_adapter(net, next(iter(names))):
        assert torch.allclose(logits(net), logits(by_hand(kind, summed((0.7, first)))), atol=1e-5)
    assert torch.allclose(logits(net), wanted, atol=1e-5)
    with torch.no_grad():
        unload(net)
    assert torch.allclose(logits(net), wanted, atol=1e-5)
    merged, plain = dict(net.named_parameters()), by_hand(kind, summed((0.7, first), (-0.4, second)))
    for name, p in plain.named_parameters():
        assert torch.allclose(merged[name], p, atol=1e-6), name


def test_adapters_of_other_ranks_scales_and_layers_are_one_adapter_that_plain_peft_loads(tmp_path):
    one, first = saved(tmp_path / "1", "llama", 1, targets="q_proj|v_proj", rank=2)
    two, second = saved(tmp_path / "2", "llama", 2, targets="v_proj|up_proj", rank=4, method="rslora")
    net = llama()
    names = put_adapters(net, [(one, 1.0), (two, 2.0)])
    before = logits(net)
    join_adapters(net, names, base="somewhere")
    assert torch.equal(logits(net), before)  # it waits
    with using_adapter(net, JOINED):
        assert torch.allclose(logits(net), before, atol=1e-5)
    save_adapter(tmp_path / "joined", net, name=JOINED, facts={})
    wanted = logits(by_hand("llama", summed((1, first), (2, second))))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "joined")
    assert torch.allclose(logits(theirs), wanted, atol=1e-5)
    assert json.loads((tmp_path / "joined" / "adapter_config.json").read_text())["r"] == 6


def test_peft_own_sum_of_thin_matrices_is_another():
    """Why it is not taken: of (A1 + A2)(B1 + B2) only two of four products are wanted."""
    a, b = torch.eye(2)[:1], torch.eye(2)[1:]  # A1, A2 [1, 2]; B is A's transpose
    exact = a.T @ a + b.T @ b
    theirs = (a + b).T @ (a + b)
    assert not torch.allclose(exact, theirs)


def test_ties_by_hand():
    """Of each adapter the two largest of four; at each place the sign that weighs more, and the mean of its values.

    (4, -1, 3, 0.5) keeps (4, ., 3, .); (-6, 2, 1, 0) keeps (-6, 2, ., .). The first place: -2, so -6 alone.
    """
    from llmkit.models.combining import _ties

    deltas = torch.tensor([[[4.0, -1.0], [3.0, 0.5]], [[-6.0, 2.0], [1.0, 0.0]]])
    assert _ties(deltas, 0.5, torch.Generator()).tolist() == [[-6.0, 2.0], [3.0, 0.0]]
    same = torch.tensor([[[4.0, 1.0]], [[2.0, 3.0]]])
    assert _ties(same, 1.0, torch.Generator()).tolist() == [[3.0, 2.0]]


def test_dare_keeps_a_share_and_its_expectation_is_the_sum():
    from llmkit.models.combining import _dare

    deltas = torch.ones(2, 200, 200)
    made = _dare(deltas, 0.25, torch.Generator().manual_seed(1))
    assert set(made.unique().tolist()) <= {0.0, 4.0, 8.0}
    assert float(made.mean()) == pytest.approx(2, abs=0.05)
    assert torch.equal(made, _dare(deltas, 0.25, torch.Generator().manual_seed(1)))
    assert torch.equal(_dare(deltas, 1.0, torch.Generator()), deltas.sum(0))


@pytest.mark.parametrize(("method", "share"), [("ties", 0.5), ("dare", 0.5)])
def test_merged_by_other_ways_it_is_a_plain_model(tmp_path, method, share):
    (one, first), (two, second) = (saved(tmp_path / str(seed), "llama", seed) for seed in (1, 2))
    net = llama()
    merge_by(net, put_adapters(net, [(one, 1.0), (two, 1.0)]), method, density=share, seed=3)
    assert {name for name, _ in net.named_parameters()} == {name for name, _ in llama().named_parameters()}
    assert not hasattr(net, "peft_config")
    plain = dict(llama().named_parameters())
    name = "model.layers.0.self_attn.q_proj.weight"
    change = net.get_parameter(name).detach() - plain[name].detach()
    both = torch.stack([first[name], second[name]])
    if method == "ties":
        assert ((change == 0) | (change.abs() <= both.abs().max(0).values + 1e-6)).all()
        assert 0 < int((change.abs() < 1e-9).sum()) < change.numel()
    else:  # each change is there twice as large or not at all
        ways = torch.stack([0 * both[0], 2 * both[0], 2 * both[1], 2 * both.sum(0)])
        assert float((change - ways).abs().min(0).values.max()) < 1e-5


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"method": "dora"}, "lengths of rows"), ({"whole": "lm_head"}, r"learned whole \(lm_head\)")],
)
def test_what_cannot_be_added_up_is_refused(tmp_path, settings, said):
    one, _ = saved(tmp_path / "1", "llama", 1)
    two, _ = saved(tmp_path / "2", "llama", 2, **settings)
    with pytest.raises(UsageError, match=said):
        put_adapters(llama(), [(one, 1.0), (two, 1.0)])
    with pytest.raises(UsageError, match=said):
        put_adapters(llama(), [(two, 0.5)])
    put_adapters(llama(), [(two, 1.0)])  # alone it can be used


# --- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on one base that leave nothing but their adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    before = weights_of(model("llama"))
    for name, task in (("sorts", "sft"), ("prefers", "dpo")):
        finetune(
            folder,
            task,
            name,
            finetune__adapter={"method": "lora", "rank": 4, "merge": False},
            finetune__train__length="3 steps",
            finetune__train__optim={"lr": 3e-2},
        )
        assert not (folder / "runs" / name / "finetune" / "model").exists()
    assert weights_of(model("llama")) == before
    return folder / "runs"


def weights_of(folder):
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def merged(runs, words, name, **how):
    from llmkit.run.merge import How, merge

    return merge(
        [str(runs / word) for word in words],
        name,
        How(**how),
        options(runs.parent),
        make_reporter(quiet=True),
    )


def changes_of(folder, base):
    """What a saved adapter changes, from its files alone."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for key in tensors:
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            scale = config["lora_alpha"] / config["r"]
            found[name] = scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    return found


def test_two_runs_become_one_model_and_the_base_stays(runs):
    from safetensors.torch import load_file

    before = weights_of(model("llama"))
    made = merged(runs, ["sorts=0.8", "prefers=0.5"], "both")
    assert weights_of(model("llama")) == before
    base, both = (
        load_file(f"{model('llama')}/model.safetensors"),
        load_file(made.folder / "model" / "model.safetensors"),
    )
    first, second = (changes_of(runs / name / "finetune" / "adapter", base) for name in ("sorts", "prefers"))
    wanted = summed((0.8, first), (0.5, second))
    assert len(wanted) == 14
    for name, tensor in both.items():
        assert torch.allclose(tensor, base[name] + wanted.get(name, 0), atol=1e-5), name
    assert made.summary["kl"] < 1e-6
    assert all(0 < apart < 10 for apart in made.summary["apart"].values())
    joined = changes_of(made.folder / "adapter", base)
    assert all(torch.allclose(joined[name], wanted[name], atol=1e-5) for name in wanted)


@pytest.mark.slow
def test_what_was_merged_is_measured_and_asked_as_the_run_is(runs):
    from llmkit.recipe.schema import Sampling
    from llmkit.run import find_model, generate
    from llmkit.run.evaluate import evaluate

    merged(runs, ["sorts", "prefers"], "asked")
    merged(runs, ["sorts", "prefers"], "thin", adapter_only=True)
    assert find_model(str(runs / "asked"), runs) == runs / "asked" / "merge" / "model"
    assert not (runs / "thin" / "merge" / "model").exists()
    quiet = make_reporter(quiet=True)
    found = [
        evaluate([str(runs / name)], None, options(runs.parent), quiet).summary["metrics"]
        for name in ("asked", "thin", "sorts")
    ]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], abs=1e-5)
    assert found[0]["loss"] != pytest.approx(found[2]["loss"], abs=1e-4)
    greedy = Sampling(max_new_tokens=8, temperature=0)

    def said(word, *adapters):
        (one,) = generate(
            word, ["which cat?"], greedy, samples=1, seed=0, runs=runs, reporter=quiet, adapters=adapters
        )
        return one["text"], one["chat"]

    words = [str(runs / name) for name in ("sorts", "prefers")]
    assert said(str(runs / "asked")) == said(str(runs / "thin")) == said(model("llama"), *words)
    assert said(words[0]) == said(model("llama"), words[0])


def test_one_adapter_is_merged_alone_and_can_be_the_base_of_the_next(runs):
    made = merged(runs, ["sorts"], "whole")
    assert made.summary["kl"] < 1e-6
    assert not (made.folder / "adapter").exists()
    from llmkit.train.places import model_folder

    assert model_folder(str(runs / "whole")) == str(made.folder / "model")


def test_a_merge_that_says_otherwise_ends_with_an_error(runs):
    with pytest.raises(GateError, match="nats apart"):
        merged(runs, ["sorts", "prefers"], "strict", max_kl=1e-30)
    assert not (runs / "strict" / "merge" / "model").exists()


@pytest.mark.parametrize(
    ("words", "name", "how", "error", "said"),
    [
        (["sorts", "sorts=2"], "x", {}, UsageError, "named twice"),
        (["sorts", "prefers=much"], "x", {}, UsageError, "'much' is no weight"),
        (["sorts", "nothing"], "x", {}, MissingError, "no adapter in"),
        (["sorts"], "x", {"adapter_only": True}, UsageError, "an adapter already"),
        (
            ["sorts", "prefers"],
            "x",
            {"adapter_only": True, "method": "ties"},
            UsageError,
            "fills whole weights",
        ),
        (["sorts", "prefers"], "sorts", {}, UsageError, "another run"),
        (["sorts", "prefers"], "a/b", {}, UsageError, "a name has letters"),
    ],
)
def test_what_is_wrong_is_said(runs, words, name, how, error, said):
    with pytest.raises(error, match=said):
        merged(runs, words, name, **how)


def test_adapters_of_different_bases_are_refused(runs, tmp_path):
    folder, _ = saved(tmp_path / "gpt2", "gpt2", 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": model("gpt2")})
    )
    with pytest.raises(UsageError, match="was made for"):
        merged(runs, ["sorts", str(folder)], "x")


def test_the_commands(runs, capsys):
    from llmkit.cli import main

    words = [f"{runs / 'sorts'}=0.8", str(runs / "prefers"), "--runs", str(runs), "--json"]
    assert main(["merge", *words, "--name", "said", "--method", "ties", "--density", "50%"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["method"], made["density"], made["kl"]) == ("ties", 0.5, None)
    assert list(made["adapters"].values()) == [0.8, 1.0]
    assert made["next"] == f"llmkit eval {runs / 'said'}" or made["next"].endswith(f"eval {runs / 'said'}")
    assert not (runs / "said" / "merge" / "adapter").exists()
    asked = [
        "generate",
        model("llama"),
        "which cat?",
        "--temperature",
        "0",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    assert main([*asked, "--adapter", words[0], "--adapter", words[1], "--runs", str(runs)]) == 0
    assert len(json.loads(capsys.readouterr().out)["samples"]) == 1
    assert main(["merge", *words, "--name", "x", "--density", "0"]) == 2
    assert main(["merge", *words, "--name", "x", "--method", "slerp"]) == 2
    assert "--method slerp" in capsys.readouterr().err


def test_a_run_with_an_adapter_alone_is_no_model_to_start_from_and_says_what_is(runs, tmp_path):
    with pytest.raises(UsageError, match="has an adapter and no model") as caught:
        finetune(tmp_path, "sft", finetune__model={"name": str(runs / "sorts"), "context": 64})
    assert "llmkit merge" in caught.value.hint
