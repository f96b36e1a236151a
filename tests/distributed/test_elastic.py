"""A run that was stopped goes on under any other layout as if nothing had happened, under its own to the last bit."""

import json

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
    MIXTRAL,
    SHORT,
    TP2,
    apart,
    farthest,
    figures,
    named,
    stopping,
    train,
)
from training import same_bits, weights

AT = 3
"""Steps made when the run is stopped; those after it show whether anything was lost."""
LOSS, WEIGHTS = 1e-5, 5e-3
NO_DROPOUT = {"pretrain__model__dropout": 0.0}


def slow(*values, id):
    """A cell for `make test-distributed`."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One corpus and one tokenizer for all."""
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def whole(place):
    """The run that nothing stops, made once for each layout and recipe."""
    known = {}

    def run(layout=ALONE, task=None, **changes):
        key = repr((named(layout), task, sorted(changes.items())))
        if key not in known:
            known[key] = train(place, layout, task, name=f"whole-{len(known)}", **changes)
        return known[key]

    return run


def stopped_and_resumed(place, first, then, task=None, **changes):
    """A run that one layout begins and another one ends."""
    name = f"{named(first)}-to-{named(then)}-{task}"
    with stopping(AT):
        train(place, first, task, name=name, fresh=True, **changes)
    folder = train(place, then, task, name=name, **changes)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert AT + 1 in steps
    assert json.loads((folder / "plan.json").read_text())["world_size"] == then.world_size
    return folder


def arrows(*pairs):
    return [slow(first, then, id=f"{named(first)}-to-{named(then)}") for first, then in pairs]


WITH_DROPOUT = [
    pytest.param(FSDP2, ALONE, id="shard2-to-alone"),
    *arrows(
        (ALONE, FSDP2),
        (DDP2, ALONE),
        (DDP2, FSDP2),
        (FSDP2, DDP2),
        (FSDP4, FSDP2),
        (FSDP2, HSDP4),
        (HSDP4, FSDP4),
        (DDP4, FSDP2),
    ),
]
SPLIT = arrows(
    (FSDP2, TP2),
    (TP2, ALONE),
    (ALONE, TP2),
    (DDP2, FSDP_TP4),
    (FSDP_TP4, FSDP2),
    (TP2, HSDP4),
    (DDP_TP4, DDP2),
)


def as_if_nothing_had_happened(found, expected):
    for key in ("train/loss", "eval/loss", "train/grad_norm"):
        assert farthest(figures(found, key), figures(expected, key)) < LOSS, key
    assert apart(weights(found), weights(expected)) < WEIGHTS


@pytest.mark.parametrize(("first", "then"), WITH_DROPOUT)
def test_from_any_layout_to_any(place, whole, first, then):
    as_if_nothing_had_happened(stopped_and_resumed(place, first, then, **SHORT), whole(**SHORT))


@pytest.mark.parametrize(("first", "then"), SPLIT)
def test_from_and_to_split_layers(place, whole, first, then):
    settings = {**SHORT, **NO_DROPOUT}
    as_if_nothing_had_happened(stopped_and_resumed(place, first, then, **settings), whole(**settings))


EXPERTS = arrows((EP2, ALONE), (ALONE, EP2), (FSDP_EP4, EP2), (FSDP2, FSDP_EP4))


@pytest.mark.parametrize(("first", "then"), EXPERTS)
def test_from_and_to_experts_dealt_out(place, whole, first, then):
    settings = {**SHORT, "pretrain__model__config": MIXTRAL}
    as_if_nothing_had_happened(stopped_and_resumed(place, first, then, **settings), whole(**settings))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(FSDP2, ALONE), (ALONE, FSDP2)])
def test_an_adapter_too(place, whole, first, then):
    changes = {"finetune__model__dropout": 0.0, "finetune__adapter": {"rank": 4}}
    found = stopped_and_resumed(place, first, then, "sft", **changes)
    as_if_nothing_had_happened(found, whole(ALONE, "sft", **changes))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [FSDP2, TP2, HSDP4, FSDP_TP4], ids=named)
def test_under_the_same_layout_to_the_last_bit(place, whole, layout):
    """With dropout, also of split heads."""
    found, expected = stopped_and_resumed(place, layout, layout, **SHORT), whole(layout, **SHORT)
    for key in ("train/loss", "eval/loss"):
        assert figures(found, key) == figures(expected, key), key
    assert same_bits(weights(found), weights(expected))
