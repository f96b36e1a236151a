"""What every objective is held to; one that is registered is tested here without a word."""

import pickle

import numpy as np
import objectives
import pytest
from training import losses, pretrain

from llmkit import registry
from llmkit.objectives.base import NOT_LEARNED

ALL = list(registry.OBJECTIVES)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def is_random(objective):
    """Whether two seeds give a row two examples; the losses of all but `clm` depend on chance."""
    return objective != "clm"


@pytest.mark.parametrize("objective", ALL)
def test_an_example_is_a_function_of_its_row(objective):
    made = objectives.make(objective)
    there = pickle.loads(pickle.dumps(made))  # as a loader process gets it
    differing = 0
    for row in objectives.rows(objective, 16):
        before = {name: np.copy(array) for name, array in row.items()}
        example = made.encode(row)
        np.random.random(3)
        assert same(example, made.encode(row))
        assert same(example, there.encode(row))
        assert same(row, before), "the row itself was changed"
        assert all(isinstance(array, np.ndarray) for array in example.values()), (
            "no tensors in loader processes"
        )
        differing += not same(example, made.encode({**row, "seed": np.asarray(int(row["seed"]) + 1)}))
    assert (differing > 8) == is_random(objective)


@pytest.mark.parametrize("objective", ALL)
def test_counts_are_those_of_what_is_learned(objective):
    made = objectives.make(objective)
    batch = made.collate([made.encode(row) for row in objectives.rows(objective, 8)])
    assert int(batch["num_targets"]) == int((batch["targets"] != NOT_LEARNED).sum()) > 0
    for name, tensor in batch.items():
        assert (tensor.dim() == 0) == name.startswith("num_"), name
        assert name.startswith("num_") or len(tensor) == 8, name
        assert not tensor.dtype.is_floating_point or name not in ("input_ids", "targets")


@pytest.mark.parametrize("objective", ALL)
def test_full_rows_have_one_shape(objective):
    """Whatever falls to them by chance: a compiled model takes no other."""
    made = objectives.make(objective)
    shapes = set()
    for row in objectives.rows(objective, 24):
        batch = made.collate([made.encode(row)])
        shapes.add(tuple((name, tuple(tensor.shape)) for name, tensor in sorted(batch.items())))
    assert len(shapes) == 1
    widths = [shape[1] for _, shape in shapes.pop() if len(shape) == 2]
    assert max(widths) <= objectives.CONTEXT
    assert max(widths) >= objectives.CONTEXT - 1, "positions that are never used"


@pytest.mark.parametrize("objective", ALL)
def test_a_short_row_and_the_batch_it_is_in_are_taken(objective):
    """The last held-out row may have any length; filled up or not, what others learn is the same."""
    made = objectives.make(objective)
    full, cut = objectives.rows(objective, 2)
    for length in (1, 2, 3, 11):
        if length == 1 and objective in ("clm", "fim"):
            continue  # a row of these has two tokens at least: one to predict
        short = {name: array[:length] if array.ndim else array for name, array in cut.items()}
        alone = made.collate([made.encode(short)])
        both = made.collate([made.encode(full), made.encode(short)])
        one = made.collate([made.encode(full)])
        counts = [name for name in both if name.startswith("num_")]
        assert [int(both[n]) for n in counts] == [int(one[n]) + int(alone[n]) for n in counts]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each objective, whose runs share tokenizer and shards."""
    return {objective: tmp_path_factory.mktemp(objective.replace("+", "_")) for objective in ALL}


STEPS = 6
SHORT = {
    "pretrain__train__length": f"{STEPS} steps",
    "pretrain__train__batch": "16 samples",
    "pretrain__checkpoint": {"every": "2 steps", "keep": 10},
    "pretrain__eval": {"every": "3 steps", "rows": 20},
    "pretrain__prompts": [],
}


@pytest.mark.parametrize("objective", ALL)
def test_sixteen_rows_at_once_equal_four_times_four(objective, folders):
    setting = {**objectives.changes(objective), **SHORT, "pretrain__model__dropout": 0.0}
    once = pretrain(folders[objective], "once", machine__micro_batch=16, **setting)
    accumulated = pretrain(folders[objective], "accumulated", machine__micro_batch=4, **setting)
    for key in ("train/loss", "eval/loss"):
        one, other = losses(once, key), losses(accumulated, key)
        assert one.keys() == other.keys()
        assert max(abs(one[step] - other[step]) for step in one) < 1e-5
        assert one[max(one)] < one[min(one)], "nothing was learned"
