"""Checkpoints of a small net: what is saved is what is loaded, and what does not fit is refused."""

import errno
import json
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llmkit.durable import manifest, verify_folder, write_folder
from llmkit.errors import CorruptError, RunError, UsageError
from llmkit.optim import make_optimizer
from llmkit.recipe.schema import Optim
from llmkit.run.training import _newest_step
from llmkit.train.checkpoint import (
    Checkpoints,
    check_identity,
    model_tensors,
    optimizer_tensors,
    saved_record,
)
from llmkit.train.loop import Schedule, Training, train
from llmkit.train.saving import BEST, Best, Keep, Saver
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


def without(*ends):
    return lambda moments: {k: t for k, t in moments.items() if not k.startswith(ends)}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda moments: {}, r"missing \['exp_avg\.embed\.weight', "),
        (without("exp_avg_sq."), r"missing \['exp_avg_sq\.embed\.weight', 'exp_avg_sq\.head\.bias'\], not w"),
        (without("exp_avg.head.bias"), r"missing \['exp_avg\.head\.bias'\], not wanted \[\]"),
        (without("step.head.bias"), r"missing \['step\.head\.bias'\]"),
        (lambda moments: {**moments, "junk.head.bias": torch.zeros(5)}, r"not wanted \['junk\.head\.bias'\]"),
        (lambda moments: {**moments, "exp_avg.gone": torch.zeros(5)}, r"not wanted \['exp_avg\.gone'\]"),
        (
            lambda moments: {**moments, "exp_avg.head.bias": torch.zeros(1)},
            r"exp_avg\.head\.bias is \[1\] of float32, the optimizer makes \[5\] of float32",
        ),
        (
            lambda moments: {**moments, "exp_avg_sq.head.bias": torch.zeros(5).bfloat16()},
            r"exp_avg_sq\.head\.bias is \[5\] of bfloat16, the optimizer makes \[5\] of float32",
        ),
    ],
)
def test_an_optimizer_that_is_not_whole_is_refused(tmp_path, spoil, words):
    checkpoints = Checkpoints(tmp_path, identity={})
    net, optimizer = trained(0)
    moments = spoil(optimizer_tensors(net, optimizer))
    path = checkpoints.write(model_tensors(net), moments, TrainState(step=3))
    fresh = Tied()
    with pytest.raises(RunError, match=words):
        checkpoints.load(path, fresh, make_optimizer(fresh, Optim()))


def test_an_optimizer_holds_nothing_before_its_first_update(tmp_path):
    """Every step up to now was skipped: so it is right, and one more update makes it wrong."""
    checkpoints = Checkpoints(tmp_path, identity={})
    net = Tied()
    optimizer = make_optimizer(net, Optim())
    path = save(checkpoints, net, optimizer, TrainState(step=2, skipped=2))
    assert checkpoints.load(path, net, optimizer).skipped == 2
    path = save(checkpoints, net, optimizer, TrainState(step=3, skipped=2))
    with pytest.raises(RunError, match="missing"):
        checkpoints.load(path, net, optimizer)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_what_an_optimizer_holds_is_asked_of_its_kind(tmp_path, kind):
    checkpoints = Checkpoints(tmp_path, identity={})
    net = Tied()
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(net.parameters(), lr=0.1, **more)
    net.head(net.embed(torch.tensor([1]))).sum().backward()
    optimizer.step()
    path = save(checkpoints, net, optimizer, TrainState(step=1))
    other = Tied()
    checkpoints.load(path, other, kind(other.parameters(), lr=0.1, **more))
    with pytest.raises(RunError, match=r"missing \['exp_avg"):
        checkpoints.load(path, other, make_optimizer(other, Optim()))


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
    noted = json.loads((tmp_path / "best.json").read_text())
    assert (noted["metric"], noted["step"], noted["value"]) == ("eval/loss", 3, 1.0)
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


