"""A plan's numbers against hand counts, and against transformers for parameters."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import ExitCode
from llmkit.hardware import Hardware
from llmkit.plan import (
    PRESETS,
    DataFacts,
    Plan,
    PlanError,
    SourceFacts,
    describe,
    flops_per_token,
    make_plan,
    rows_of_batch,
    shape_of_preset,
    training_memory,
)
from llmkit.plan.batch import divisors, largest_divisor, share_rows
from llmkit.plan.describe import bytes_text, seconds_text, short
from llmkit.plan.memory import CPU_PROCESS_BYTES, HEAP_SHARE
from llmkit.recipe.schema import Recipe
from llmkit.recipe.units import Amount

CPU = Hardware("cpu", 1, "Made-up Xeon", 16 * 10**9, 2, bf16=True, peak_flops=None)
H100 = Hardware("cuda", 8, "NVIDIA H100 80GB HBM3", 80 * 10**9, 64, bf16=True, peak_flops=989.4e12)
DATA = DataFacts(num_tokens=1_000_000, num_documents=500, num_bytes=4_000_000, exact=True)


def recipe(
    length: str = "100 steps",
    batch: str = "64 samples",
    *,
    machine: dict[str, Any] | None = None,
    **pretrain: Any,
) -> Recipe:
    optim = pretrain.pop("optim", {})
    pretrain.setdefault("model", {"preset": "gpt-tiny", "context": 128})
    section = {"train": {"length": length, "batch": batch, "optim": optim}, **pretrain}
    return Recipe.model_validate({"llmkit": 1, "pretrain": section, "machine": machine or {}})


def plan_of(
    wanted: Recipe,
    hardware: Hardware = CPU,
    data: DataFacts = DATA,
    *,
    preset: str = "gpt-tiny",
    **options: Any,
) -> Plan:
    assert wanted.pretrain
    model = shape_of_preset(preset, 2048, wanted.pretrain.model.context)
    return make_plan(wanted, hardware, data, vocab_size=2048, model=model, **options)


def test_a_decoder_that_would_write_more_than_it_can_is_refused() -> None:
    """Three quarters taken out: 128 positions hold a text of 381 tokens, of which the decoder writes 286 and marks."""
    section = {"objective": "span", "span": {"ratio": 0.75, "mean_length": 9}}
    wanted = recipe(**section, model={"preset": "bart-tiny", "context": 128})
    assert wanted.pretrain
    with pytest.raises(
        PlanError, match=r"writes up to \d+ tokens a row, but this model at most 128"
    ) as caught:
        plan_of(wanted, preset="bart-tiny")
    assert "span.ratio" in caught.value.hint
    for preset, ratio in (("t5-tiny", 0.75), ("bart-tiny", 0.15)):
        section["span"] = {"ratio": ratio, "mean_length": 9}
        fits = recipe(**section, model={"preset": preset, "context": 128})
        assert plan_of(fits, preset=preset).num_steps == 100


def test_a_prompt_without_a_gap_is_noted_where_gaps_are_filled() -> None:
    prompts = ["no gap", "a [MASK] here"]
    masked = recipe(objective="mlm", model={"preset": "bert-tiny", "context": 128}, prompts=prompts)
    notes = [note for note in plan_of(masked, preset="bert-tiny").notes if "[MASK]" in note]
    assert notes == ["the prompt 'no gap' has no [MASK], so nothing is shown for it"]
    assert not [note for note in plan_of(recipe(prompts=prompts)).notes if "[MASK]" in note]


# --- the model's numbers ---


def test_flops_against_a_count_by_hand() -> None:
    # gpt-tiny: 4 blocks of 4 x 128 x 128 and 3 x 128 x 320, and a head of 2048 x 128, each 2 forward and 4 backward;
    # attention: 128 positions, scores and values, 2 x 128 wide each, three times over, 4 blocks.
    by_hand = 6 * (4 * (4 * 128 * 128 + 3 * 128 * 320) + 2048 * 128) + 3 * 4 * (2 * 128 * 128 + 2 * 128 * 128)
    assert by_hand == 6_881_280
    assert flops_per_token(shape_of_preset("gpt-tiny", 2048, 128), 128) == by_hand


def test_flops_against_torchs_counter() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {
        **PRESETS["gpt-tiny"],
        "vocab_size": 2048,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
    }
    model = LlamaForCausalLM(LlamaConfig(**fields))
    ids = torch.zeros(2, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    rope = 2 * 2 * 64 * 16  # positions x frequencies, as a matrix product, forward only
    assert counter.get_total_flops() == pytest.approx(
        2 * 64 * flops_per_token(shape_of_preset("gpt-tiny", 2048, 64), 64) + rope, rel=1e-4
    )


@pytest.mark.parametrize(
    ("precision", "attention"), [("fp32", "sdpa"), ("fp32", "eager"), ("bf16", "sdpa"), ("bf16", "eager")]
)
def test_activation_estimate_is_near_what_torch_keeps(precision: str, attention: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {
        **PRESETS["gpt-tiny"],
        "vocab_size": 512,
        "max_position_embeddings": 128,
        "attn_implementation": attention,
    }
    model = LlamaForCausalLM(LlamaConfig(**fields))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    casting = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), casting:
        model.model(torch.zeros(4, 128, dtype=torch.long))
    num_bytes = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)
    shape = shape_of_preset("gpt-tiny", 512, 128)
    memory = training_memory(shape, context=128, micro_batch=4, precision=precision, attention=attention)
    copies = memory.weights - 4 * shape.num_parameters
    assert memory.activations + copies == pytest.approx(num_bytes, rel=0.2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eager_attention_keeps_the_scores_that_are_planned(precision: str) -> None:
    """What torch keeps with it and not with SDPA, at a length where scores are most of it."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    def saved(attention: str) -> int:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=100,
            attn_implementation=attention,
        )  # fmt: skip
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        casting = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), casting:
            found = LlamaModel(config)(torch.zeros(2, 256, dtype=torch.long)).last_hidden_state
        assert found.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    scores = 2 * 4 * 256 * 256
    expected = 3 * scores * {"fp32": 4, "bf16": 6}[precision]
    assert saved("eager") - saved("sdpa") == pytest.approx(expected, rel=0.02)


