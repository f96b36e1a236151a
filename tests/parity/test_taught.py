"""A teacher that is asked once teaches what one that is asked at every step does."""

import json

import pytest
from training import losses, pretrain, same_bits, weights
from tuning import finetune

FEW = {
    "pretrain__train__length": "4 steps",
    "pretrain__eval__every": "never",
    "pretrain__prompts": [],
    "pretrain__held_out": 0,
}


def compare(live, kept):
    one, other = losses(live), losses(kept)
    assert one.keys() == other.keys()
    assert max(abs(one[step] - other[step]) for step in one) < 1e-5
    mine, its = weights(live), weights(kept)
    assert max(abs(mine[name] - its[name]).max() for name in mine) < 1e-5


@pytest.mark.slow
def test_conversations_in_lines_over_two_epochs(tmp_path):
    short = {
        "finetune__train__length": "8 steps",
        "finetune__eval__every": "never",
        "finetune__held_out": 0.25,
    }
    teacher = finetune(tmp_path, "sft", "teacher", **{**short, "finetune__train__length": "1 steps"})
    distil = {"teacher": str(teacher), "weight": 0.7, "temperature": 2.0}
    live = finetune(tmp_path, "sft", "live", finetune__distil=distil, **short)
    kept = {**distil, "cache": {"top_k": 100_000}}
    compare(live, finetune(tmp_path, "sft", "kept", finetune__distil=kept, **short))
    plan = json.loads((tmp_path / "runs/kept/finetune/plan.json").read_text())
    assert plan["num_epochs"] == 2.0
    assert plan["teacher_cache"]["by"] == "row"
    (part,) = (tmp_path / "runs/.cache/teacher").glob("*/part-*")
    size = sum(path.stat().st_size for path in part.glob("*.npy"))
    assert size == pytest.approx(plan["teacher_cache"]["bytes"], rel=0.01)


def test_fewer_kept_is_another_cache_and_another_loss(tmp_path):
    """By what it follows from: another number kept, temperature or seed of what is drawn is kept elsewhere."""
    teacher = pretrain(tmp_path, "teacher", **FEW)
    distil = {"teacher": str(teacher), "weight": 1.0}
    found = {}
    for name, more in {
        "some": {"pretrain__distil": {**distil, "cache": {"top_k": 4}}},
        "again": {
            "pretrain__distil": {**distil, "cache": {"top_k": 4}},
            "pretrain__train__optim": {"lr": 1e-3},
        },
        "warm": {"pretrain__distil": {**distil, "cache": {"top_k": 4}, "temperature": 2.0}},
        "seed": {"pretrain__distil": {**distil, "cache": {"top_k": 4}}, "seed": 8},
    }.items():
        before = set((tmp_path / "runs/.cache/teacher").glob("*"))
        found[name] = pretrain(tmp_path, name, **{**FEW, **more})
        new = set((tmp_path / "runs/.cache/teacher").glob("*")) - before
        assert len(new) == (name != "again"), name
    live = pretrain(tmp_path, "live", **FEW, pretrain__distil=distil)
    assert losses(found["some"])[1] < losses(live)[1] - 0.01
    assert not same_bits(weights(found["some"]), weights(live))
