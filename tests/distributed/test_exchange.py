"""What processes send each other: the bytes of every step, the same result by hand, and the same run resumed."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from layouts import ALONE, DDP2, DDP4, FailedError, farthest, figures, plan_of, train
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from training import recipe, same_bits, weights
from worlds import together

from llmkit.data.order import RowOrder
from llmkit.data.rows import Rows
from llmkit.data.shards import TokenShards
from llmkit.errors import LlmkitError
from llmkit.models.build import build_model
from llmkit.optim import lr_at, parameter_groups
from llmkit.plan import Plan
from llmkit.plan.communication import apart_bytes
from llmkit.recipe import load_recipe
from llmkit.train import loop
from llmkit.train.communication import HOOKS
from llmkit.train.powersgd import PowerSGD

STEPS = 12
PLAIN, HALF = {}, {"gradients": "fp16"}
POWERSGD = {"gradients": "powersgd", "rank": 2}
DILOCO = {"local_steps": {"every": 4, "lr": 0.7, "momentum": 0.9}}
SENT = "sent-{}.jsonl"
CONTROL = 100
"""Numbers in a message of gradients or weights, at least; counts, losses and what must stop are fewer."""


def run(folder, layout=DDP2, name="run", *, fresh=False, steps=STEPS, communication=PLAIN, **changes):
    """A short run; `communication` as in the recipe."""
    settings = {
        "machine__micro_batch": 2,
        "pretrain__train__length": f"{steps} steps",
        "pretrain__prompts": [],
        "pretrain__checkpoint__every": "4 steps",
        "pretrain__eval__every": "8 steps",
        "machine__communication": communication,
        **changes,
    }
    return train(folder, layout, name=name, fresh=fresh, **settings)


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Has every rank note the bytes that it gives to collectives, by step; returns what reads the notes of rank 0.

    Gradients that DDP sends by itself are sent by torch's own hook that does the same, which can be counted.
    """
    place, now, by_ddp = tmp_path, [None], [True]
    step, made, sum_up = loop.train_step, DistributedDataParallel.__init__, dist.all_reduce

    def noted_step(run, number, *rest):
        now[0] = number
        try:
            return step(run, number, *rest)
        finally:
            now[0] = None

    def noted_sum(tensor, *args, **kwargs):
        if now[0] is not None and tensor.numel() >= CONTROL:
            with (place / SENT.format(dist.get_rank())).open("a") as file:
                file.write(json.dumps([now[0], tensor.nbytes]) + "\n")
        return sum_up(tensor, *args, **kwargs)

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if by_ddp[0]:
            self.register_comm_hook(None, allreduce_hook)

    monkeypatch.setattr(loop, "train_step", noted_step)
    monkeypatch.setattr(dist, "all_reduce", noted_sum)
    monkeypatch.setattr(DistributedDataParallel, "__init__", make)

    def bytes_of(communication=PLAIN, **changes):
        by_ddp[0] = "gradients" not in communication
        for file in place.glob(SENT.format("*")):
            file.unlink()
        folder = run(place, communication=communication, fresh=True, **changes)
        ranks = [read_sent(place / SENT.format(rank)) for rank in (0, 1)]
        assert ranks[0] == ranks[1], "processes send different messages"
        return ranks[0], folder

    return bytes_of


def read_sent(path):
    """Step -> bytes."""
    found = dict.fromkeys(range(STEPS), 0)
    for line in path.read_text().splitlines():
        step, size = json.loads(line)
        found[step] += size
    return found