def test_scores_in_large_pieces_are_given_back_by_the_heap() -> None:
    shape = shape_of_preset("gpt-mini", 8000, 512)
    below, above = (
        training_memory(
            shape,
            context=512,
            micro_batch=rows,
            precision="fp32",
            attention="eager",
            process=CPU_PROCESS_BYTES,
        )
        for rows in (7, 8)
    )
    assert 7 * 4 * 512 * 512 * 4 < 32 * 2**20 <= 8 * 4 * 512 * 512 * 4
    for memory, scores in ((below, 0), (above, 6 * 8 * 4 * 512 * 512 * 4)):
        assert memory.heap == int(HEAP_SHARE * (memory.activations + memory.logits - scores))


def test_memory_by_term() -> None:
    shape = shape_of_preset("gpt-mini", 8000, 512)
    memory = training_memory(shape, context=512, micro_batch=4, precision="fp32", attention="sdpa")
    parameters = shape.num_parameters
    assert (memory.weights, memory.gradients, memory.optimizer) == (
        4 * parameters,
        4 * parameters,
        8 * parameters,
    )
    # A chunk of 32 MiB of fp32, and the gradient of the output layer.
    assert memory.logits == 1048 * 8000 * 4 + 4 * 8000 * 256
    per_block = 2 * 256 * 12 + 2 * 4 * 64 * 8 + 4 * 4 * 704
    assert memory.activations == 4 * 512 * (6 * per_block + 256 * 12)
    assert memory.total == 16 * parameters + memory.activations + memory.logits
    eager = training_memory(shape, context=512, micro_batch=4, precision="fp32", attention="eager")
    # Six layers keep probabilities, and one has them in the making.
    assert eager.activations - memory.activations == (6 + 3) * 4 * 4 * 512 * 512 * 4
    bf16 = training_memory(shape, context=512, micro_batch=4, precision="bf16", attention="sdpa")
    assert bf16.weights == 4 * parameters + 2 * (shape.num_matmul_parameters - 8000 * 256)
    # Under bf16 a chunk is there in 2 bytes before and after too; so are the output layer, and a share of its gradient.
    assert bf16.logits == 1048 * 8000 * 8 + 8 * 8000 * 256
    assert bf16.activations < memory.activations


