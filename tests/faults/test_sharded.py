"""Checkpoints of sharded models: real gloo processes, every resharding, and processes killed while they save."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from llmkit.durable import calls, verify_folder
from llmkit.errors import CorruptError, LostWorkerError, RunError
from llmkit.optim import make_optimizer, parameter_names
from llmkit.recipe.schema import Optim
from llmkit.train.checkpoint import Checkpoints, model_tensors, optimizer_tensors
from llmkit.train.saving import Best, Keep, Saver
from llmkit.train.sharded import ShardedWriter, _naming_failures, fill, is_sharded, load_checkpoint
from llmkit.train.state import TrainState

AT_2 = TrainState(step=2, tokens=20)
IDENTITY = {"data": "abc", "seed": 1}
LIMIT_S = 120
PRELOAD = [
    "pytest",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "llmkit.train.sharded",
    "llmkit.recipe.schema",
]


class Net(torch.nn.Module):
    """A tiny llama of odd sizes, with a tied head, a buffer that is saved, and a parameter of three numbers."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=101,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=16,
                tie_word_embeddings=True,
            )
        )
        self.three = torch.nn.Parameter(torch.randn(3))
        self.register_buffer("kept", torch.full((2,), float(seed)))

    def forward(self, ids):
        return self.llama(ids).logits.square().mean() + self.three.square().sum()


def plain(seed, ranks=1):
    net = Net(seed)
    return net, make_optimizer(net, Optim(lr=1e-2))


def fsdp(seed, ranks):
    net = Net(seed)
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in net.llama.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, make_optimizer(net, Optim(lr=1e-2))


def tp(seed, ranks):
    net = Net(seed)
    _split(net, init_device_mesh("cpu", (ranks,)))
    return net, make_optimizer(net, Optim(lr=1e-2))


def fsdp_tp(seed, ranks):
    net = Net(seed)
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
    _split(net, mesh["tp"])
    for layer in net.llama.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(net, mesh=mesh["dp"])
    return net, make_optimizer(net, Optim(lr=1e-2))


def hsdp(seed, ranks):
    net = Net(seed)
    fully_shard(net, mesh=init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copies", "shards")))
    return net, make_optimizer(net, Optim(lr=1e-2))


def _split(net, mesh):
    plan = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for layer in net.llama.model.layers:
        parallelize_module(layer, mesh, plan)
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                whole = distribute_tensor(parameter.detach(), mesh, [Replicate()])
                setattr(module, name, torch.nn.Parameter(whole))
    net.llama.lm_head.weight = net.llama.model.embed_tokens.weight


MAKE = {"plain": plain, "fsdp": fsdp, "tp": tp, "fsdp_tp": fsdp_tp, "hsdp": hsdp}


def move(net, optimizer, step):
    """An update whose gradients are a function of the parameter's name and the step alone, under any sharding."""
    for number, (_, parameter) in enumerate(sorted(net.named_parameters())):
        shape = parameter.shape
        made = torch.sin(torch.arange(parameter.numel(), dtype=torch.float32) * (number + step + 1))
        parameter.grad = _like(made.reshape(shape), parameter)
    optimizer.step()
    optimizer.zero_grad()


def train(net, optimizer, step):
    """A real update, on other rows for each process."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    ids = (torch.arange(12).reshape(2, 6) * (step + 2) + 7 * rank) % 101
    net(ids).backward()
    optimizer.step()
    optimizer.zero_grad()


def _like(whole, tensor):
    if isinstance(tensor, DTensor):
        return distribute_tensor(whole, tensor.device_mesh, tensor.placements)
    return whole


def whole(tensors):
    """The tensors in full, as every process sees them."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in tensors.items()
    }


