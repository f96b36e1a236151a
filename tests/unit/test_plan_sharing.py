"""Who shares what: pinned layouts verified, automatic ones chosen, for any number of processes."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.hardware import named_hardware
from llmkit.plan import DataFacts, PlanError, make_plan, preset_fields, shape_of_config, shape_of_preset
from llmkit.plan.batch import divisors
from llmkit.plan.memory import Memory
from llmkit.plan.parallel import Layout
from llmkit.plan.sharing import World, check_shared, layouts, resolve_sharing, splits, words_of
from llmkit.recipe.machine import Machine
from llmkit.recipe.schema import Recipe

SHAPE = shape_of_config(preset_fields("llama-3.1-8b"))
assert SHAPE is not None


def resolve(
    parallel: Any = "auto",
    size: int = 8,
    *,
    nodes: int = 1,
    device: str = "cuda",
    rows: int = 64,
    fits=None,
    **more,
):
    """The decision, where `fits(layout, recompute)` says what is small enough."""

    def memory_of(layout: Layout, recompute: str) -> Memory:
        # Without a say, what is shared most takes least.
        taken = 1000 // layout.world_size * layout.replicate - ("none", "selective", "full").index(recompute)
        return Memory.of(weights=1 if fits is not None and fits(layout, recompute) else 100 + taken)

    machine = Machine.model_validate({"parallel": parallel, **more})
    world = World(size, size // nodes, nodes, device)
    return resolve_sharing(machine, world, SHAPE, rows=rows, available=10, memory_of=memory_of)


def test_the_least_sharing_that_fits_is_taken():
    def only(wanted: Layout):
        return lambda layout, recompute: layout == wanted

    assert resolve(fits=only(Layout(replicate=8))).layout == Layout(replicate=8)
    assert resolve(size=16, nodes=2, fits=only(Layout(replicate=2, shard=8))).layout == Layout(2, 8)
    assert resolve(size=16, nodes=2, fits=only(Layout(shard=16))).layout == Layout(shard=16)
    assert resolve(fits=only(Layout(shard=2, tensor=4))).layout == Layout(shard=2, tensor=4)
    found = resolve(fits=lambda layout, recompute: recompute == "selective")
    assert (found.layout, found.recompute, found.fits) == (Layout(replicate=8), "selective", True)
    nothing = resolve()
    assert not nothing.fits
    assert nothing.why == "nothing fits; this takes the least memory"


def test_on_a_processor_nothing_is_shared_unless_it_is_asked_for():
    assert resolve(device="cpu", fits=lambda layout, _: layout.is_sharded).layout == Layout(replicate=8)
    assert resolve("fsdp", device="cpu").layout == Layout(shard=8)
    assert resolve({"shard": 2}, device="cpu").layout == Layout(replicate=4, shard=2)
    assert resolve({"tensor": 2}, device="cpu").layout == Layout(replicate=4, tensor=2)


@pytest.mark.parametrize(
    ("parallel", "layout"),
    [
        ("ddp", Layout(replicate=16)),
        ("fsdp", Layout(shard=16)),
        ("hsdp", Layout(replicate=2, shard=8)),
        ({"shard": 4}, Layout(replicate=4, shard=4)),
        ({"replicate": 2}, Layout(replicate=2, shard=8)),
        ({"replicate": 2, "shard": 4, "tensor": 2}, Layout(2, 4, 2)),
        ({"tensor": 8, "replicate": 1}, Layout(1, 2, 8)),
    ],
)
def test_what_is_pinned_is_taken(parallel, layout):
    found = resolve(parallel, 16, nodes=2)
    assert found.layout == layout
    assert found.why == ""


@pytest.mark.parametrize(
    ("parallel", "options", "words"),
    [
        ({"shard": 3}, {}, "does not come to 8 processes"),
        ({"replicate": 2, "shard": 2}, {}, "does not come to 8 processes"),
        ({"tensor": 3}, {"size": 6}, "cannot share this model's 32 heads, 8 key heads"),
        ({"tensor": 16, "replicate": 1, "shard": 1}, {"size": 16}, "numbers that fit: 1, 2, 4, 8"),
        ({"context": 2}, {}, "a row is computed by one process"),
        ("fsdp", {"offload": True, "device": "cpu"}, "weights are in the host's memory anyway"),
        ({"expert": 2}, {}, "this model has none"),
        ({"pipeline": 2}, {}, "cut by hand for each architecture"),
        (
            "ddp",
            {"rows": 12},
            "batches that fit: 8 samples or 16 samples; processes that fit: 1, 2, 3, 4, 6, 12",
        ),
        ("ddp", {"offload": True}, "nothing is sharded here"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_fit(parallel, options, words):
    with pytest.raises(PlanError) as caught:
        resolve(parallel, **{"size": 8, **options})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("train", "layout", "words"),
    [
        ({"optim": {"name": "muon"}}, Layout(shard=2), "its update is made of whole matrices"),
        ({"optim": {"name": "adamw8bit"}}, Layout(tensor=2), "blocks of 256 numbers"),
        ({"keep_zeros": True}, Layout(shard=2), "marked in whole matrices"),
        ({"quantized": {"bits": 4}}, Layout(tensor=2), "machine.parallel.tensor splits them"),
    ],
)
def test_what_needs_whole_matrices_is_refused_with_shards_and_not_without(train, layout, words):
    section = Recipe.model_validate({
        "llmkit": 1,
        "pretrain": {"model": {"preset": "qwen3-tiny", "context": 128}, "train": {"length": "10 steps", **train}},
    }).pretrain  # fmt: skip
    assert section is not None
    check_shared(Layout(replicate=8), section)
    with pytest.raises(PlanError) as caught:
        check_shared(layout, section)
    assert words in str(caught.value)
    assert "machine.parallel=ddp" in caught.value.hint


def test_layers_that_are_split_over_machines_are_noted():
    found = resolve({"tensor": 8, "replicate": 1}, 16, nodes=4)
    assert any("more than the 4 of a machine" in note for note in found.notes)
    [masks] = resolve({"tensor": 4}, 16, nodes=4).notes
    assert "draws other masks than one process would" in masks
    assert resolve("fsdp", 16, nodes=4).notes == ()
    assert any("there is one machine" in note for note in resolve("hsdp").notes)


@settings(deadline=None)
@given(
    nodes=st.integers(1, 6),
    local=st.integers(1, 16),
    tensor=st.sampled_from([1, 2, 4, 8]),
    rows=st.integers(1, 4096),
    parallel=st.sampled_from(["auto", "ddp", "fsdp", "hsdp", "numbers"]),
    bar=st.integers(0, 300),
)
def test_the_product_is_the_world_and_the_rows_add_up(nodes, local, tensor, rows, parallel, bar):
    world = World(nodes * local, local, nodes, "cuda")
    wanted = {"tensor": tensor} if parallel == "numbers" else parallel
    machine = Machine.model_validate({"parallel": wanted})

    def memory_of(layout: Layout, recompute: str) -> Memory:
        return Memory.of(weights=1000 // (layout.shard * layout.tensor))

    shared_by = tensor if parallel == "numbers" else 1
    given = {"rows": rows, "available": bar, "memory_of": memory_of}
    if world.size % shared_by or (parallel != "auto" and rows % (world.size // shared_by)):
        with pytest.raises(PlanError) as caught:
            resolve_sharing(machine, world, SHAPE, **given)
        assert caught.value.hint
        return
    if rows % world.size and parallel == "auto":  # layers are split for memory, not to share few rows
        with pytest.raises(PlanError, match="cannot be shared equally"):
            resolve_sharing(machine, world, SHAPE, **given)
        return
    found = resolve_sharing(machine, world, SHAPE, **given)
    layout = found.layout
    assert layout.world_size == world.size
    assert rows % layout.data_size == 0
    assert layout.data_size * layout.readers == world.size
    assert layout.tensor in splits(SHAPE, local) or parallel == "numbers"
    assert found.fits == (memory_of(layout, found.recompute).total <= bar)
    # Each share of the rows is read by as many processes as read the same ones.
    assert sorted(layout.data_rank(rank) for rank in range(world.size)) == sorted(
        share for share in range(layout.data_size) for _ in range(layout.readers)
    )


def test_every_layout_that_is_tried_stays_inside_a_machine():
    for size, nodes in ((8, 1), (16, 2), (64, 8), (6, 1), (24, 4)):
        for layout, why in layouts(Machine(), World(size, size // nodes, nodes, "cuda"), SHAPE):
            assert layout.world_size == size
            assert (size // nodes) % layout.tensor == 0
            assert why


def test_a_model_without_heads_is_not_split():
    shape = shape_of_preset("lstm-tiny", 1000, 64)
    assert splits(shape, 8) == [1]
    assert splits(SHAPE, 64) == [1, 2, 4, 8]
    assert [words_of(each) for each in (Layout(4), Layout(shard=4), Layout(2, 4, 2))] == [
        "ddp", "fsdp", "{replicate: 2, shard: 4, tensor: 2}",
    ]  # fmt: skip


@pytest.mark.parametrize("batch", [16, 24, 64])
@pytest.mark.parametrize("parallel", ["fsdp", {"tensor": 2}, {"shard": 2, "tensor": 2, "replicate": "auto"}])
def test_a_plans_rows_are_shared_by_those_that_read_different_ones(batch: int, parallel: Any):
    wanted = Recipe.model_validate({
        "llmkit": 1,
        "pretrain": {
            "model": {"preset": "qwen3-tiny", "context": 128},
            "train": {"length": "10 steps", "batch": f"{batch} samples"},
        },
        "machine": {"parallel": parallel},
    })  # fmt: skip
    data = DataFacts(1_000_000, 1, 4_000_000, exact=True)
    model = shape_of_preset("qwen3-tiny", 2000, 128)
    plan = make_plan(wanted, named_hardware("8xA100"), data, vocab_size=2000, model=model)
    assert plan.layout.world_size == plan.world_size == 8
    assert plan.micro_batch_size * plan.gradient_accumulation_steps * plan.layout.data_size == batch
    assert plan.micro_batch_size in divisors(batch)
