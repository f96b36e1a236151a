"""`--on`: hardware by name, published shapes, and the command that plans for them."""

import json

import pytest
import torch
from training import recipe
from transformers import AutoConfig, AutoModelForCausalLM

from llmkit.cli import main
from llmkit.errors import UsageError
from llmkit.hardware import ACCELERATORS, find_accelerator, known_names, named_hardware, split_names
from llmkit.plan import Plan, preset_fields, shape_of_config
from llmkit.plan.published import PUBLISHED
from llmkit.recipe.architectures import family_of_preset

PARAMETERS = {
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
}  # fmt: skip
"""As the models' own files add up to; tied output layers once."""


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H100", ("cuda", 1, 1, 80)),
        ("8xh100", ("cuda", 1, 8, 80)),
        ("2x8xH100", ("cuda", 2, 8, 80)),
        ("4xA100-40GB", ("cuda", 1, 4, 40)),
        ("rtx 4090", ("cuda", 1, 1, 24)),
        ("v5e-8", ("tpu", 1, 8, 16)),
        ("v5e-16", ("tpu", 4, 4, 16)),
        ("v5p-8", ("tpu", 1, 4, 95)),
        ("v5p-384", ("tpu", 48, 4, 95)),
        ("v6e-1", ("tpu", 1, 1, 32)),
        ("64xH100", ("cuda", 8, 8, 80)),
        ("1x64xH100", ("cuda", 1, 64, 80)),
        ("1x10xL4", ("cuda", 1, 10, 24)),
        ("tpu-v4-32", ("tpu", 4, 4, 32)),
        ("cpu:16", ("cpu", 1, 1, 64)),
        ("cpu:16:32GB", ("cpu", 1, 1, 32)),
    ],
)
def test_hardware_by_name(name, found):
    place = named_hardware(name)
    assert (place.device, place.nodes, place.num_devices, place.memory_bytes / 1e9) == found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("8xH10", "did you mean H100?"),
        ("8xH1000", "did you mean H100?"),
        ("", "not of the form"),
        ("12xH100", "--on 1x12xH100 or 2x6xH100"),
        ("13xH100", "--on 1x13xH100"),
        ("toaster", "known: GB200"),
        ("H100x8", "--on 8xH100"),
        ("A100-40GB:4", "--on 4xA100-40GB"),
        ("0xH100", "not a number from 1"),
        ("99999999xH100", "not a number from 1"),
        ("3x3x3xH100", "no accelerator"),
        ("2xcpu", "one processor is cpu"),
        ("cpu:x", "one processor is cpu"),
        ("v5e-2", "--on v5e-4"),
        ("v5e-3", "--on v5e-4"),
        ("v5e-7", "--on v5e-8"),
        ("v5e-12", "--on v5e-16"),
        ("v5e-512", "--on v5e-256"),
        ("v5p-1", "--on v5p-8"),
        ("v5p-96", "--on v5p-128"),
        ("v4-130", "--on v4-256"),
        ("v5p-7", "--on v5p-8"),
        ("v9-8", "no accelerator"),
        ("2xv5e-8", "one larger slice: v5e-16"),
        ("3xv5e-8", "one larger slice: v5e-32"),
        ("-", "not of the form"),
    ],
)
def test_unknown_hardware_is_refused_with_what_is_near(name, words):
    with pytest.raises(UsageError) as caught:
        named_hardware(name)
    assert words in str(caught.value)