@pytest.mark.parametrize(
    "communication",
    [
        pytest.param(PLAIN, id="plain", marks=pytest.mark.slow),
        pytest.param(HALF, id="half", marks=pytest.mark.slow),
        pytest.param(POWERSGD, id="powersgd"),
        pytest.param(DILOCO, id="local-steps", marks=pytest.mark.slow),
    ],
)
def test_the_bytes_of_a_step_are_those_that_the_plan_says(counted, communication):
    """In a ring of two each process sends what it gives; weights travel once in four steps."""
    sent, folder = counted(communication)
    plan = plan_of(folder)
    size = 4 * plan["num_parameters"]
    said = plan["communication"].get("bytes_per_step", size)
    assert sum(sent.values()) / STEPS == said
    if communication is DILOCO:
        assert sent == {step: size if step % 4 == 3 else 0 for step in range(STEPS)}
        return
    assert set(sent.values()) == {said}
    if communication is POWERSGD:
        assert said < size / 3
    else:
        assert said == (size if communication is PLAIN else size // 2)


@pytest.mark.slow
def test_nothing_is_sent_while_gradients_accumulate(counted):
    once, _ = counted(machine__micro_batch=4)
    four_times, folder = counted(machine__micro_batch=1)
    assert plan_of(folder)["gradient_accumulation_steps"] == 4
    assert once == four_times


@pytest.mark.slow
def test_the_processes_send_with_bf16_what_they_send_with_fp16(counted):
    assert counted(HALF)[0] == counted({"gradients": "bf16"})[0]


# --- the same by hand ------------------------------------------------------------------------------------------


SHAPES = {"wide": (24, 40), "small": (4, 3), "bias": (40,), "deep": (24, 5, 8)}
ROUNDS = 4


class Given(nn.Module):
    """A model whose gradient is what it is given."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.zeros(s)) for name, s in SHAPES.items()})

    def forward(self, gradients):
        return sum((self.weights[name] * gradients[name]).sum() for name in SHAPES)


def given_gradients(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def compressed(rank):
    """The gradients that come out of DDP with the hook, step by step, and what is remembered in the end."""
    model = Given()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.004)  # several buckets
    hook = PowerSGD(dict(model.weights.items()), rank=2, seed=3, world_size=2)
    first = {name: tensor.clone().numpy() for name, tensor in hook.tensors().items()}
    wrapped.register_comm_hook(None, hook.hook)
    found = []
    for step in range(ROUNDS):
        wrapped(given_gradients(rank, step)).backward()
        found.append({name: p.grad.clone().numpy() for name, p in model.weights.items()})
        model.zero_grad()
    return first, found, {name: tensor.clone().numpy() for name, tensor in hook.tensors().items()}


def by_the_paper(first):
    """PowerSGD in numpy: algorithm 1 for each matrix, the error of each process added to its next gradient."""
    errors = [{name: np.zeros(shape, np.float64) for name, shape in SHAPES.items()} for _ in (0, 1)]
    factors = {name: first[f"factor.{name}"].astype(np.float64) for name in ("wide", "deep")}
    found = []
    for step in range(ROUNDS):
        grads = [{n: g.double().numpy() for n, g in given_gradients(rank, step).items()} for rank in (0, 1)]
        out = {name: (grads[0][name] + grads[1][name]) / 2 for name in ("small", "bias")}
        for name in factors:
            whole = [(grads[r][name] + errors[r][name]).reshape(24, -1) for r in (0, 1)]
            orthogonal, _ = np.linalg.qr(factors[name])
            p, _ = np.linalg.qr((whole[0] + whole[1]) / 2 @ orthogonal)
            factors[name] = (whole[0].T @ p + whole[1].T @ p) / 2
            out[name] = (p @ factors[name].T).reshape(SHAPES[name])
            for r in (0, 1):
                errors[r][name] = whole[r].reshape(SHAPES[name]) - out[name]
        found.append(out)
    return found, errors


def test_powersgd_gives_what_the_paper_says_and_remembers_what_it_left_out(tmp_path):
    ranks = together(tmp_path, 2, compressed)
    expected, errors = by_the_paper(ranks[0][0])
    for rank, (_, found, kept) in enumerate(ranks):
        for mine, theirs in zip(found, expected, strict=True):
            for name in SHAPES:
                np.testing.assert_allclose(mine[name], theirs[name], atol=2e-5)
        assert {name for name in kept if name.startswith("error.")} == {"error.wide", "error.deep"}
        for name in ("wide", "deep"):
            np.testing.assert_allclose(kept[f"error.{name}"], errors[rank][name], atol=2e-5)
    assert same_bits(ranks[0][1][-1], ranks[1][1][-1]), "processes took different gradients"


def halved(rank):
    """What fp16 and bf16 make of a very large and a very small gradient."""
    found = {}
    for name, hook in HOOKS.items():
        model = nn.Linear(1, 2, bias=False)
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, hook)
        (wrapped(torch.ones(1)) * torch.tensor([1e6, 1e-9])).sum().backward()
        found[name] = model.weight.grad.flatten().tolist()
    return found


def test_fp16_ends_where_it_is_said_to_and_bf16_reaches_further(tmp_path):
    for found in together(tmp_path, 2, halved):
        assert found["fp16"] == [float("inf"), 0.0]
        assert found["bf16"] == pytest.approx([1e6, 1e-9], rel=1 / 128)


def rows_of(folder):
    """The run's training rows in order."""
    card = json.loads((folder / "data.json").read_text())
    places = [folder.parents[1] / ".cache/shards" / source["address"] for source in card["sources"]]
    return Rows([TokenShards.open(place).split("train") for place in places], 32)


def two_workers(folder, section, every):
    """DiLoCo in plain PyTorch: two workers with AdamW on their own rows, torch's own Nesterov on what they moved."""
    optim = section.train.optim
    vocabulary = plan_of(folder)["vocab_size"]
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}

    def model():
        return build_model(section.model, "causal", vocab_size=vocabulary, special_ids=special, seed=7)

    shared, workers = model(), [model(), model()]
    outer = torch.optim.SGD(shared.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    inner = [
        torch.optim.AdamW(parameter_groups(one, optim), lr=1.0, betas=optim.betas, eps=optim.eps)
        for one in workers
    ]
    rows = rows_of(folder)
    order = RowOrder(rows.sizes, None, 7)
    losses = {}
    for step in range(STEPS):
        taken = rows.take(*order.locate(range(step * 8, step * 8 + 8)))
        ids = torch.stack([torch.from_numpy(row["ids"]) for row in taken])
        found = []
        for rank, (one, optimizer) in enumerate(zip(workers, inner, strict=True)):
            mine = ids[[0, 1, 4, 5] if rank == 0 else [2, 3, 6, 7]]  # micro-batches of two are dealt out
            logits = one(input_ids=mine[:, :-1]).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, optim, num_steps=STEPS, warmup_steps=2)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses[step + 1] = sum(found) / 2
        if (step + 1) % every == 0:
            for parameters in zip(*(one.parameters() for one in (shared, *workers)), strict=True):
                common, *theirs = parameters
                common.grad = torch.stack([common.detach() - one.detach() for one in theirs]).mean(0)
            outer.step()
            for one in workers:
                one.load_state_dict(shared.state_dict())
    return losses, {name: p.detach().numpy() for name, p in shared.named_parameters()}


