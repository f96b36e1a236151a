"""Memory, sending and time by hand, for a published model; and models beside the one that is trained."""

import json
from dataclasses import replace

import pytest
import torch

from llmkit.hardware import detect_cpu, named_hardware
from llmkit.models import cross_entropy
from llmkit.plan import DataFacts, make_plan, preset_fields, shape_of_config, shape_of_preset, training_memory
from llmkit.plan.communication import bytes_per_step, matrices_of
from llmkit.plan.cost import Step, bytes_sent, cost_of, seconds_of_step, whole_step, work_again
from llmkit.plan.memory import FEWEST_LOSS_ROWS, LOSS_CHUNK_BYTES, LOSS_CHUNK_BYTES_ELSEWHERE, Memory
from llmkit.plan.parallel import Layout
from llmkit.recipe.machine import Communication
from llmkit.recipe.objectives import Distil
from llmkit.recipe.schema import Recipe
from llmkit.run.planning import teacher_shape
from llmkit.train.trial import with_rows

LLAMA = shape_of_config(preset_fields("llama-3.1-8b"))
assert LLAMA is not None
PARAMETERS = 8_030_261_248
TABLE = 128_256 * 4096
BLOCK = 4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 14_336


def memory(**options):
    given = {
        "context": 4096,
        "micro_batch": 1,
        "precision": "bf16",
        "attention": "sdpa",
        "device": "cuda",
        **options,
    }
    return training_memory(LLAMA, **given)


def test_a_published_model_by_hand():
    """Four bytes each for weights and gradients, eight for AdamW; a bf16 copy of the blocks' matrices."""
    found = memory()
    assert PARAMETERS == 2 * TABLE + 32 * (BLOCK + 2 * 4096) + 4096
    assert found.weights == 4 * PARAMETERS + 2 * 32 * BLOCK
    assert (found.gradients, found.optimizer) == (4 * PARAMETERS, 8 * PARAMETERS)
    norms, heads, inner = 2 * 4096 * (4 + 4 + 2), 2 * 2 * 128 * (32 + 8), 4 * 2 * 14_336
    assert found.activations == 4096 * (32 * (norms + heads + inner) + 4096 * 10)
    assert found.logits == 523 * 128_256 * 8 + 8 * TABLE  # 256 MiB of fp32 logits are 523 rows
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations + found.logits
    fp32 = memory(precision="fp32")
    assert fp32.weights + fp32.gradients + fp32.optimizer == 16 * PARAMETERS


