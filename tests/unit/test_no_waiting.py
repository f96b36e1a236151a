"""A training step asks the device for no number and sends it none: for either a GPU makes the processor wait.

torch's `meta` device holds no numbers: whatever reads one raises. So a step that runs there reads none, and what runs
there are the branches of a device that is no processor. What is sent there from the host is seen by torch's modes.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import objectives
import pytest
import torch
import tuning
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkit import registry
from llmkit.models import cross_entropy
from llmkit.models.attention import use_attention
from llmkit.models.build import build_model
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import HasParts, LossModule
from llmkit.optim import make as optim_make
from llmkit.optim import make_optimizer
from llmkit.optim.joined import MuonWithAdamW
from llmkit.recipe.schema import Model, Optim
from llmkit.train.communication import EveryStep
from llmkit.train.loop import counts_of, train_step
from llmkit.train.numbers import Numbers
from llmkit.train.sending import send

META = torch.device("meta")
AUTOCAST = torch.autocast
WAITS = {"denoise": "T5's attention is transformers' own, which asks whether a text is filled up"}
"""Objectives that ask the device, and why."""
TASKS_WAIT = {
    "seq2seq": "T5's attention, as above",
    "dpo": "log-probabilities of what is learned only, whose places are asked for",
    "kto": "as dpo",
}
"""Tasks that do."""


class FromTheHost(TorchDispatchMode):
    """Raises where a tensor is sent from the host to the device; a single number that a kernel takes along is none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        places = {one.device.type for one in given if one.dim() or copies}
        places |= {one.device.type for one in tree_leaves(made) if isinstance(one, torch.Tensor)}
        assert not {"cpu", "meta"} <= places, f"{function} sends something from the host"
        return made