# --- the batch ---


@pytest.mark.parametrize(
    ("batch", "context", "rows", "rounded"),
    [
        ("32Ki tokens", 512, 64, False),
        ("64Ki tokens", 512, 128, False),
        ("256k tokens", 1024, 256, True),
        ("100k tokens", 512, 192, True),
        ("48 samples", 512, 48, False),
        ("7 samples", 512, 7, False),
        ("4Ki tokens", 512, 8, False),
        ("1536 tokens", 512, 4, True),
        ("1300 tokens", 512, 2, True),
        ("512 tokens", 512, 1, False),
        ("32000 tokens", 512, 64, True),
        ("49152 tokens", 512, 128, True),
    ],
)
def test_rows_of_a_batch(batch: str, context: int, rows: int, rounded: bool) -> None:
    number, unit = batch.split()
    value = int(number.replace("Ki", "")) * 1024 if "Ki" in number else int(number.replace("k", "000"))
    found, note = rows_of_batch(Amount(value, unit), context)  # type: ignore[arg-type]
    assert found == rows
    assert bool(note) == rounded
    assert (f"{rows} rows" in note) == rounded


def test_batch_below_a_row() -> None:
    with pytest.raises(PlanError, match=r"less than one row(.|\n)*train.batch=128 tokens") as caught:
        plan_of(recipe(batch="100 tokens"))
    assert caught.value.exit_code is ExitCode.USAGE