def test_local_steps_are_diloco_in_plain_pytorch(tmp_path):
    folder = run(tmp_path, communication=DILOCO, pretrain__model__dropout=0.0)
    section = load_recipe(recipe(tmp_path, pretrain__model__dropout=0.0)).recipe.pretrain
    losses, expected = two_workers(folder, section, 4)
    assert farthest(figures(folder, "train/loss"), losses) < 1e-5
    found = weights(folder)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_meeting_at_every_step_is_plain_averaging_with_sgd(tmp_path):
    """Without clipping, for each process clips its own gradient then; all rows hold as many targets."""
    sgd = {"name": "sgd", "lr": 0.1, "warmup": "2 steps"}
    changes = {"pretrain__train__optim": sgd, "pretrain__train__grad_clip": None}
    plain = run(tmp_path, name="plain", **changes)
    met = run(tmp_path, name="met", communication={"local_steps": {"every": 2}}, **changes)
    each = run(tmp_path, name="each", communication={"local_steps": {"every": 1}}, **changes)
    assert farthest(figures(plain, "train/loss"), figures(each, "train/loss")) < 1e-5
    assert farthest(figures(plain, "eval/loss"), figures(each, "eval/loss")) < 1e-5
    assert farthest(figures(plain, "train/loss"), figures(met, "train/loss")) > 1e-5, "never apart?"


@pytest.mark.slow
def test_one_process_takes_local_steps_too(tmp_path):
    """An outer step of length 1 at every step changes nothing; another one does."""
    plain = figures(run(tmp_path, ALONE, name="plain"), "train/loss")
    each = run(tmp_path, ALONE, name="each", communication={"local_steps": {"every": 1}})
    assert farthest(plain, figures(each, "train/loss")) < 1e-5
    outer = run(tmp_path, ALONE, name="outer", communication=DILOCO)
    assert farthest(plain, figures(outer, "train/loss")) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["fp16", "bf16"])
def test_halved_gradients_change_the_losses_little_and_something(tmp_path, gradients):
    plain = figures(run(tmp_path, name="plain"), "train/loss")
    half = figures(run(tmp_path, name="half", communication={"gradients": gradients}), "train/loss")
    assert 0 < farthest(plain, half) < 1e-3


# --- resumed -----------------------------------------------------------------------------------------------------


def ending(monkeypatch, at, number, rank):
    """Have a rank give itself a signal when so many steps are made."""
    advance = loop.advance

    def until(run, state, clock):
        if state.step == at and run.accelerator.process_index == rank:
            os.kill(os.getpid(), number)
        return advance(run, state, clock)

    monkeypatch.setattr(loop, "advance", until)