def best_of_two(tmp_path):
    """Checkpoints of steps 1, the best, and 2."""
    net, optimizer = trained(0)
    with saver(tmp_path, Keep(last=1, best="eval/loss")) as writer:
        assert writer.is_best(1, {"eval/loss": 1.0})
        writer.save(net, optimizer, TrainState(step=1))
        writer.save(net, optimizer, TrainState(step=2))
    assert kept(tmp_path) == [1, 2]
    return net, optimizer


def another_digit(path):
    path.write_text(path.read_text().replace("1.0", "0.0"))


DAMAGED_NOTES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "another JSON": lambda path: path.write_text("[]"),
    "another digit": another_digit,
    "no UTF-8": lambda path: path.write_bytes(b"\xff"),
}


@pytest.mark.parametrize("how", DAMAGED_NOTES)
def test_a_damaged_note_of_the_best_is_named_and_the_run_goes_on(tmp_path, how):
    net, optimizer = best_of_two(tmp_path)
    DAMAGED_NOTES[how](tmp_path / BEST)
    said = []
    with saver(tmp_path, Keep(last=1, best="eval/loss"), resumed=2, warn=said.append) as writer:
        assert len(said) == 1
        assert BEST in said[0]
        assert writer.is_best(3, {"eval/loss": 5.0}), "nothing is believed of before"
        writer.save(net, optimizer, TrainState(step=3))
    assert Best.of(Checkpoints(tmp_path, {}), "eval/loss", up_to=3, warn=said.append).value == 5.0
    assert len(said) == 1, "what is written now is right"


def test_a_damaged_best_checkpoint_is_named_and_no_longer_the_best(tmp_path):
    best_of_two(tmp_path)
    weights = tmp_path / "step_00000001" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = []
    writer = saver(tmp_path, Keep(last=1, best="eval/loss"), resumed=2, warn=said.append)
    assert len(said) == 1
    assert str(weights) in said[0]
    assert writer.is_best(3, {"eval/loss": 5.0})
    said.clear()
    saver(tmp_path, Keep(last=1, best="eval/loss"), resumed=2, writes=False, warn=said.append)
    assert said == [], "one that saves nothing does not look"


def test_a_writer_that_ended_between_publication_and_note_is_made_good(tmp_path, monkeypatch):
    """The resumed run measures the step again and notes it; until then the best of before stays."""
    net, optimizer = best_of_two(tmp_path)

    def die(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "write_note", die)
        writer = saver(tmp_path, Keep(last=1, best="eval/loss"), resumed=2)
        assert writer.is_best(3, {"eval/loss": 0.5})
        with pytest.raises(SystemExit):
            writer.save(net, optimizer, TrainState(step=3))
    assert kept(tmp_path) == [1, 2, 3]
    assert Best.of(Checkpoints(tmp_path, {}), "eval/loss", up_to=3).step == 1
    with saver(tmp_path, Keep(last=1, best="eval/loss"), resumed=3, background=True) as writer:
        assert writer.is_best(3, {"eval/loss": 0.5})
        writer.save(net, optimizer, TrainState(step=3))
        writer.save(net, optimizer, TrainState(step=4))
    assert kept(tmp_path) == [3, 4]
    assert Best.of(Checkpoints(tmp_path, {}), "eval/loss", up_to=4) == Best("eval/loss", 3, 0.5)


def test_a_metric_of_unknown_direction_is_refused(tmp_path):
    with pytest.raises(UsageError, match="whether more or less of 'eval/novelty' is better") as caught:
        saver(tmp_path, Keep(last=1, best="eval/novelty"))
    assert "eval/loss" in caught.value.hint


def test_step_0_does_not_stay_for_good():
    assert Keep(last=1, every=5).surplus([0, 4, 5, 9, 10, 11], None) == [0, 4, 9]