class MadeOnTheHost(TorchFunctionMode):
    """Raises where a tensor on the device is made of Python's numbers, which are sent there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            assert made.device != META, "made of numbers of the host"
        return made


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Autocast and fused optimizers do not know `meta`; of the loss they see shapes only, so its body runs too."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    loss = cross_entropy._total_with_gradients

    def with_its_body(*given, **options):
        with torch.no_grad():
            loss._init_fn(*given, **options)
        return loss(*given, **options)

    monkeypatch.setattr(cross_entropy, "_total_with_gradients", with_its_body)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    kinds = {
        **optim_make._OPTIMIZERS,
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
        "muon": lambda groups: MuonWithAdamW([{**group, "fused": False} for group in groups]),
    }
    monkeypatch.setattr(optim_make, "_OPTIMIZERS", kinds)


def core_of(objective, isolate=False):
    goal, made = registry.goal_of(objective), objectives.make(objective)
    model = build_model(
        Model(config=objectives.TINY[goal.model], context=objectives.CONTEXT),
        goal.model,
        vocab_size=objectives.VOCAB_SIZE,
        special_ids={},
        seed=1,
    )
    choose_heads(model, goal.model)
    use_attention(model, "sdpa", isolate=isolate)
    parts = made.parts(model) if isinstance(made, HasParts) else {}
    return LossModule(model, made, bf16=False, parts=parts)


def batches(core, objective):
    rows = objectives.rows(objective, 4)
    return [core.objective.collate([core.objective.encode(row) for row in rows[i : i + 2]]) for i in (0, 2)]


def run_of(core, optimizer, accelerator):
    @contextmanager
    def accumulate(_):
        yield

    stands_in = SimpleNamespace(
        device=META,
        num_processes=1,
        process_index=0,
        accumulate=accumulate,
        backward=lambda loss: loss.backward(),
        clip_grad_norm_=accelerator.clip_grad_norm_,
    )
    numbers = Numbers(stands_in, policy="stop", max_skipped=0, describe=lambda *_: [], warn=print)
    schedule = SimpleNamespace(grad_clip=1.0, grad_noise=0.0, lr_at=lambda _: 1e-3)
    return SimpleNamespace(
        accelerator=stands_in,
        module=core,
        core=core,
        optimizer=optimizer,
        numbers=numbers,
        schedule=schedule,
        seed=7,
        readers=1,
        exchange=EveryStep(),
        tidy=lambda: None,
    )


def step(core, micro, optim="adamw"):
    core.to(META)
    core.train()
    optimizer = make_optimizer(core.trained, Optim(name=optim))
    run = run_of(core, optimizer, Accelerator(cpu=True))
    sent = [(number, send(batch, META)) for number, batch in enumerate(micro)]
    train_step(run, 0, sent, counts_of(sent))  # what is needed all the time is sent once
    with MadeOnTheHost(), FromTheHost():
        outcome = train_step(run, 1, sent, counts_of(sent))
    assert outcome.loss.device == META
    return outcome


def test_the_meta_device_sees_who_asks():
    """The test can fail: each of these is what a GPU would be waited for."""
    number = torch.ones((), device=META)
    for asks in (
        number.item,
        lambda: float(number),
        lambda: bool(number > 0),
        lambda: number.nonzero(),
        number.cpu,
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            asks()


def test_what_is_sent_is_seen():
    there, here = torch.ones(3, device=META), torch.ones(3)
    for sends in (
        lambda: torch.tensor([1.0, 2.0], device=META),
        lambda: there.new_tensor([1.0]),
        lambda: here.to(META),
        lambda: there.copy_(here),
        lambda: there[torch.tensor([0, 1])],
        lambda: torch.tensor(1.0).to(META),
    ):
        with pytest.raises(AssertionError), MadeOnTheHost(), FromTheHost():
            sends()
    with MadeOnTheHost(), FromTheHost():
        assert (there * torch.tensor(2.0) + 1).device == META


@pytest.mark.parametrize("objective", list(registry.OBJECTIVES))
def test_a_step_of_each_objective_waits_for_nothing(objective, monkeypatch):
    core = core_of(objective)
    micro = batches(core, objective)
    if objective in WAITS:
        with pytest.raises((RuntimeError, NotImplementedError)):
            step(core, micro)
        return
    step(core, micro)


class StoppedError(Exception):
    """Where training would begin."""


@pytest.mark.parametrize(
    "task",
    [
        one if one in ("cls", "sft") else pytest.param(one, marks=pytest.mark.slow)
        for one in (*tuning.TASKS, *tuning.VARIANTS)
    ],
)
def test_a_step_of_each_task_waits_for_nothing(task, tmp_path, monkeypatch):
    found = []

    def stop(run, state):
        found.extend((run.core, [batch for _, batch in run.micro_batches(0)]))
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr("llmkit.train.pretrain.train", stop)
        patched.setattr(torch, "autocast", AUTOCAST)
        with pytest.raises(StoppedError):
            tuning.finetune(tmp_path, task)
    core, micro = found
    if task in TASKS_WAIT:
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
            step(core, micro)
        return
    step(core, micro)


def test_isolated_documents_wait_for_nothing():
    core = core_of("clm", isolate=True)
    position_ids = (torch.arange(objectives.CONTEXT) % 10).expand(2, -1).contiguous()
    micro = [{**batch, "position_ids": position_ids} for batch in batches(core, "clm")]
    step(core, micro)


def test_a_loss_that_reads_its_targets_is_found(monkeypatch):
    core = core_of("clm")
    micro = batches(core, "clm")
    loss = core.objective.loss

    def reading(model, batch, criterion):
        assert int((batch["targets"] >= 0).sum()) >= 0
        return loss(model, batch, criterion)

    monkeypatch.setattr(core.objective, "loss", reading)
    with pytest.raises(RuntimeError, match="meta"):
        step(core, micro)


@pytest.mark.parametrize("name", list(optim_make._OPTIMIZERS))
def test_an_update_waits_for_nothing(name):
    core = core_of("clm")
    step(core, batches(core, "clm"), optim=name)
