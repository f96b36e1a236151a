"""Faults in the middle of real checkpoints: a program that forks a child for each, and prints what was found.

It has not done any work with torch before it forks, so that its children are as good as new processes.
"""

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from injection import (
    CHANGING,
    KILLS,
    REFUSALS,
    Fault,
    Recorder,
    failing,
    in_child,
    losses,
    read_strace,
    under_strace,
    without_strace,
)
from torch import nn

from llmkit.durable import sweep
from llmkit.optim import make_optimizer
from llmkit.recipe.schema import Optim
from llmkit.train.checkpoint import Checkpoints
from llmkit.train.saving import Keep, Saver
from llmkit.train.state import TrainState

BACKGROUND = True


def made(step: int) -> tuple[nn.Module, torch.optim.Optimizer, TrainState]:
    """A model whose every number is the step, its optimizer, and the state of that step."""
    model = nn.Linear(40, 30)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(step))
    optimizer = make_optimizer(model, Optim())
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.full_like(parameter, step),
            "exp_avg_sq": torch.full_like(parameter, step),
        }
    return model, optimizer, TrainState(step=step)


def save(folder: Path, step: int) -> None:
    """Save the checkpoint of a step and let the older ones go."""
    with Saver(Checkpoints(folder, {}), Keep(last=1), background=BACKGROUND) as saver:
        saver.save(*made(step))


def newest(folder: Path) -> int:
    """The step that a run would go on from, every number of it right; -1 when anything is wrong."""
    checkpoints = Checkpoints(folder, {})
    warnings: list[str] = []
    path = checkpoints.newest(warnings.append)
    if path is None or warnings:
        return -1
    model, optimizer, _ = made(0)
    step = checkpoints.load(path, model, optimizer).step
    wanted, moments, _ = made(step)
    right = all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    moved = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    expected = [moments.state[p]["exp_avg"] for p in wanted.parameters()]
    return step if right and all(map(torch.equal, moved, expected)) else -1


def after(folder: Path, code: int, **fault: object) -> dict[str, object]:
    """What is there after a fault, and after the next save."""
    found = {**fault, "code": code, "newest": newest(folder)}
    sweep(folder)
    save(folder, 3)
    return {**found, "then": newest(folder), "left": sorted(os.listdir(folder))}


def reset(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, 1)


def by_fail_points(folder: Path, hows: Sequence[str] = (*KILLS, *REFUSALS)) -> list[dict[str, object]]:
    counter, trials = Fault("none", 0), []
    reset(folder)
    with failing(counter):
        save(folder, 2)
    for how in hows:
        for at in range(1, counter.seen + 1):
            reset(folder)
            code = in_child(lambda: save(folder, 2), Fault(how, at, lasting=True))
            trials.append(after(folder, code, how=how, at=at))
    return trials


def by_strace(folder: Path) -> list[dict[str, object]]:
    trace, trials = folder.with_name("trace"), []
    reset(folder)
    under_strace(lambda: save(folder, 2), "-e", f"trace={CHANGING}", "-o", str(trace))
    counts = Counter(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE))
    for call, count in counts.items():
        for at in range(1, count + 1):
            reset(folder)
            inject = ("-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={at}")
            trials.append(after(folder, under_strace(lambda: save(folder, 2), *inject), how=call, at=at))
    return trials


def power(folder: Path) -> list[dict[str, object]]:
    """What a loss of power could tear, by the fail points and by strace, and how many fsyncs each saw."""
    recorder, trace = Recorder(), folder.with_name("trace")
    reset(folder)
    with failing(recorder):
        save(folder, 2)
    seen = {"fail points": recorder.events}
    if not without_strace():
        reset(folder)
        under_strace(lambda: save(folder, 2), "-y", "-s", "4", "-e", f"trace={CHANGING}", "-o", str(trace))
        seen["strace"] = read_strace(trace.read_text())
    return [
        {"by": by, "fsyncs": sum(e.what == "fsync" for e in events), "losses": losses(events)}
        for by, events in seen.items()
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    kinds = {
        "kills": lambda: by_fail_points(place, ["kill-after"]),
        "fail points": lambda: by_fail_points(place),
        "strace": lambda: by_strace(place),
        "power": lambda: power(place),
    }
    json.dump({kind: kinds[kind]() for kind in sys.argv[2:]}, sys.stdout)