def test_the_table_is_consistent():
    for row in ACCELERATORS:
        name = row.names[0]
        assert find_accelerator(f"NVIDIA {name.replace('-', ' ')}") is row or "A100" in name
        assert named_hardware(name).peak_flops == (row.bf16_flops or row.fp32_flops)
        assert row.price is None or row.price[0] < row.price[1]
        assert row.fp8_flops is None or row.fp8_flops > 1.9 * row.bf16_flops
    assert all(named_hardware(name) for name in known_names())
    assert split_names(["H100,A100", "H100", " L4 "]) == ["H100", "A100", "L4"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_published_number_of_parameters(name):
    fields = preset_fields(name)
    assert shape_of_config(fields).num_parameters == PARAMETERS[name]
    assert fields["model_type"] == family_of_preset(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_what_transformers_builds(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**PUBLISHED[name]))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def command(*words, capsys):
    code = main(["plan", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_published_model_on_one_eight_and_sixty_four(capsys):
    code, out, _ = command(
        "--model", "llama-3.1-8b", "--on", "H100,8xH100", "--on", "8x8xH100", "--json", capsys=capsys
    )
    assert code == 0
    one, eight, many = json.loads(out)["plans"].values()
    assert {plan["num_parameters"] for plan in (one, eight, many)} == {8_030_261_248}
    assert [plan["world_size"] for plan in (one, eight, many)] == [1, 8, 64]
    assert one["memory"]["total"] > 80e9
    assert any(note.startswith("what would fit: ") for note in one["notes"])
    for plan in (eight, many):
        assert plan["memory"]["total"] < 0.85 * 80e9
        assert plan["cost"][0] < plan["cost"][1]
        readers = plan["parallel"]["replicate"] * plan["parallel"]["shard"]
        assert (
            plan["micro_batch_size"] * plan["gradient_accumulation_steps"] * readers == plan["rows_per_step"]
        )
    assert eight["seconds_low"] / many["seconds_low"] == pytest.approx(8, rel=0.05)
    assert eight["activations"]["none"] > eight["activations"]["selective"] > eight["activations"]["full"]
    assert eight["activations"][eight["recompute"]] == eight["memory"]["activations"]
    assert eight["data"] == {}  # there is no text to say anything of
    back = Plan.from_dict(eight)
    assert (back.price, json.loads(json.dumps(back.to_dict()))) == ((2.0, 12.3), eight)


def test_one_place_is_told_whole_and_several_in_lines(capsys):
    _, out, _ = command("--model", "qwen3-0.6b", "--on", "8xA100", "--price", "2", capsys=capsys)
    assert "596,049,920" in out
    assert "of a device" in out
    assert "20 tokens" not in out
    assert "(at $2 an hour of a device)" in out
    assert "(recompute: none; selective " in out
    assert " a token, " in out
    _, out, said = command(
        "--model", "qwen3-0.6b", "--on", "8xA100,7xA100,cpu:64", "--nodes", "1", capsys=capsys
    )
    assert [line.split()[0] for line in out.splitlines()] == ["on", "8xA100", "7xA100", "cpu:64"]
    assert "next: " in said


def test_machines_of_processors_share_the_work_and_send(capsys):
    plans = []
    for more in ((), ("--nodes", "16"), ("machine.nodes=16",)):
        _, out, _ = command("--model", "smollm2-135m", "--on", "cpu:16", "--json", *more, capsys=capsys)
        plans.append(json.loads(out))
    one, asked, written = plans
    assert asked["step_seconds"] == written["step_seconds"]
    assert asked["nodes"] == written["nodes"] == asked["world_size"] == 16
    assert asked["step_seconds"]["compute"][0] == pytest.approx(one["step_seconds"]["compute"][0] / 16)
    assert "gradients" not in one["step_seconds"]
    sent = 2 * 15 / 16 * 4 * one["num_parameters"] / 12.5e9
    assert asked["step_seconds"]["gradients"][0] == pytest.approx(sent, rel=1e-3)


def test_the_next_command_does_what_was_planned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.json").write_text(json.dumps(recipe(tmp_path, machine__micro_batch=2)))
    for more, said in (
        (("--processes", "2"), "llmkit run my.json --processes 2"),
        (("--nodes", "2", "--runs", "other"), "llmkit submit my.json --nodes 2 --runs other"),
        (("seed=3", "--smoke"), "llmkit run my.json seed=3 --smoke"),
    ):
        _, _, err = command("my.json", *more, capsys=capsys)
        assert err.rstrip().endswith(said)
    assert main(["pretrain", "my.json", "-n"]) == 0
    assert capsys.readouterr().err.rstrip().endswith("llmkit pretrain my.json")
    assert main(["finetune", "my.json", "-n"]) == 2
    assert "no `finetune` section" in capsys.readouterr().err


def test_a_runs_folder_is_the_model_that_it_made(tmp_path, capsys):
    config = AutoConfig.for_model(
        "llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=500
    )
    config.save_pretrained(tmp_path / "run/pretrain/model")
    plans = []
    for place in ("run", "run/pretrain/model"):
        _, out, _ = command("--model", str(tmp_path / place), "--on", "H100", "--json", capsys=capsys)
        plans.append(json.loads(out)["num_parameters"])
    assert plans[0] == plans[1] > 0


def test_settings_change_a_plan_without_a_recipe(capsys):
    words = ("pretrain.train.length=1B tokens", "machine.parallel=fsdp", "machine.recompute=full")
    _, out, _ = command("--model", "qwen3-8b", *words, "--on", "2x8xH100", "--json", capsys=capsys)
    plan = json.loads(out)
    assert plan["parallel"]["shard"] == 16
    assert (plan["recompute"], plan["nodes"]) == ("full", 2)
    assert plan["num_steps"] * plan["tokens_per_step"] >= 1e9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--on", "H100"), "a recipe or --model is missing"),
        (("--model", "lama-3.1-8b"), "did you mean llama-3.1-8b?"),
        (("--model", "qwen3-8b", "--price", "2"), "--on 8xH100 --price 2.5"),
        (("--model", "qwen3-8b", "--on", "2x8xH100", "--nodes", "3"), "and --nodes says 3"),
        (("--model", "qwen3-8b", "--on", ","), "names no hardware"),
        (("--smoke", "--model", "qwen3-8b", "--on", "H100"), "--smoke shrinks a recipe"),
        (("my.yaml", "--model", "qwen3-8b", "--on", "H100"), "my.yaml and --model qwen3-8b both say what"),
        (
            ("--model", "qwen3-8b", "--on", "8xH100", "--processes", "16"),
            "--processes is 16, but this machine has 8",
        ),
        (
            ("--model", "qwen3-8b", "--on", "2x8xH100", "--processes", "7"),
            "7 processes cannot be shared evenly by 2",
        ),
        (
            ("--model", "qwen3-8b", "machine.nodes=3", "--processes", "4"),
            "4 processes cannot be shared evenly by 3",
        ),
        (
            ("--model", "qwen3-8b", "--on", "2x8xH100", "machine.nodes=4"),
            "names 2 machines, and machine.nodes says 4",
        ),
        (
            ("--model", "qwen3-8b", "--on", "8xH100", "machine.parallel={shard: 3, tensor: 2}"),
            "or --processes 6",
        ),
        (
            ("--model", "qwen3-8b", "pretrain.train.length=2 epochs", "--on", "H100"),
            "no text that it could be counted",
        ),
        (("--model", "qwen3-8b", "machine.parallel={tensor: 3}", "--on", "8xH100,8xA100"), "tensor"),
    ],
)
def test_what_cannot_be_planned(words, said, capsys):
    code, out, err = command(*words, capsys=capsys)
    assert (code, out) == (2, "")
    assert said in err