@settings(deadline=None)
@given(
    batch=st.one_of(
        st.builds(Amount, st.integers(1, 4096), st.just("samples")),
        st.builds(Amount, st.integers(128, 2**22), st.just("tokens")),
    ),
    processes=st.integers(1, 64),
    cuda=st.booleans(),
)
def test_shares_always_add_up(batch: Amount, processes: int, cuda: bool) -> None:
    hardware = replace(H100, num_devices=processes) if cuda else CPU
    wanted = recipe(batch=str(batch), machine={} if cuda else {"processes": processes})
    try:
        plan = plan_of(wanted, hardware)
    except PlanError:
        assert rows_of_batch(batch, 128)[0] % processes
        return
    assert plan.micro_batch_size * plan.gradient_accumulation_steps * plan.world_size == plan.rows_per_step
    assert plan.tokens_per_step == plan.rows_per_step * 128
    assert plan.world_size == processes
    if not cuda:
        assert plan.micro_batch_size <= 2048 // 128


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_divisors(number: int, limit: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
    assert largest_divisor(number, limit) == max(
        d for d in range(1, min(number, limit) + 1) if number % d == 0
    )


def test_a_batch_that_devices_cannot_share() -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(recipe(batch="64 samples", machine={"processes": 3}))
    assert "64 rows cannot be shared equally by 3 processes" in caught.value.message
    assert caught.value.hint == "batches that fit: 63 samples or 66 samples; processes that fit: 1, 2, 4, 8"
    with pytest.raises(PlanError, match=r"batches that fit: 8 samples; processes that fit: 1, 2, 4"):
        share_rows(4, 8, 1)


def test_the_processes() -> None:
    assert plan_of(recipe(), H100).world_size == 8
    assert plan_of(recipe(), CPU).world_size == 1
    assert plan_of(recipe(machine={"processes": 2}), H100).world_size == 2
    assert plan_of(recipe(machine={"processes": 2}), world_size=4).world_size == 4
    assert plan_of(recipe(), H100, world_size=16).world_size == 16
    with pytest.raises(PlanError, match=r"processes is 16, but this machine has 8"):
        plan_of(recipe(machine={"processes": 16}), H100)
    with pytest.raises(PlanError, match="cannot be shared equally by 5"):
        plan_of(recipe(), world_size=5)


def test_gpus_that_cannot_share_the_batch_are_told_what_would_fit() -> None:
    six = replace(H100, num_devices=6)
    with pytest.raises(PlanError, match="64 rows cannot be shared equally by 6 GPUs") as caught:
        plan_of(recipe(batch="64 samples"), six)
    assert caught.value.hint == (
        "batches that fit: 60 samples or 66 samples; or machine.processes=4, and 2 stay idle"
    )
    assert plan_of(recipe(batch="64 samples", machine={"processes": 4}), six).world_size == 4
    assert plan_of(recipe(batch="66 samples"), six).world_size == 6
    with pytest.raises(PlanError, match=r"6 GPUs are no multiple(.|\n)*machine.processes=4, and 2 stay idle"):
        plan_of(recipe(machine={"parallel": {"tensor": 4}}), six)
    assert plan_of(recipe(machine={"parallel": {"tensor": 2}}), H100).world_size == 8


def test_gpus_of_several_kinds_are_not_used_together() -> None:
    unlike = replace(H100, num_devices=3, unlike=("0: H100", "1: T4", "2: H100"))
    for pinned in ({}, {"processes": 2}):
        with pytest.raises(PlanError, match=r"not of one kind \(0: H100, 1: T4, 2: H100\)") as caught:
            plan_of(recipe(machine=pinned), unlike)
        assert "CUDA_VISIBLE_DEVICES=0,2 " in caught.value.hint
    assert plan_of(recipe(machine={"processes": 1}), unlike).world_size == 1


def test_the_micro_batch() -> None:
    plan = plan_of(recipe(batch="64 samples"))
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == (16, 4)
    odd = plan_of(recipe(batch="37 samples"))
    assert (odd.micro_batch_size, odd.gradient_accumulation_steps) == (1, 37)
    pinned = plan_of(recipe(batch="64 samples", machine={"micro_batch": 4}))
    assert (pinned.micro_batch_size, pinned.gradient_accumulation_steps) == (4, 16)
    assert "machine.micro_batch" not in pinned.choices
    with pytest.raises(
        PlanError, match=r"micro_batch 5 does not divide the 64 rows(.|\n)*fits: 1, 2, 4, 8, 16, 32, 64"
    ):
        plan_of(recipe(batch="64 samples", machine={"micro_batch": 5}))


def test_the_micro_batch_fills_a_gpu_but_not_more() -> None:
    wanted = recipe(batch="4096 samples", model={"preset": "gpt-1b", "context": 2048})
    plan = plan_of(wanted, replace(H100, num_devices=1), preset="gpt-1b")
    shape = shape_of_preset("gpt-1b", 2048, 2048)
    twice = training_memory(
        shape, context=2048, micro_batch=2 * plan.micro_batch_size, precision="bf16", attention="sdpa"
    )
    assert plan.memory.total <= 0.85 * H100.memory_bytes < twice.total
    assert plan_of(recipe(batch="64 samples"), replace(H100, num_devices=8)).micro_batch_size == 8


def test_memory_that_does_not_suffice_is_said() -> None:
    wanted = recipe(model={"preset": "gpt-1b", "context": 128})
    plan = plan_of(wanted, preset="gpt-1b")
    assert plan.micro_batch_size == 1
    assert any("memory may not suffice" in note for note in plan.notes)
    assert not any("memory" in note for note in plan_of(recipe()).notes)


# --- the length ---


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ("20 steps", 20),
        ("81920 tokens", 10),
        ("81921 tokens", 11),
        ("1 token", 1),
        ("1 epoch", 123),
        ("2 epochs", 245),
    ],
)
def test_length_in_steps(length: str, steps: int) -> None:
    plan = plan_of(recipe(length))  # 64 rows of 128 tokens a step; (1,000,000 - 1) // 128 = 7,812 rows
    assert plan.num_rows_per_epoch == 7812
    assert plan.num_steps == steps
    assert plan.num_epochs == pytest.approx(steps * 64 / 7812)


def test_rows_are_cut_by_source() -> None:
    sources = [SourceFacts("a", 300, 1, 900), SourceFacts("b", 129, 1, 300), SourceFacts("c", 128, 1, 300)]
    plan = plan_of(recipe("1 step", "1 sample"), data=replace(DATA, num_tokens=557, per_source=sources))
    assert plan.num_rows_per_epoch == 2 + 1 + 0
    with pytest.raises(PlanError, match=r"128 tokens, fewer than the 129"):
        plan_of(recipe(), data=replace(DATA, num_tokens=128))