def assert_size_as_planned(folder, name):
    """The files of a checkpoint are as large as the plan says, but for their heads."""
    plan = Plan.from_dict(json.loads((folder / "plan.json").read_text()))
    apart = int(name[5:]) % 4 and apart_bytes(plan)  # the meetings of these runs
    files = list((folder / "checkpoints" / name).glob("*.safetensors"))
    heads = sum(8 + int.from_bytes(file.open("rb").read(8), "little") for file in files)
    found = sum(file.stat().st_size for file in files) - heads
    assert found == pytest.approx(plan.checkpoint_bytes + apart, rel=0.03)


CELLS = [
    pytest.param(DILOCO, 6, signal.SIGTERM, id="diloco-stopped-between-meetings", marks=pytest.mark.slow),
    pytest.param(DILOCO, 7, signal.SIGKILL, id="diloco-killed", marks=pytest.mark.slow),
    pytest.param(DILOCO, 8, signal.SIGTERM, id="diloco-stopped-at-a-meeting", marks=pytest.mark.slow),
    pytest.param(
        {"local_steps": {"every": 4}},
        6,
        signal.SIGTERM,
        id="averaging-stopped-between-meetings",
        marks=pytest.mark.slow,
    ),
    pytest.param(POWERSGD, 6, signal.SIGTERM, id="powersgd-stopped", marks=pytest.mark.slow),
    pytest.param(POWERSGD, 7, signal.SIGKILL, id="powersgd-killed", marks=pytest.mark.slow),
    pytest.param(HALF, 7, signal.SIGKILL, id="fp16-killed", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("communication", "at", "number"), CELLS)
def test_a_run_that_ended_between_goes_on_to_the_last_bit(tmp_path, communication, at, number):
    whole = run(tmp_path, name="whole", communication=communication)
    with pytest.MonkeyPatch.context() as patch:
        ending(patch, at, number, rank=1)
        with pytest.raises(FailedError):
            run(tmp_path, name="cut", communication=communication)
    cut = tmp_path / "runs" / "cut" / "pretrain"
    saved = sorted(path.name for path in (cut / "checkpoints").glob("step_*"))
    assert saved[-1] == f"step_{at if number == signal.SIGTERM else 4:08d}"
    assert_size_as_planned(cut, saved[-1])
    run(tmp_path, name="cut", communication=communication)
    assert figures(whole, "train/loss") == figures(cut, "train/loss")
    assert figures(whole, "eval/loss") == figures(cut, "eval/loss")
    assert same_bits(weights(whole), weights(cut))


@pytest.mark.slow
@pytest.mark.parametrize("communication", [DILOCO, POWERSGD], ids=["diloco", "powersgd"])
@pytest.mark.parametrize("layout", [ALONE, DDP4], ids=["alone", "four"])
def test_another_number_of_processes_goes_on_near_by(tmp_path, communication, layout):
    whole = figures(run(tmp_path, name="whole", communication=communication), "train/loss")
    with pytest.MonkeyPatch.context() as patch:
        ending(patch, 6, signal.SIGTERM, rank=1)
        with pytest.raises(FailedError):
            run(tmp_path, name="cut", communication=communication)
    cut = run(tmp_path, layout, name="cut", communication=communication)
    found = figures(cut, "train/loss")
    assert {step: found[step] for step in range(1, 7)} == {step: whole[step] for step in range(1, 7)}
    assert farthest(found, whole) < 0.1


@pytest.mark.slow
def test_gradients_may_travel_otherwise_from_any_step_on_but_meetings_make_another_run(tmp_path):
    whole = figures(run(tmp_path, name="whole"), "train/loss")
    with pytest.MonkeyPatch.context() as patch:
        ending(patch, 6, signal.SIGTERM, rank=1)
        with pytest.raises(FailedError):
            run(tmp_path, name="cut", communication=POWERSGD)
    with pytest.raises((FailedError, LlmkitError), match=r"machine\.communication\.local_steps"):
        run(tmp_path, name="cut", communication=DILOCO)
    cut = run(tmp_path, name="cut", communication=PLAIN)
    assert "where this run began with powersgd" in " ".join(plan_of(cut)["notes"])
    assert farthest(figures(cut, "train/loss"), whole) < 0.1


@pytest.mark.slow
def test_a_process_with_an_infinite_gradient_stops_all_of_them(tmp_path):
    """Its own loss is finite: only the norm tells, and all processes must be told."""

    def burst(rank):
        clip = loop.whole

        def infinite(norm):
            mine = int(os.environ["RANK"]) == rank
            return clip(norm) * (float("inf") if mine else 1.0)

        return infinite

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "whole", burst(1))
        with pytest.raises(FailedError) as failed:
            run(tmp_path, communication=DILOCO)
    assert str(failed.value).count("the gradient's norm inf") == 2, "one process did not know"
