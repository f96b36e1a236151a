"""An adapter, thawing layers and rates by layer: two processes learn what one does."""

import pytest
from sessions import shared_server
from training import losses, weights
from tuning import folder_of, words

PARTS = {
    "adapter": {"finetune__adapter": {"rank": 2}},
    "thawing": {"finetune__unfreeze": {"every": "2 steps"}, "finetune__lr_decay": 0.5},
}


def trained(folder, name, parts, *more):
    even = {"finetune__model__dropout": 0.0, "finetune__train__optim__lr": 1e-3}
    ended = shared_server().run(words(folder, "cls", name, "--no-self-check", *more, **even, **parts))
    assert ended.code == 0, ended.said
    return folder_of(folder, name)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_two_processes_learn_what_one_process_learns(tmp_path, parts):
    one, two = trained(tmp_path, "one", parts), trained(tmp_path, "two", parts, "--processes", "2")
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)
    mine, its = weights(one), weights(two)
    assert mine.keys() == its.keys()
    assert max(abs(mine[name] - its[name]).max() for name in mine) < 2e-5
