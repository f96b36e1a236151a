"""Checkpoints of a small net: what is saved is what is loaded, and what does not fit is refused."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from llmkit.durable import verify_folder, write_folder
from llmkit.errors import RunError, UsageError
from llmkit.optim import make_optimizer
from llmkit.recipe.schema import Optim
from llmkit.train.checkpoint import Checkpoints, check_identity, model_tensors, optimizer_tensors
from llmkit.train.saving import Keep, Saver
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


def save(checkpoints, net, optimizer, state):
    return checkpoints.write(model_tensors(net), optimizer_tensors(net, optimizer), state)


def test_a_checkpoint_gives_back_every_tensor(tmp_path):
    checkpoints = Checkpoints(tmp_path, identity={"seed": 1})
    net, optimizer = trained(0)
    state = TrainState(step=3, tokens=96, elapsed_s=1.5)
    path = save(checkpoints, net, optimizer, state)
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
    checkpoints = Checkpoints(tmp_path, identity={})
    net = Tied()
    path = save(checkpoints, net, make_optimizer(net, Optim()), TrainState())
    net, optimizer = trained(1)
    assert checkpoints.load(path, net, optimizer).step == 0


def test_another_models_tensors_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, identity={})
    path = save(checkpoints, *trained(0), TrainState(step=1))
    with pytest.raises(RunError, match=r"embed\.weight is \[5, 4\] of float32, the model has \[5, 6\]"):
        checkpoints.load(path, *trained(0, width=6))

    class More(Tied):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(2, 2)

    more = More()
    with pytest.raises(RunError, match=r"missing \['extra\.bias', 'extra\.weight'\]"):
        checkpoints.load(path, more, make_optimizer(more, Optim()))


def test_another_dtype_is_refused_and_a_transposed_weight_is_filled(tmp_path):
    checkpoints = Checkpoints(tmp_path, identity={})
    net, optimizer = trained(0)
    path = save(checkpoints, net, optimizer, TrainState(step=1))
    other, other_optimizer = trained(1)
    with pytest.raises(RunError, match=r"of float32, the model has .* of float64"):
        checkpoints.load(path, other.double(), other_optimizer)
    other, other_optimizer = trained(1)
    other.embed.weight.data = other.embed.weight.data.T.contiguous().T
    checkpoints.load(path, other, other_optimizer)
    assert torch.equal(other.embed.weight, net.embed.weight)


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
    checkpoints = Checkpoints(tmp_path, identity={})
    net, optimizer = trained(0)
    path = save(checkpoints, net, optimizer, TrainState(step=4))
    inode = path.stat().st_ino
    save(checkpoints, net, optimizer, TrainState(step=4))
    assert path.stat().st_ino == inode
    (path / "state.json").unlink()
    save(checkpoints, net, optimizer, TrainState(step=4))
    verify_folder(path)


def saver(tmp_path, keep, background=False, **more):
    return Saver(Checkpoints(tmp_path, identity={}), keep, background=background, **more)


def kept(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("step_*"))


def test_rotation_never_removes_the_one_just_written_for_a_damaged_later_one(tmp_path):
    net, optimizer = trained(0)
    writer = saver(tmp_path, Keep(last=1))
    writer.save(net, optimizer, TrainState(step=10))
    (tmp_path / "step_00000010" / "state.json").unlink()
    saver(tmp_path, Keep(last=1), resumed=5).save(net, optimizer, TrainState(step=7))
    assert kept(tmp_path) == [7]


def test_the_last_the_best_and_every_so_many_stay(tmp_path):
    net, optimizer = trained(0)
    losses = {step: abs(step - 3) + 1.0 for step in range(1, 13)}
    with saver(tmp_path, Keep(last=2, every=5, best="eval/loss"), background=True) as writer:
        for step, loss in losses.items():
            assert writer.is_best(step, {"eval/loss": loss}) == (step <= 3)
            writer.save(net, optimizer, TrainState(step=step))
    assert kept(tmp_path) == [3, 5, 10, 11, 12]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "metric": "eval/loss",
        "step": 3,
        "value": 1.0,
    }
    with saver(tmp_path, Keep(last=1, best="eval/loss"), resumed=12) as writer:
        assert not writer.is_best(13, {"eval/loss": 1.0}), "only better is better"
        writer.save(net, optimizer, TrainState(step=13))
    assert kept(tmp_path) == [3, 13]
    with saver(tmp_path, Keep(last=1, best="eval/loss"), resumed=2) as writer:
        assert writer.is_best(3, {"eval/loss": 9.0}), "a best of after the resumed step does not count"


def test_more_is_better_of_some_metrics(tmp_path):
    writer = saver(tmp_path, Keep(last=1, best="eval/accuracy"))
    found = [writer.is_best(step, {"eval/accuracy": value}) for step, value in ((1, 0.2), (2, 0.1), (3, 0.3))]
    assert found == [True, False, True]
    with pytest.raises(UsageError, match="'eval/accuracy' is not measured while training"):
        writer.is_best(4, {"eval/loss": 1.0})


def test_a_copy_is_written_while_the_weights_move_on(tmp_path):
    net, optimizer = trained(0)
    before = {name: tensor.clone() for name, tensor in model_tensors(net).items()}
    release = threading.Event()
    writer = saver(tmp_path, Keep(last=2), background=True, before_publishing=lambda step: release.wait(20))
    writer.save(net, optimizer, TrainState(step=1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    assert kept(tmp_path) == [], "not on the disk yet, and training goes on"
    release.set()
    writer.wait()
    saved = load_file(tmp_path / "step_00000001" / "model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in saved)
    writer.save(net, optimizer, TrainState(step=2))
    writer.wait()
    saved = load_file(tmp_path / "step_00000002" / "model.safetensors")
    assert torch.equal(saved["head.bias"], before["head.bias"] + 1.0), "the kept buffers hold the new copy"


def test_an_error_of_the_writer_is_raised_at_the_next_look(tmp_path):
    net, optimizer = trained(0)

    def fail(step):
        raise OSError(28, "No space left on device")

    writer = saver(tmp_path, Keep(last=2), background=True, before_publishing=fail)
    writer.save(net, optimizer, TrainState(step=1))
    writer._join()
    assert writer.failed
    with pytest.raises(RunError, match="no space left"):
        writer.check()
    assert kept(tmp_path) == []
    assert list(tmp_path.glob(".*")) == [], "nothing half-written stays"


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    net, optimizer = trained(0)
    saver(tmp_path, Keep(last=1)).save(net, optimizer, TrainState(step=1))
    with torch.no_grad():
        net.head.bias[3] = float("nan")
    with pytest.raises(RunError, match=r"step 2: the weights of head\.bias are not finite"):
        saver(tmp_path, Keep(last=1)).save(net, optimizer, TrainState(step=2))
    assert kept(tmp_path) == [1]


def test_a_state_that_is_saved_is_not_saved_again(tmp_path):
    net, optimizer = trained(0)
    writer = saver(tmp_path, Keep(last=2), background=True)
    writer.save(net, optimizer, TrainState(step=4))
    writer.wait()
    inode = (tmp_path / "step_00000004").stat().st_ino
    writer.save(net, optimizer, TrainState(step=4))
    writer.wait()
    assert (tmp_path / "step_00000004").stat().st_ino == inode


def test_a_checkpoint_of_another_form_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, identity={})
    net, optimizer = trained(0)
    path = save(checkpoints, net, optimizer, TrainState(step=1))
    with write_folder(tmp_path / "step_00000002", facts={"step": 2, "format": 9}) as temporary:
        for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
            (temporary / file).write_bytes((path / file).read_bytes())
    with pytest.raises(RunError, match="form 9"):
        checkpoints.load(tmp_path / "step_00000002", net, optimizer)