def test_intervals_and_warmup() -> None:
    plan = plan_of(
        recipe("1000 steps", optim={"warmup": "2%"}, checkpoint={"every": "never"}, eval={"every": "5%"})
    )
    assert (plan.warmup_steps, plan.checkpoint_every, plan.eval_every) == (20, 0, 50)
    plan = plan_of(
        recipe(
            "5 steps",
            optim={"warmup": "16384 tokens"},
            checkpoint={"every": "10%"},
            eval={"every": "1 epoch"},
        )
    )
    assert (plan.warmup_steps, plan.checkpoint_every, plan.eval_every) == (2, 1, 122)
    assert dict(plan.deferred) == {}


def test_a_length_in_time_is_settled_later() -> None:
    wanted = recipe("1h", optim={"warmup": "10%"}, checkpoint={"every": "10m"}, eval={"every": "50 steps"})
    plan = plan_of(wanted)
    assert (plan.num_steps, plan.length_seconds, plan.num_epochs) == (None, 3600, None)
    assert (plan.warmup_steps, plan.checkpoint_every, plan.eval_every) == (None, None, 50)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    settled = plan.with_steps(600)
    assert (settled.num_steps, settled.warmup_steps, settled.checkpoint_every, settled.eval_every) == (
        600,
        60,
        100,
        50,
    )
    assert settled.num_epochs == pytest.approx(600 * 64 / 7812)
    assert settled.deferred == {}


def test_an_interval_in_time_needs_a_speed() -> None:
    plan = plan_of(recipe("1000 steps", checkpoint={"every": "10m"}))
    assert plan.checkpoint_every is None
    with pytest.raises(ValueError, match="checkpoint_every is a time"):
        plan.with_steps(1000)
    assert plan.with_steps(1000, seconds_per_step=2.0).checkpoint_every == 300
    with pytest.raises(ValueError, match="at least 1"):
        plan.with_steps(0)


# --- what the machine decides ---


def test_precision() -> None:
    slow = replace(CPU, bf16=False)
    assert plan_of(recipe()).choices["machine.precision"] == ("bf16", "this processor has bf16 in hardware")
    assert plan_of(recipe(), slow).precision == "fp32"
    forced = plan_of(recipe(machine={"precision": "bf16"}), slow)
    assert forced.precision == "bf16"
    assert any("only emulates" in note for note in forced.notes)
    assert "machine.precision" not in forced.choices


@pytest.mark.parametrize(
    ("length", "hardware", "compiled"),
    [
        ("10 steps", CPU, False),
        ("1M steps", CPU, True),
        ("3m", CPU, False),
        ("5m", CPU, True),
        ("10m", replace(CPU, bf16=False), False),
        ("1h", replace(CPU, bf16=False), True),
        ("1h", replace(CPU, compiler=False), False),
        ("1h", replace(CPU, device="mps"), False),
        ("1M steps", replace(H100, peak_flops=None), False),
        ("1h", H100, True),
    ],
)
def test_compile_when_it_pays(length: str, hardware: Hardware, compiled: bool) -> None:
    plan = plan_of(recipe(length), hardware)
    assert plan.compile is compiled
    assert plan.choices["machine.compile"][0] is compiled
    assert plan_of(recipe(length, machine={"compile": not compiled}), hardware).compile is not compiled


def test_time_is_flops_by_rate() -> None:
    plan = plan_of(recipe("1000 steps"))
    flops = 1000 * 64 * 128 * plan.flops_per_token
    assert (plan.seconds_low, plan.seconds_high) == (
        pytest.approx(flops / 600e9),
        pytest.approx(flops / 160e9),
    )
    two = plan_of(recipe("1000 steps", machine={"processes": 2}))
    assert two.seconds_high == plan.seconds_high, "processes on one processor share its cores"
    gpu = plan_of(recipe("1000 steps"), H100)
    assert gpu.seconds_low == pytest.approx(flops / (8 * 0.30 * 989.4e12))
    unknown = plan_of(recipe(), replace(H100, peak_flops=None))
    assert unknown.seconds_low is None
    assert any("speed is not known" in note for note in unknown.notes)