@pytest.mark.parametrize(("rows", "best"), [(None, 4), (8, 1)])
def test_the_last_evaluation_counts_where_it_takes_the_same_rows(tmp_path, rows, best):
    net, optimizer = best_of_two(tmp_path)
    schedule = Schedule(
        num_steps=4,
        tokens_per_step=1,
        log_every=1,
        eval_every=1,
        eval_rows=rows,
        checkpoint_every=0,
        keep_every=0,
        lr_at=lambda step: 0.1,
        grad_clip=1.0,
    )
    with saver(tmp_path, Keep(last=1, best="eval/loss"), background=True, resumed=2) as writer:
        run = Training(
            accelerator=SimpleNamespace(reduce=lambda tensor, how: tensor, is_main_process=False),
            module=net,
            core=SimpleNamespace(model=net, trained=net),
            optimizer=optimizer,
            micro_batches=None,
            schedule=schedule,
            seed=0,
            numbers=None,
            saver=writer,
            evaluate=lambda rows, between: {"eval/loss": 0.5},
            sample=None,
            stop=lambda seconds: 0,
            watch_speed=None,
            callbacks=(),
        )
        train(run, TrainState(step=4))
    assert Best.of(Checkpoints(tmp_path, {}), "eval/loss", up_to=4).step == best
    assert kept(tmp_path) == sorted({best, 4})


def test_names_that_are_no_checkpoints_are_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step_00000005", "step_00000005.bak", "step_", "step_7", "step_000000009", "other"):
        (folder / name).mkdir(parents=True)
    (folder / "step_00000008").write_text("a file")
    assert Checkpoints(folder, {}).steps() == [5]
    assert _newest_step(tmp_path) == 5
    assert _newest_step(tmp_path / "nothing") == 0


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    net, optimizer = trained(0)
    save(checkpoints, net, optimizer, TrainState(step=1)).rename(checkpoints.path(2))
    said = []
    with pytest.raises(CorruptError):
        checkpoints.newest(said.append)
    assert "step_00000002: holds the checkpoint of step 1" in said[0]
    path = save(checkpoints, net, optimizer, TrainState(step=2))
    assert checkpoints.newest(said.append) == path, "not taken for saved already"
    assert checkpoints.load(path, net, optimizer).step == 2


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, number):
    """Else the run would go on from the one before, and the next save would remove this one."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", {"seed": 1})
    net, optimizer = trained(0)
    paths = [save(checkpoints, net, optimizer, TrainState(step=step)) for step in (1, 2)]
    true = manifest.hash_file

    def refuse(path):
        if path.parent == paths[1]:
            raise OSError(number, "not now")
        return true(path)

    said = []
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "hash_file", refuse)
        with pytest.raises(RunError, match=r"step_00000002: cannot be read now \(not now\)"):
            checkpoints.newest(said.append)
        with pytest.raises(RunError, match="cannot be read now"):
            saved_record(tmp_path)
    assert said == []
    assert checkpoints.newest(said.append) == paths[1]
    (paths[1] / "manifest.json").unlink()
    (paths[1] / "manifest.json").mkdir()
    assert checkpoints.newest(said.append) == paths[0], "a folder in a file's place stays one"
    assert "step_00000002 is damaged" in said[0]
    (paths[0] / "state.json").unlink()
    with pytest.raises(CorruptError, match="every checkpoint is damaged"):
        checkpoints.newest(said.append)


def test_a_best_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch):
    best_of_two(tmp_path)

    def refuse(path):
        raise OSError(errno.EIO, "not now")

    monkeypatch.setattr(manifest, "hash_file", refuse)
    with pytest.raises(RunError, match=r"step_00000001: cannot be read now"):
        saver(tmp_path, Keep(last=1, best="eval/loss"), resumed=2)
    (tmp_path / BEST).unlink()
    (tmp_path / BEST).mkdir()
    with pytest.raises(RunError, match=r"best\.json: cannot be read now"):
        saver(tmp_path, Keep(last=1, best="eval/loss"), resumed=2)


def test_a_second_ctrl_c_does_not_wait_for_the_save_and_nothing_appears_after_it(tmp_path):
    net, optimizer = trained(0)
    begun, release = threading.Event(), threading.Event()

    def wait(step):
        begun.set()
        release.wait(5)

    writer = saver(tmp_path, Keep(last=1), background=True, before_publishing=wait)

    def interrupted():
        with writer:
            writer.save(net, optimizer, TrainState(step=1))
            assert begun.wait(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert writer.busy, "not waited for"
    release.set()
    writer._join()
    assert kept(tmp_path) == []