def test_shards_split_layers_and_buckets():
    rest = PARAMETERS - 32 * BLOCK
    shared = memory(layout=Layout(shard=8))
    each = -(-PARAMETERS // 8)
    assert (shared.gradients, shared.optimizer) == (4 * each, 8 * each)
    assert shared.weights == 4 * each  # what is gathered in bf16 is not kept
    # Two blocks and the gradients of one in bf16, these once more in fp32; the rest and its gradients in fp32.
    assert shared.buffers == (2 * 2 + 2 + 4) * BLOCK + 2 * 4 * rest
    assert memory(layout=Layout(shard=8), precision="fp32").buffers == 4 * (4 * BLOCK + 2 * rest)
    split = memory(layout=Layout(tensor=8))
    assert split.gradients == 4 * (rest + 4 * BLOCK)
    assert split.buffers == 0
    norms, inside = 2 * 4096 * 10, (2 * 2 * 128 * 40 + 4 * 2 * 14_336) // 8
    assert split.activations == 4096 * (32 * (norms + inside) + 4096 * 10)
    assert memory(layout=Layout(replicate=8)).buffers == 4 * PARAMETERS
    away = memory(layout=Layout(shard=8), offload=True)
    assert (away.gradients, away.optimizer, away.host) == (0, 0, 16 * each)
    assert away.total == shared.total - 16 * each


def test_what_is_computed_again_is_not_kept():
    none, some, full = (memory(recompute=how) for how in ("none", "selective", "full"))
    last = 4096 * 4096 * 10
    block = (none.activations - last) // 32
    assert full.activations == 4096 * 32 * 4 * 4096 + block + last
    assert full.activations < some.activations < none.activations
    assert work_again(LLAMA, "full") == pytest.approx(1 + 32 * BLOCK / (32 * BLOCK + TABLE) / 3)
    assert work_again(LLAMA, "selective") == 1
    recurrent = shape_of_preset("cnn-tiny", 1000, 64)
    given = {"context": 64, "micro_batch": 2, "precision": "fp32", "attention": "sdpa"}
    assert (
        training_memory(recurrent, recompute="full", **given).activations
        < training_memory(recurrent, **given).activations
    )


def test_terms_add_up_and_zeros_are_marked():
    marked = memory(zeros=True)
    assert marked.optimizer - memory().optimizer == 32 * BLOCK  # a byte for each number of a matrix
    both = marked + Memory.of(weights=5, host=7)
    assert (both.total - marked.total, both.host, both.weights - marked.weights) == (5, 7, 5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_loss_keeps_to_the_chunk_that_is_planned(device):
    budget = LOSS_CHUNK_BYTES.get(device, LOSS_CHUNK_BYTES_ELSEWHERE)
    for entries in (1000, 32_000, 250_000):
        weight = torch.empty(entries, 1, device="cpu" if device == "cpu" else "meta")
        assert cross_entropy._chunk_rows(weight) == max(FEWEST_LOSS_ROWS, budget // (4 * entries))


# --- time and money ---


def step(**changes):
    made = {
        "model": LLAMA, "num_trained": PARAMETERS, "flops": 1e18, "recompute": "none", "layout": Layout(replicate=8),
        "accumulation": 4, "micro_tokens": 4096, "precision": "bf16", "state_bytes": 8.0,
        "communication": Communication(),
    }  # fmt: skip
    return Step(**{**made, **changes})


def test_bytes_that_are_sent():
    assert bytes_sent(step())["gradients"] == 2 * 7 / 8 * 4 * PARAMETERS
    assert (
        bytes_sent(step(communication=Communication(gradients="bf16")))["gradients"]
        == 2 * 7 / 8 * 2 * PARAMETERS
    )
    shared = bytes_sent(step(layout=Layout(shard=8)))
    assert shared["gradients"] == 0
    blocks = 32 * BLOCK
    # Blocks twice in bf16, what is beside them once in fp32, and all gradients in fp32.
    assert shared["gathers"] == 4 * 7 / 8 * (2 * 2 * blocks + 4 * (PARAMETERS - blocks) + 4 * PARAMETERS)
    exact = bytes_sent(step(layout=Layout(shard=8), precision="fp32"))
    assert exact["gathers"] == 4 * 7 / 8 * (2 * 4 * blocks + 4 * (PARAMETERS - blocks) + 4 * PARAMETERS)
    split = bytes_sent(step(layout=Layout(tensor=8)))
    assert split["gathers"] == 0
    assert split["layers"] == 4 * 32 * 4 * 2 * 7 / 8 * 4096 * 4096 * 2
    hybrid = bytes_sent(step(layout=Layout(replicate=2, shard=8)))
    assert hybrid["gradients"] == pytest.approx(4 * PARAMETERS / 8, rel=1e-6)


def test_what_replicas_send_is_what_the_plan_of_communication_says():
    thin, seldom = (
        Communication(gradients="powersgd"),
        Communication.model_validate({"local_steps": {"every": 8}}),
    )
    shapes = matrices_of(LLAMA)
    assert shapes is not None
    factors = bytes_sent(step(communication=thin, shapes=shapes))["gradients"]
    assert factors == bytes_per_step(thin, shapes, 8) < 0.02 * bytes_sent(step())["gradients"]
    assert bytes_sent(step(communication=thin))["gradients"] == bytes_sent(step())["gradients"]  # at most
    assert bytes_sent(step(communication=seldom))["gradients"] == bytes_sent(step())["gradients"] / 8


def test_seconds_and_dollars():
    hardware = named_hardware("8xH100")
    parts = seconds_of_step(step(), hardware, 1)
    assert parts["compute"] == (
        pytest.approx(1e18 / (8 * 0.5 * 989.4e12)),
        pytest.approx(1e18 / (8 * 0.15 * 989.4e12)),
    )
    assert parts["gradients"][0] == pytest.approx(2 * 7 / 8 * 4 * PARAMETERS / 450e9)
    assert parts["optimizer"][0] == pytest.approx(28 * PARAMETERS / 3.35e12)
    low, high = whole_step(parts)
    assert low == parts["compute"][0] + parts["optimizer"][0]  # all that is sent is hidden
    assert high == pytest.approx(sum(part[1] for part in parts.values()))
    assert cost_of((3600, 7200), 8, replace(hardware, price=(2.0, 3.0))) == (16, 48)
    assert cost_of((3600, 7200), 8, replace(hardware, price=None)) is None
    assert seconds_of_step(step(), replace(hardware, peak_flops=None), 1) == {}
    slow = seconds_of_step(step(layout=Layout(replicate=16)), replace(hardware, network=1e9), 2)
    assert slow["gradients"][0] == pytest.approx(2 * 15 / 16 * 4 * PARAMETERS / 1e9)


# --- beside the model ---


def planned(hardware="8xA100", **section):
    made = {
        "model": {"preset": "gpt-tiny", "context": 128},
        "train": {"length": "9 steps", "batch": "64 samples"},
    }
    recipe = Recipe.model_validate({"llmkit": 1, "pretrain": {**made, **section.pop("pretrain", {})}})
    data = DataFacts(1_000_000, 1, 4_000_000, exact=True)
    preset = recipe.pretrain.model.preset
    model = section.pop("shape", None) or shape_of_preset(preset, 2000, 128)
    return make_plan(recipe, named_hardware(hardware), data, vocab_size=2000, model=model, **section)


def test_a_teacher_takes_its_weights_on_every_device(tmp_path):
    distil = {"distil": {"teacher": "t"}}
    teacher = shape_of_preset("gpt-small", 2000, 128)
    without, beside = planned(pretrain=distil), planned(pretrain=distil, teacher=teacher)
    assert beside.memory.total - without.memory.total == beside.memory.teacher == 4 * teacher.num_parameters
    assert any("not in these figures" in note for note in without.notes)
    assert not any("not in these figures" in note for note in beside.notes)
    cached = planned(pretrain={"distil": {"teacher": "t", "cache": {}}}, teacher=teacher)
    assert cached.memory.teacher == 0
    (tmp_path / "config.json").write_text(json.dumps({**preset_fields("gpt-small"), "vocab_size": 2000}))
    found = teacher_shape(Distil(teacher=str(tmp_path)))
    assert found is not None
    assert found.num_parameters == teacher.num_parameters
    assert teacher_shape(Distil(teacher="owner/name")) is None
    assert teacher_shape(None) is None


def test_electras_generator_is_counted_as_it_is_built():
    from transformers import AutoConfig

    from llmkit.models.build import AUTO_CLASSES
    from llmkit.objectives.electra import Electra
    from llmkit.plan import with_lengths
    from llmkit.plan.beside import generator_shape

    section = {"objective": "electra", "model": {"preset": "electra-tiny", "context": 64}}
    train = {"length": "9 steps", "batch": "64 samples"}
    recipe = Recipe.model_validate({"llmkit": 1, "pretrain": {**section, "train": train}})
    fields = with_lengths(preset_fields("electra-tiny"), 2000, 64)
    shape = shape_of_config(fields, "detector")
    found = generator_shape(recipe.pretrain, fields, shape)
    config = AutoConfig.for_model(**fields)
    model = AUTO_CLASSES["detector"].from_config(config)
    generator = Electra(None, recipe.pretrain.electra).parts(model)["generator"]
    shared = {id(p) for p in model.parameters()}
    own = sum(p.numel() for p in generator.parameters() if id(p) not in shared)
    tables = model.electra.embeddings
    norms = sum(p.numel() for p in tables.LayerNorm.parameters())
    assert found.num_parameters - norms == own
    alone = planned(pretrain=section, shape=shape)
    beside = planned(pretrain=section, shape=shape, generator=found)
    assert beside.memory.optimizer - alone.memory.optimizer == 8 * found.num_parameters
    assert beside.memory.activations > alone.memory.activations
    assert beside.flops_per_token > alone.flops_per_token


@pytest.mark.parametrize("hardware", [detect_cpu(), named_hardware("1xH100")], ids=["cpu", "gpu"])
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_memory_of_other_rows_is_that_of_a_plan_for_them(hardware, rows):
    """A chunk of the loss has 1,048 positions on one device and 8,388 on the other: here 8 rows, there no 64."""

    def of(micro_batch):
        section = {
            "model": {"preset": "gpt-tiny", "context": 128},
            "train": {"length": "9 steps", "batch": "64 samples"},
        }
        machine = {"micro_batch": micro_batch, "processes": 1, "precision": "bf16"}
        recipe = Recipe.model_validate({"llmkit": 1, "pretrain": section, "machine": machine})
        data = DataFacts(1_000_000, 1, 4_000_000, exact=True)
        return make_plan(
            recipe, hardware, data, vocab_size=8000, model=shape_of_preset("gpt-tiny", 8000, 128)
        )

    found, wanted = with_rows(of(4), rows).memory, of(rows).memory
    assert found.terms() == pytest.approx(wanted.terms(), abs=2)
    assert found.total == pytest.approx(wanted.total, abs=4)
    assert (found.total > of(4).memory.total) == (rows > 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_of_many_lengths_take_more_of_the_heap(precision):
    given = {"device": "cpu", "process": 430_000_000, "precision": precision}
    even, many = memory(**given), memory(**given, many_lengths=True)
    needed = even.activations + even.logits
    assert (even.heap, many.heap) == (int(0.85 * needed), int(1.15 * needed))
    assert many.process - even.process == (0 if precision == "fp32" else 250_000_000)
    without = memory(precision=precision, many_lengths=True)  # on a GPU, whose allocator is another
    assert without == memory(precision=precision)