def everything(net, optimizer):
    net.state_dict()  # FSDP: back to shards
    return {
        **whole(model_tensors(net)),
        **{f"optimizer {name}": t for name, t in whole(optimizer_tensors(net, optimizer)).items()},
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, different


def checkpoints(folder):
    return Checkpoints(Path(folder) / "checkpoints", IDENTITY)


def save(writer, net, optimizer, step):
    """Copy, and write in another thread while the tensors change, as a run does."""
    weights, moments = (_copy(tensors) for tensors in writer.tensors(net, optimizer))
    raised = []

    def work():
        try:
            writer.write(weights, moments, TrainState(step=step, tokens=10 * step))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    live = [p.to_local().detach() if isinstance(p, DTensor) else p.detach() for p in net.parameters()]
    before = [tensor.clone() for tensor in live]
    for tensor in live:
        tensor.fill_(float("nan"))  # training goes on
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    for tensor, value in zip(live, before, strict=True):
        tensor.copy_(value)
    if raised:
        raise raised[0]


def _copy(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


# Processes: a fork server that has imported everything once, and has no threads.


def together(ranks, work, folder, *arguments):
    """Run `work(rank, ranks, folder, *arguments)` in so many processes; return exit codes and what went wrong."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder.mkdir(exist_ok=True)
    meeting = folder / f"meeting-{work.__name__}"
    meeting.unlink(missing_ok=True)
    processes = [
        context.Process(target=_begin, args=(rank, ranks, meeting, work, folder, arguments), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
        if process.is_alive():
            process.kill()
            process.join()
            pytest.fail(f"a process did not end within {LIMIT_S} s")
    notes = [folder / f"wrong-{rank}" for rank in range(ranks)]
    wrong = {rank: note.read_text() for rank, note in enumerate(notes) if note.exists()}
    for note in notes:
        note.unlink(missing_ok=True)
    return [process.exitcode for process in processes], wrong


def _begin(rank, ranks, meeting, work, folder, arguments):
    torch.set_num_threads(1)
    code = 1
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
        work(rank, ranks, folder, *arguments)
        dist.barrier()
        code = 0
    except BaseException as error:
        words = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        (folder / f"wrong-{rank}").write_text(words)
    os._exit(code)


def together_well(ranks, work, folder, *arguments):
    codes, wrong = together(ranks, work, folder, *arguments)
    assert codes == [0] * ranks, "\n".join(wrong.values()) or codes


# What processes do.


def _save_moved(rank, ranks, folder, kind):
    net, optimizer = MAKE[kind](3, ranks)
    move(net, optimizer, 0)
    move(net, optimizer, 1)
    writer = ShardedWriter(checkpoints(folder))
    save(writer, net, optimizer, 2)
    found = everything(net, optimizer)
    writer.close()
    if rank == 0:
        save_file({name: t.contiguous() for name, t in found.items()}, folder / "truth.safetensors")


def _load_moved(rank, ranks, folder, kinds):
    truth = load_file(folder / "truth.safetensors")
    for kind in kinds:
        net, optimizer = MAKE[kind](4, ranks)
        assert is_sharded(net) == (kind != "plain")
        path = checkpoints(folder).path(2)
        assert load_checkpoint(checkpoints(folder), path, net, optimizer) == TrainState(step=2, tokens=20)
        assert_same(everything(net, optimizer), truth)
        move(net, optimizer, 2)  # the optimizer is whole: it can go on
        assert not torch.equal(everything(net, optimizer)["three"], truth["three"])


def save_plain(folder):
    net, optimizer = plain(3)
    move(net, optimizer, 0)
    move(net, optimizer, 1)
    checkpoints(folder).write(
        model_tensors(net), optimizer_tensors(net, optimizer), TrainState(step=2, tokens=20)
    )
    save_file(everything(net, optimizer), folder / "truth.safetensors")


def load_plain(folder):
    net, optimizer = plain(4)
    path = checkpoints(folder).path(2)
    assert load_checkpoint(checkpoints(folder), path, net, optimizer) == TrainState(step=2, tokens=20)
    assert_same(everything(net, optimizer), load_file(folder / "truth.safetensors"))


@pytest.fixture(scope="module")
def saved_on_two(tmp_path_factory):
    """A checkpoint of two processes, and what it should hold."""
    folder = tmp_path_factory.mktemp("two")
    together_well(2, _save_moved, folder, "fsdp")
    return folder


@pytest.fixture
def on_two(saved_on_two, tmp_path):
    """A copy of it, to be spoilt."""
    shutil.copytree(saved_on_two, tmp_path / "run")
    return tmp_path / "run"


def test_two_processes_save_pieces_in_the_common_form(saved_on_two):
    path = checkpoints(saved_on_two).path(2)
    manifest = verify_folder(path)
    assert set(manifest["files"]) == {
        "model.rank-00000.safetensors",
        "model.rank-00001.safetensors",
        "optimizer.rank-00000.safetensors",
        "optimizer.rank-00001.safetensors",
        "state.json",
    }
    assert (manifest["step"], manifest["num_shards"]) == (2, 2)
    state = json.loads((path / "state.json").read_text())
    assert state["identity"] == IDENTITY
    assert state["state"]["step"] == 2
    embedding = "llama.model.embed_tokens.weight"
    sizes = []
    for rank in range(2):
        with safe_open(path / f"model.rank-{rank:05d}.safetensors", framework="pt") as opened:
            sizes.append(opened.get_slice(embedding).get_shape())
            assert "llama.lm_head.weight" not in opened.keys(), "tied: saved once"  # noqa: SIM118
    assert sizes == [[51, 16], [50, 16]]
    assert [p.name for p in path.parent.iterdir()] == ["step_00000002"], "nothing temporary is left"


def test_what_is_replicated_is_written_once(saved_on_two):
    path = checkpoints(saved_on_two).path(2)
    kept = [set(load_file(path / f"model.rank-0000{r}.safetensors")) & {"kept"} for r in range(2)]
    assert sorted(map(len, kept)) == [0, 1]


def test_one_process_loads_what_two_saved(saved_on_two):
    load_plain(saved_on_two)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_reads_it_too(saved_on_two, tmp_path):
    for part in ("model", "optimizer"):
        folder = tmp_path / part
        folder.mkdir()
        for file in checkpoints(saved_on_two).path(2).glob(f"{part}.*"):
            shutil.copy(file, folder)
    truth = load_file(saved_on_two / "truth.safetensors")
    weights = {name: torch.zeros_like(t) for name, t in truth.items() if not name.startswith("optimizer ")}
    torch_load(weights, storage_reader=HuggingFaceStorageReader(tmp_path / "model"), no_dist=True)
    assert_same(weights, {name: truth[name] for name in weights})


def test_two_processes_load_what_two_saved_however_they_are_split(saved_on_two):
    together_well(2, _load_moved, saved_on_two, ["fsdp", "tp", "plain"])


def test_two_processes_load_what_one_saved(tmp_path):
    save_plain(tmp_path)
    together_well(2, _load_moved, tmp_path, ["fsdp", "tp"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "tp", "fsdp_tp", "hsdp"])
def test_four_processes(tmp_path, saved_on_two, kind):
    """Four save, with pieces that are empty on one of them; one, two and four load. Four load what two saved."""
    together_well(4, _save_moved, tmp_path, kind)
    together_well(4, _load_moved, tmp_path, ["fsdp", "tp", "fsdp_tp", "hsdp"])
    together_well(2, _load_moved, tmp_path, ["fsdp", "tp"])
    load_plain(tmp_path)
    together_well(4, _load_moved, saved_on_two, [kind])


# What does not fit is refused.


def _rewrite(path, change):
    """Let `change` alter the tensors of a file, offsets kept."""
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("model.rank-00000", lambda t: t.pop("three"), "of the 3 numbers of model/three the files hold 1"),
        ("model.rank-00001", lambda t: t.pop("three"), r"model/three is \[2\], the model has \[3\]"),
        (
            "model.rank-00000",
            lambda t: t.update(three=t["three"].bfloat16()),
            "three is torch.float32, in another",
        ),
        ("*", lambda t: t.pop("three", None), r"missing \['model/three'\]"),
        (
            "*",
            lambda t: t.update({k: t[k].half() for k in t}),
            "is torch.float16, the model has torch.float32",
        ),
        (
            "*",
            lambda t: [t.pop(k) for k in list(t) if k.endswith(".three")],
            r"missing \['exp_avg\.three', 'exp_avg_sq\.three', 'step\.three'\], not wanted \[\]",
        ),
        (
            "optimizer.*",
            lambda t: [t.pop(k) for k in list(t) if k.startswith("exp_avg_sq.")],
            r"missing \['exp_avg_sq\.",
        ),
        ("optimizer.*", lambda t: t.pop("exp_avg.three", None), r"missing \['exp_avg\.three'\], not wanted"),
        ("optimizer.*", dict.clear, r"optimizer.*: missing \['exp_avg\."),
        (
            "optimizer.*",
            lambda t: t.update({k: t[k].half() for k in t if k == "exp_avg.three"}),
            r"exp_avg\.three is \[3\] of float16, the optimizer makes \[3\] of float32",
        ),
        (
            "optimizer.rank-00001",
            lambda t: t.pop("exp_avg.three"),
            r"exp_avg\.three is \[2\] of float32, the optimizer makes \[3\] of float32",
        ),
    ],
)
def test_what_is_missing_or_of_another_kind_is_refused(on_two, file, change, words):
    path = checkpoints(on_two).path(2)
    for one in path.glob(f"{file}.safetensors"):
        _rewrite(one, change)
    net, optimizer = plain(4)
    with pytest.raises(RunError, match=words):
        fill(path, net, optimizer, AT_2)


def test_a_kind_that_the_optimizer_does_not_have_is_refused(on_two):
    path = checkpoints(on_two).path(2)
    _rewrite(path / "optimizer.rank-00000.safetensors", lambda t: t.pop("exp_avg.three"))
    _rewrite(path / "optimizer.rank-00001.safetensors", lambda t: t.pop("exp_avg.three"))
    save_file({"junk.three": torch.zeros(3)}, path / "optimizer.more.safetensors")
    with pytest.raises(RunError, match=r"missing \['exp_avg.three'\], not wanted \['junk.three'\]"):
        fill(path, *plain(4), AT_2)


def test_a_missing_file_is_refused_even_where_nobody_verifies(on_two):
    path = checkpoints(on_two).path(2)
    (path / "model.rank-00000.safetensors").unlink()
    net, optimizer = plain(4)
    before = everything(net, optimizer)
    with pytest.raises(RunError, match="the files hold"):
        fill(path, net, optimizer, AT_2)
    assert_same(everything(net, optimizer), before)


def test_a_parameter_more_or_another_shape_is_refused(on_two):
    path = checkpoints(on_two).path(2)
    net = Net(1)
    net.more = torch.nn.Linear(2, 2)
    with pytest.raises(RunError, match=r"missing \['model/more.bias', 'model/more.weight'\]"):
        fill(path, net, make_optimizer(net, Optim()), AT_2)
    net = Net(1)
    net.three = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(RunError, match=r"model/three is \[3\], the model has \[4\]"):
        fill(path, net, make_optimizer(net, Optim()), AT_2)
    net = Net(1)
    del net.three
    with pytest.raises(RunError, match=r"not wanted \['model/three'\]"):
        fill(path, net, make_optimizer(net, Optim()), AT_2)


def test_another_run_is_refused(saved_on_two):
    other = Checkpoints(saved_on_two / "checkpoints", {"data": "abc", "seed": 2})
    with pytest.raises(RunError, match="seed: 1 -> 2"):
        load_checkpoint(other, other.path(2), *plain(4))


@pytest.mark.parametrize("name", ["model.rank-00001.safetensors", "optimizer.rank-00000.safetensors"])
def test_a_flipped_bit_in_any_shard_is_found(on_two, name):
    file = checkpoints(on_two).path(2) / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    warnings = []
    with pytest.raises(CorruptError, match="every checkpoint is damaged"):
        checkpoints(on_two).newest(warnings.append)
    assert name in warnings[0]


# Failures while saving.


def _fail_on(point, rank, name, do):
    """Let process `point` meet `do` when the door is about to bring or write `name`."""

    def watch(call):
        if rank == point[0] and call.when == "before" and call.name == point[1] and name in str(call.path):
            do()

    calls.fail_point = watch


def _no_space():
    raise OSError(28, os.strerror(28))


FAILURES = [
    ((1, "foreign"), "model.rank-00001", "no space left on the disk"),
    ((1, "fsync"), "optimizer.rank-00001", "no space left on the disk"),
    ((0, "foreign"), "model.rank-00000", "no space left on the disk"),
    ((0, "mkdir"), "step_00000004", "no space left on the disk"),
    ((0, "write"), "state.json", "no space left on the disk"),
    ((0, "rename"), "step_00000004", "no space left on the disk"),
]


def _save_with_errors(rank, ranks, folder):
    """Each failure on one process is an error on both, nothing is published, and the next save succeeds."""
    net, optimizer = fsdp(3, ranks)
    writer = ShardedWriter(checkpoints(folder))
    train(net, optimizer, 0)
    save(writer, net, optimizer, 2)
    for point, name, words in FAILURES:
        _fail_on(point, rank, name, _no_space)
        with pytest.raises(RunError, match=words):
            save(writer, net, optimizer, 4)
        calls.fail_point = None
        dist.barrier()
        left = sorted(p.name for p in checkpoints(folder).folder.iterdir())
        assert left == ["step_00000002"], (point, name, left)
        dist.barrier()

    def refuse():
        if rank == 1:
            raise RunError("weights are not finite", hint="lower the learning rate")

    with pytest.raises(RunError, match="weights are not finite\n  lower the learning rate"):
        writer.write(*writer.tensors(net, optimizer), TrainState(step=4), before_writing=refuse)
    own = writer._write_pieces

    def elsewhere(place, tensors):  # a disk of one's own, at the same path
        sizes = own(place, tensors)
        if rank == 1:
            (place / "model.rank-00001.safetensors").unlink()
        return sizes

    writer._write_pieces = elsewhere
    with pytest.raises(RunError, match=r"process 1 wrote [\d,]+ bytes to .*, the first process sees 0 there"):
        save(writer, net, optimizer, 4)
    writer._write_pieces = own
    weights, moments = writer.tensors(net, optimizer)
    writer._plan.items[:] = [item for item in writer._plan.items if item.index.fqn != "model/kept"]
    with pytest.raises(RunError, match=r"missing \['model/kept'\]"):
        writer.write(weights, moments, TrainState(step=4))
    save(writer, net, optimizer, 4)
    verify_folder(checkpoints(folder).path(4))
    inode = checkpoints(folder).path(4).stat().st_ino
    save(writer, net, optimizer, 4)
    assert checkpoints(folder).path(4).stat().st_ino == inode, "a whole one stays"
    dist.barrier()
    if rank == 0:
        (checkpoints(folder).path(4) / "model.rank-00001.safetensors").unlink()
    dist.barrier()
    save(writer, net, optimizer, 4)
    verify_folder(checkpoints(folder).path(4))
    writer.close()


def test_an_error_on_one_process_is_an_error_on_all_and_publishes_nothing(tmp_path):
    together_well(2, _save_with_errors, tmp_path)


def _save_in_the_background(rank, ranks, folder):
    """The run's own saver: rotation by the first process, an error on one process known on all."""
    net, optimizer = fsdp(3, ranks)
    kept, writer = checkpoints(folder), ShardedWriter(checkpoints(folder))
    with Saver(kept, Keep(1), background=True, writer=writer, tidies=rank == 0) as saver:
        for step in range(1, 5):
            train(net, optimizer, step)
            saver.save(net, optimizer, TrainState(step=step, tokens=10 * step))
        saver.wait()
        dist.barrier()
        assert kept.steps() == [4]
        truth = everything(net, optimizer)
        if rank == 1:
            net.three.to_local().detach().fill_(float("nan"))
        saver.save(net, optimizer, TrainState(step=5))
        with pytest.raises(RunError, match="step 5: the weights of three are not finite"):
            saver.wait()
        assert saver.failed
        saver._writing = None
    load_checkpoint(kept, kept.path(4), net, optimizer)
    assert_same(everything(net, optimizer), truth)
    writer.close()


def test_the_runs_saver_saves_shards_in_the_background(tmp_path):
    together_well(2, _save_in_the_background, tmp_path)


def _evaluate_then_save(rank, ranks, folder):
    """After a forward pass alone FSDP leaves the outer parameters gathered: they are saved as shards all the same."""
    net, optimizer = fsdp(3, ranks)
    writer = ShardedWriter(checkpoints(folder))
    train(net, optimizer, 0)
    with torch.no_grad():
        net(torch.arange(6)[None])
    assert not isinstance(net.three, DTensor), "what this test is about"
    save(writer, net, optimizer, 2)
    net.state_dict()
    assert is_sharded(net)
    other, other_optimizer = fsdp(5, ranks)
    with torch.no_grad():
        other(torch.arange(6)[None])
    load_checkpoint(checkpoints(folder), checkpoints(folder).path(2), other, other_optimizer)
    assert_same(everything(other, other_optimizer), everything(net, optimizer))
    assert parameter_names(other, other_optimizer) == parameter_names(net, optimizer)
    writer.close()


def test_an_evaluation_before_the_save_changes_nothing(tmp_path):
    together_well(2, _evaluate_then_save, tmp_path)


def _run(rank, ranks, folder, until, death):
    """Train with a checkpoint every two steps, from the newest there is; die as told in the save of step 4."""
    net, optimizer = fsdp(3, ranks)
    kept = checkpoints(folder)
    warnings = []
    newest = kept.newest(warnings.append)
    assert not warnings
    step = load_checkpoint(kept, newest, net, optimizer).step if newest else 0
    if rank == 0:
        (folder / "started").write_text(str(step))
    dist.barrier()
    writer = ShardedWriter(kept)
    if death is not None:
        point, name = death
        _fail_on(point, rank, name, lambda: os.kill(os.getpid(), signal.SIGKILL))
    while step < until:
        train(net, optimizer, step)
        step += 1
        if step % 2 == 0:
            save(writer, net, optimizer, step)
    found = everything(net, optimizer)
    if rank == 0:
        save_file({k: t.contiguous() for k, t in found.items()}, folder / "end.safetensors")
    writer.close()


DEATHS = [
    ((1, "foreign"), "step_00000004"),
    ((1, "fsync"), "step_00000004"),
    ((0, "foreign"), "step_00000004"),
    ((0, "write"), "step_00000004"),
    ((0, "rename"), "step_00000004"),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    together_well(2, _run, folder, 6, None)
    return load_file(folder / "end.safetensors")


def _kill_and_resume(folder, uninterrupted, point, name):
    codes, wrong = together(2, _run, folder, 6, (point, name))
    assert codes[point[0]] == -signal.SIGKILL
    assert codes[1 - point[0]] == 1
    words = wrong[1 - point[0]]
    assert re.match(r"LostWorkerError: lost the connection to another worker \(.*\), while saving to ", words)
    assert "the newest checkpoint resumes" in words
    assert sorted(p.name for p in checkpoints(folder).folder.glob("step_*")) == ["step_00000002"]
    together_well(2, _run, folder, 6, None)
    assert (folder / "started").read_text() == "2"
    assert_same(load_file(folder / "end.safetensors"), uninterrupted)


@pytest.mark.parametrize(("point", "name"), [DEATHS[1], DEATHS[4]])
def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path, uninterrupted, point, name):
    _kill_and_resume(tmp_path, uninterrupted, point, name)


@pytest.mark.slow
@pytest.mark.parametrize(("point", "name"), [DEATHS[0], DEATHS[2], DEATHS[3]])
def test_a_process_killed_anywhere_else_in_the_save_too(tmp_path, uninterrupted, point, name):
    _kill_and_resume(tmp_path, uninterrupted, point, name)


def test_what_is_not_a_lost_process_is_not_called_one():
    """A worker that lost another is not to blame; one with an error of its own is."""
    with pytest.raises(RuntimeError, match="a shape") as caught, _naming_failures("saving"):
        raise RuntimeError("a shape does not fit")
    assert not isinstance(caught.value, LostWorkerError)
    with pytest.raises(LostWorkerError, match=r"lost .* \(Connection closed by peer\), while saving"):  # noqa: SIM117
        with _naming_failures("saving"):
            raise RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:1] Connection closed by peer")


def _save_the_best(rank, ranks, folder, dies):
    """Save at step 3 a better one than at step 1; the first process may die when it is there and not noted."""
    net, optimizer = fsdp(3, ranks)
    kept = checkpoints(folder)
    said = []
    newest = kept.newest(said.append)
    done = load_checkpoint(kept, newest, net, optimizer).step if newest else None
    dist.barrier()
    if dies:
        _fail_on((0, "rename"), rank, "best.json", lambda: kept.path(3).exists() and os.kill(os.getpid(), 9))
    keep, writer = Keep(1, best="eval/loss"), ShardedWriter(kept)
    with Saver(
        kept, keep, background=True, writer=writer, tidies=rank == 0, resumed=done, warn=said.append
    ) as saver:
        dist.barrier()  # as in an evaluation: all have read what was the best before one of them writes it
        for step, loss in ((1, 2.0), (2, 3.0), (3, 1.0), (4, 5.0)):
            if step >= (done or 0):
                if step != done:
                    train(net, optimizer, step)
                assert saver.is_best(step, {"eval/loss": loss}) == (loss < 3.0)
                saver.save(net, optimizer, TrainState(step=step))
        saver.wait()
    assert not said
    writer.close()


def test_a_process_killed_between_publication_and_the_note_of_the_best(tmp_path):
    kept = checkpoints(tmp_path)
    codes, _ = together(2, _save_the_best, tmp_path, True)
    assert codes == [-signal.SIGKILL, 1]
    assert kept.steps() == [1, 2, 3], "the best of before stays until the new one is noted"
    assert Best.of(kept, "eval/loss", up_to=3) == Best("eval/loss", 1, 2.0)
    together_well(2, _save_the_best, tmp_path, False)
    assert kept.steps() == [3, 4]
    assert Best.of(kept, "eval/loss", up_to=4) == Best("eval/loss", 3, 1.0)
