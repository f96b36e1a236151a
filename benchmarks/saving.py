"""How long a checkpoint stops the training: the share of a whole synchronous save that the loop waits for.

    python -m benchmarks.saving [--rounds 5] [--preset gpt-small] [--folder DIR] [--json] [--smoke]

One process trains a model of the preset's shape (AdamW, so a checkpoint holds three times its weights in fp32). In
each round it saves once by each contender, in rotating order, with training steps in between until the write is done.
The wait is what the call takes in the training thread; a synchronous save by llmkit's own code (the same files, hashes
and fsyncs) in the same round is 100 %. Every save is of the same tensors, which is checked on what was written. What
the writing costs the steps beside it is given apart, as the CPU seconds of a step with and without a write under way.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from llmkit.models.build import build_model
from llmkit.optim import make_optimizer
from llmkit.recipe.schema import Model, Optim
from llmkit.train.checkpoint import Checkpoints, model_tensors, optimizer_tensors
from llmkit.train.saving import Keep, Saver
from llmkit.train.state import TrainState

BASE = "llmkit, waiting"
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


class Work:
    """A model in training, and a folder to save to."""

    def __init__(self, preset: str, vocab_size: int, folder: Path) -> None:
        self.model = build_model(
            Model(preset=preset, context=64), "causal", vocab_size=vocab_size, special_ids=SPECIAL, seed=0
        )
        self.optimizer = make_optimizer(self.model, Optim())
        self.folder = folder
        self.number = 0
        self.ids = torch.arange(64).unsqueeze(0) % vocab_size
        self.step()

    def step(self) -> float:
        """One training step; returns its wall seconds."""
        start = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            **{f"model.{name}": tensor for name, tensor in model_tensors(self.model).items()},
            **{f"optimizer.{name}": t for name, t in optimizer_tensors(self.model, self.optimizer).items()},
        }

    def place(self) -> Path:
        self.number += 1
        return self.folder / f"{self.number}"


Contender = Callable[[Work], tuple[float, list[float], Path]]
"""Saves once -> seconds that the training thread waited, seconds of the steps made meanwhile, what was written."""


def own(background: bool) -> Contender:
    saver: list[Saver] = []  # kept, as in a run: its buffers are made once

    def save(work: Work) -> tuple[float, list[float], Path]:
        if not saver:
            saver.append(Saver(Checkpoints(work.folder, {}), Keep(last=1), background=background))
            saver[0].reserve(work.model, work.optimizer)
        work.number += 1
        start = time.perf_counter()
        saver[0].save(work.model, work.optimizer, TrainState(step=work.number))
        waited = time.perf_counter() - start
        beside = []
        while background and saver[0]._writing is not None and saver[0]._writing.thread.is_alive():
            beside.append(work.step())
        saver[0].wait()
        return waited, beside, work.folder / f"step_{work.number:08d}"

    return save


def by_torch_save(work: Work) -> tuple[float, list[float], Path]:
    path = work.place()
    tensors = work.tensors()
    start = time.perf_counter()
    torch.save(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start, [], path


def by_dcp_async(work: Work) -> tuple[float, list[float], Path]:
    path = work.place()
    tensors = work.tensors()
    start = time.perf_counter()
    future = dcp.async_save(tensors, checkpoint_id=path, no_dist=True)
    waited = time.perf_counter() - start
    beside = []
    while not future.done():
        beside.append(work.step())
    future.result()
    return waited, beside, path


CONTENDERS: dict[str, Callable[[], Contender]] = {
    BASE: lambda: own(background=False),
    "llmkit": lambda: own(background=True),
    "torch.save, fsync": lambda: by_torch_save,
    "torch DCP async_save": lambda: by_dcp_async,
}


def measure(work: Work, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by contender: `waited` and `beside`; the first round is warm-up (buffers, caches) and given apart."""
    contenders = {name: make() for name, make in CONTENDERS.items()}
    names = list(contenders)
    found: dict[str, dict[str, list[float]]] = {
        name: {"waited": [], "beside": [], "alone": []} for name in names
    }
    for turn in range(rounds + 1):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            alone = [work.step() for _ in range(3)]
            before = {key: tensor.clone() for key, tensor in work.tensors().items()}
            waited, beside, path = contenders[name](work)
            if path.is_dir() and (path / "model.safetensors").is_file():
                check(path, before)
                shutil.rmtree(path)
            found[name]["waited"].append(waited)
            found[name]["beside"] += beside if turn else []
            found[name]["alone"] += alone if turn else []
            remove(path)
    return found


def check(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    """Fail when a save holds other tensors than there were when it was asked for."""
    for part in ("model", "optimizer"):
        for name, tensor in load_file(path / f"{part}.safetensors").items():
            if not torch.equal(tensor, wanted[f"{part}.{name}"]):
                raise SystemExit(f"{path}: {part} {name} is not what was to be saved")


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def summary(found: dict[str, dict[str, list[float]]], size: int, preset: str) -> dict[str, Any]:
    """Ratios within a round, their median and range."""
    base = found[BASE]["waited"]
    rows = {}
    for name, times in found.items():
        ratios = [one / whole for one, whole in zip(times["waited"][1:], base[1:], strict=True)]
        rows[name] = {
            "waited_s": round(statistics.median(times["waited"][1:]), 4),
            "share": round(statistics.median(ratios), 4),
            "share_range": [round(min(ratios), 4), round(max(ratios), 4)],
            "first_share": round(times["waited"][0] / base[0], 4),
            "step_beside": round(statistics.median(times["beside"]) / statistics.median(times["alone"]), 2)
            if times["beside"]
            else None,
        }
    return {
        "preset": preset,
        "checkpoint_bytes": size,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "contenders": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default="gpt-mini")
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--folder", type=Path, help="where to save; by default a temporary folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, two rounds: does it run?")
    given = parser.parse_args()
    if given.smoke:
        given.rounds, given.preset, given.vocab_size = 2, "gpt-tiny", 512
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        work = Work(given.preset, given.vocab_size, Path(place))
        size = sum(tensor.nbytes for tensor in work.tensors().values())
        result = summary(measure(work, given.rounds), size, given.preset)
    if given.json:
        print(json.dumps(result))
        return
    print(
        f"{given.preset}, a checkpoint of {size / 1e6:.0f} MB, {given.rounds} rounds, {result['cores']} cores"
    )
    print(f"{'':24}{'waits':>9}{'of a whole save':>18}{'range':>18}{'a step beside':>16}")
    for name, row in result["contenders"].items():
        low, high = row["share_range"]
        beside = f"{row['step_beside']:.2f} x" if row["step_beside"] else "-"
        spread = f"{low:.1%} - {high:.1%}"
        print(f"{name:24}{row['waited_s']:>8.3f}s{row['share']:>18.1%}{spread:>18}{beside:>16}")


if __name__ == "__main__":
    sys.exit(main())