def test_notes_about_the_data() -> None:
    plan = plan_of(recipe("10 epochs", "32k samples"), data=replace(DATA, exact=False))
    text = "\n".join(plan.notes)
    assert "estimated from file sizes" in text
    assert "every row is read 12.3 times" in text
    assert "32000 rows, but the data only 7812" in text
    assert plan_of(recipe()).notes == ()


def test_models_that_cannot_hold_the_text() -> None:
    wanted = recipe(model={"preset": "gpt-tiny", "context": 256})
    with pytest.raises(PlanError, match=r"256 tokens, but this model reads at most 128"):
        make_plan(wanted, CPU, DATA, vocab_size=2048, model=shape_of_preset("gpt-tiny", 2048, 128))
    with pytest.raises(PlanError, match=r"2,049 entries, but the model's embedding only 2,048"):
        make_plan(recipe(), CPU, DATA, vocab_size=2049, model=shape_of_preset("gpt-tiny", 2048, 128))
    with pytest.raises(PlanError, match="no `pretrain` section"):
        make_plan(
            Recipe.model_validate({"llmkit": 1, "eval": {}}),
            CPU,
            DATA,
            vocab_size=1,
            model=shape_of_preset("gpt-tiny", 1, 8),
        )


def test_every_auto_is_a_choice_with_a_reason() -> None:
    choices = plan_of(recipe(), H100).choices
    assert set(choices) == {
        f"machine.{k}"
        for k in (
            "device",
            "processes",
            "parallel",
            "recompute",
            "precision",
            "compile",
            "micro_batch",
            "background_save",
        )
    }
    assert all(why for _, why in choices.values())


# --- in JSON and in words ---


def test_round_trip_through_json() -> None:
    plan = plan_of(recipe(batch="100k tokens"))
    plain = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(plain) == plan
    assert plain["memory"]["total"] == plan.memory.total
    with pytest.raises(ValueError, match="memory"):
        Plan.from_dict({key: value for key, value in plain.items() if key != "memory"})


def test_the_plan_in_words() -> None:
    said = {(section, key): text for section, key, text in describe(plan_of(recipe()))}
    assert said["batch", "step"] == "64 rows, 8,192 tokens"
    assert said["batch", "shared as"].startswith("16 rows x 4 accumulated x 1 process (about 2,048 tokens")
    assert said["machine", "precision"] == "bf16 (this processor has bf16 in hardware)"
    assert said["data", "learned"] == "at most 128 tokens of a row (100.0%)"
    assert said["model", "FLOPs"].endswith(" in all")
    assert said["length", "steps"] == "100 (819k tokens, 0.82 epochs)"
    assert said["length", "checkpoint"] == "every 10 steps, and at the end"
    assert said["model", "parameters"] == "1,016,960 (1.02M)"
    timed = {key: text for _, key, text in describe(plan_of(recipe("1h", checkpoint={"every": "10m"})))}
    assert timed["steps"] == "as many as fit 1h"
    assert timed["checkpoint"] == "10m (in steps once the speed is measured)"


def test_numbers_in_words() -> None:
    assert [short(n) for n in (999, 1000, 6_947_072, 1.2e9, 999_600)] == [
        "999",
        "1k",
        "6.95M",
        "1.2B",
        "1M",
    ]
    assert [bytes_text(n) for n in (12, 12_345_678, 3 * 10**9)] == ["12 B", "12.3 MB", "3.0 GB"]
    assert [seconds_text(s) for s in (9.6, 60, 95, 5430, 90_000)] == ["10s", "1m", "1m35s", "1h30m", "1d1h"]


def test_copies_beside_gpus_are_held_against_the_machines_own_memory() -> None:
    """Of a model that all hold the first process copies; of one that they share, each its part: as much in all."""
    one = plan_of(recipe(), H100).checkpoint_bytes
    for parallel in ("ddp", "fsdp"):
        wanted = recipe(machine={"parallel": parallel})
        assert plan_of(wanted, H100).background_save, "not known, and taken to fit"
        assert "not known here" in plan_of(wanted, H100).choices["machine.background_save"][1]
        assert plan_of(wanted, replace(H100, host_memory_bytes=2 * one)).background_save
        assert not plan_of(wanted, replace(H100, host_memory_bytes=one)).background_save
