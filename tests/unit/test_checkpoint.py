"""Checkpoints of a small net: what is saved is what is loaded, and what does not fit is refused."""

import pytest
import torch
from safetensors.torch import load_file

from llmkit.durable import verify_folder
from llmkit.errors import RunError
from llmkit.optim import make_optimizer
from llmkit.recipe.schema import Optim
from llmkit.train.checkpoint import Checkpoints, check_identity, model_tensors, optimizer_tensors
from llmkit.train.state import TrainState, mix_seed


class Tied(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed = torch.nn.Embedding(5, width)
        self.head = torch.nn.Linear(width, 5)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("passing", torch.zeros(2), persistent=False)


def trained(seed, width=4):
    torch.manual_seed(seed)
    net = Tied(width)
    optimizer = make_optimizer(net, Optim())
    for _ in range(3):
        net.head(net.embed(torch.tensor([1, 2]))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def test_a_checkpoint_gives_back_every_tensor(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, identity={"seed": 1})
    net, optimizer = trained(0)
    state = TrainState(step=3, tokens=96, elapsed_s=1.5)
    path = checkpoints.save(net, optimizer, state)
    assert path.name == "step_00000003"
    other, other_optimizer = trained(1)
    assert checkpoints.load(path, other, other_optimizer) == state
    for ours, theirs in (
        (model_tensors(net), model_tensors(other)),
        (optimizer_tensors(net, optimizer), optimizer_tensors(other, other_optimizer)),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    saved = load_file(path / "model.safetensors")
    assert set(saved) == {"embed.weight", "head.bias", "kept"}, "tied once, passing buffers not"
    assert set(load_file(path / "optimizer.safetensors")) == {
        f"{kind}.{name}"
        for kind in ("step", "exp_avg", "exp_avg_sq")
        for name in ("embed.weight", "head.bias")
    }


def test_a_fresh_optimizer_is_saved_and_loaded_too(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, identity={})
    net = Tied()
    path = checkpoints.save(net, make_optimizer(net, Optim()), TrainState())
    net, optimizer = trained(1)
    assert checkpoints.load(path, net, optimizer).step == 0


def test_another_models_tensors_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, identity={})
    path = checkpoints.save(*trained(0), TrainState(step=1))
    with pytest.raises(RunError, match=r"embed\.weight is \[5, 4\], the model has \[5, 6\]"):
        checkpoints.load(path, *trained(0, width=6))

    class More(Tied):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(2, 2)

    more = More()
    with pytest.raises(RunError, match=r"missing \['extra\.bias', 'extra\.weight'\]"):
        checkpoints.load(path, more, make_optimizer(more, Optim()))


def test_identity_names_what_differs_in_the_recipes_words():
    saved = {"pretrain.train.optim.lr": 0.1, "gone": 1, "same": [1, 2]}
    with pytest.raises(RunError) as caught:
        check_identity("runs/x", saved, {"pretrain.train.optim.lr": 0.2, "new": None, "same": (1, 2)})
    lines = caught.value.message.splitlines()
    assert lines[1:] == ["  gone: 1 -> (not set)", "  pretrain.train.optim.lr: 0.1 -> 0.2"]
    check_identity("runs/x", saved, dict(saved))


def test_seeds_are_functions_of_their_parts_and_spread():
    assert mix_seed(1, 2, 3) == mix_seed(1, 2, 3)
    seeds = {mix_seed(a, b, c) for a in range(8) for b in range(16) for c in range(16)}
    assert len(seeds) == 8 * 16 * 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = [sum(seed >> bit & 1 for seed in seeds) / len(seeds) for bit in range(62)]
    assert max(abs(share - 0.5) for share in bits) < 0.05


def test_a_whole_checkpoint_is_not_written_again_and_a_damaged_one_is(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, identity={})
    net, optimizer = trained(0)
    path = checkpoints.save(net, optimizer, TrainState(step=4))
    inode = path.stat().st_ino
    checkpoints.save(net, optimizer, TrainState(step=4))
    assert path.stat().st_ino == inode
    (path / "state.json").unlink()
    checkpoints.save(net, optimizer, TrainState(step=4))
    verify_folder(path)


def test_rotation_never_removes_the_one_just_written_for_a_damaged_later_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, identity={})
    net, optimizer = trained(0)
    later = checkpoints.save(net, optimizer, TrainState(step=10))
    (later / "state.json").unlink()
    checkpoints.save(net, optimizer, TrainState(step=7))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]
