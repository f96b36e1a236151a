"""Runs of a recipe under any layout, each process forked from this one, which has imported everything already."""

import faulthandler
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from training import options, recipe
from tuning import recipe as task_recipe

from llmkit.plan import Plan
from llmkit.plan.parallel import Layout
from llmkit.recipe import load_recipe
from llmkit.report.console import make_reporter
from llmkit.report.run_log import read_metrics
from llmkit.train import loop
from llmkit.train.worker import main as work

LIMIT_S = float(os.environ.get("LIMIT_S", 240))
VERBS = {verb: import_module(f"llmkit.run.{verb}") for verb in ("pretrain", "finetune")}
import_module("llmkit.train.pretrain")  # before any fork
ALONE = Layout()
DDP2, DDP4 = Layout(replicate=2), Layout(replicate=4)
FSDP2, FSDP4 = Layout(shard=2), Layout(shard=4)
HSDP4 = Layout(replicate=2, shard=2)
TP2 = Layout(tensor=2)
FSDP_TP4 = Layout(shard=2, tensor=2)
DDP_TP4 = Layout(replicate=2, tensor=2)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
"""One that two processes can split."""
EP2, FSDP_EP4 = Layout(expert=2), Layout(shard=2, expert=2)
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
QWEN_MOE = {
    **{key: value for key, value in MIXTRAL.items() if key != "num_local_experts"},
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 4,
}
SHORT = {
    "pretrain__model__config": LLAMA,
    "machine__micro_batch": 2,
    "pretrain__train__length": "6 steps",
    "pretrain__checkpoint__every": "2 steps",
    "pretrain__eval__every": "3 steps",
}
"""Micro-batches of two: a process accumulates four, two share two each, four have one each."""


class FailedError(Exception):
    """A process of the run ended otherwise than well; its words."""


def named(layout):
    """A short name for a test's id: `shard2-tensor2`."""
    return "-".join(f"{key}{size}" for key, size in layout.to_dict().items() if size > 1) or "alone"


def train(folder, layout=ALONE, task=None, name=None, *, fresh=False, plan=None, **changes):
    """Train under a layout, a process each; return the run folder. `changes` are dotted keys of the recipe."""
    name = name or named(layout)
    made = recipe(folder, name, **changes) if task is None else task_recipe(folder, task, name, **changes)
    made["machine"].pop("parallel", None)
    verb = "pretrain" if task is None else "finetune"
    verbs = VERBS[verb]
    known = verbs.train_job
    verbs.train_job = lambda job, *_: _train_job(job, layout, plan or {})
    try:
        given = replace(options(folder, fresh=fresh), processes=layout.data_size)
        return getattr(verbs, verb)(load_recipe(made), given, make_reporter(quiet=True)).folder
    finally:
        verbs.train_job = known


def _train_job(job, layout, more):
    plan = replace(
        Plan.from_dict(job.plan), world_size=layout.world_size, parallel=layout.to_dict(), **more
    ).to_dict()
    path = Path(job.folder) / "job.json"
    replace(job, plan=plan).save(path)
    meeting = Path(job.folder) / "meeting"
    meeting.unlink(missing_ok=True)
    ids = [_start(path, rank, layout.world_size, meeting) for rank in range(layout.world_size)]
    codes = _wait(ids)
    if any(codes):
        words = [(path.parent / f"said-{rank}").read_text() for rank, code in enumerate(codes) if code]
        raise FailedError("\n".join(words))


def _start(path, rank, ranks, meeting):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        if ranks > 1:
            os.environ.update({key: str(value) for key, value in place.items()})
            os.environ["LLMKIT_RENDEZVOUS"] = str(meeting)
        said = os.open(path.parent / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = sys.stderr = os.fdopen(said, "w", buffering=1)  # pytest had put its own there
        torch.set_num_threads(1)
        AcceleratorState._reset_state(True)  # a test before this one may have trained in this process
        GradientState._reset_state()
        faulthandler.dump_traceback_later(LIMIT_S - 10, file=2)
        code = work(str(path))
    finally:
        os._exit(code)


def _wait(ids):
    """The exit codes; when one process fails or takes too long the others are ended."""
    codes, ends = {}, time.monotonic() + LIMIT_S
    while len(codes) < len(ids):
        for one in set(ids) - codes.keys():
            found, status = os.waitpid(one, os.WNOHANG)
            if found:
                codes[one] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() > ends
        if any(codes.values()) or late:
            ends = min(ends, time.monotonic() + 5)
        if late:
            for one in set(ids) - codes.keys():
                os.kill(one, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[one] for one in ids]


@contextmanager
def stopping(step, rank=0, number=signal.SIGTERM):
    """Have a rank of the runs within give itself a signal when so many steps are made; the run must end by it."""
    advance, here = loop.advance, os.getpid()

    def until(run, state, clock):
        if state.step == step and run.accelerator.process_index == rank:
            assert os.getpid() != here
            os.kill(os.getpid(), number)
        return advance(run, state, clock)

    loop.advance = until
    try:
        yield
    except FailedError:
        return
    finally:
        loop.advance = advance
    raise AssertionError(f"the run went on after step {step}")


def figures(folder, key):
    """Step -> a figure, from the run's records."""
    return {record["step"]: record[key] for record in read_metrics(Path(folder)) if key in record}


def farthest(ours, theirs):
    """The largest relative distance of two runs' figures of the same steps."""
    assert ours.keys() == theirs.keys()
    return max(abs(ours[step] - theirs[step]) / max(1.0, abs(theirs[step])) for step in theirs)


def apart(ours, theirs):
    """The largest distance of any number of two models' tensors, as a share of its tensor's largest."""
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in theirs)


def plan_of(folder):
    """What the run's plan says."""
    return json.loads((Path(folder) / "plan.json").read_text())
