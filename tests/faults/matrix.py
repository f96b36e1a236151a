"""The matrix: every kind of run, killed at many moments, goes on each time to the bits of a run that was not.

`run_cell` proves one cell. As a program it prints the table of the figures that the tests left in a folder, and fails
unless every cell is at 100 %.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import masked
import numpy as np
import objectives
from safetensors.numpy import load_file
from sessions import ORDER, Ended, Point, Server
from training import command, losses, same_bits, weights

from llmkit import registry
from llmkit.durable import verify_folder
from llmkit.errors import CorruptError
from llmkit.report.run_log import read_samples

NUM_STEPS = 12
FIGURES = "LLMKIT_TEST_FIGURES"
"""The environment's word for the folder that gets each cell's figures."""

ROWS = 12
RECIPE = {
    "pretrain__train__length": f"{NUM_STEPS} steps",
    "pretrain__train__batch": f"{ROWS} samples",
    "pretrain__checkpoint": {"every": "2 steps", "keep": 2},
    "pretrain__eval": {"every": "3 steps", "rows": 30},
}

WITH_LOADER_WORKERS = (
    "before the update of step 4",
    "before a checkpoint appears",
    "between two steps",
    "between two held-out batches",
)
"""The moments at which runs with loader processes are killed: while there are any. To start them takes seconds."""


@dataclass(frozen=True)
class Cell:
    """One kind of run."""

    objective: str
    dropout: bool
    accumulation: int
    workers: int
    processes: int

    @property
    def name(self) -> str:
        """What the table calls it."""
        dropout = "dropout" if self.dropout else "no dropout"
        count = "2 processes" if self.processes > 1 else "1 process"
        return (
            f"{self.objective}, {dropout}, accumulation {self.accumulation}, {count}, {self.workers} workers"
        )

    @property
    def words(self) -> list[str]:
        """What its command says besides the recipe."""
        machine = [
            f"machine.micro_batch={ROWS // self.accumulation // self.processes}",
            f"machine.loader_workers={self.workers}",
        ]
        return [*machine, *(["--processes", str(self.processes)] if self.processes > 1 else [])]


WHOLE_GRID = ("clm", masked.NAME)
"""The objectives that are tried in every kind of run: one without chance in its rows, one with."""


def cells() -> list[Cell]:
    """All of them. What is registered as an objective is in.

    An objective meets crashes by its rows, its loss and its networks alone, and what saves and resumes is the same for
    all. So most are tried where everything that could differ does: dropout, accumulation, without and with loader
    processes, on one process and on two.
    """
    ways = (False, True), (1, 3), (0, 2), (1, 2)
    whole = [Cell(*parts) for parts in product(WHOLE_GRID, *ways)]
    others = [name for name in registry.OBJECTIVES if name not in WHOLE_GRID]
    return [*whole, *(Cell(name, True, 3, *rest) for name, *rest in product(others, *ways[2:]))]


def moments(cell: Cell) -> dict[str, Point | int]:
    """When the runs of a cell are killed, one after the other; a number is the step that `LLMKIT_KILL_AT` names."""
    last = cell.processes - 1
    found: dict[str, Point | int] = {
        "before the update of step 4": Point("SIGKILL", "update", step=3, rank=last),
        "weights half written": door("foreign", "step_00000004.tmp", when="middle"),
        "before a checkpoint appears": door("rename", "/step_00000006"),
        "after it appeared": door("rename", "/step_00000006", when="after"),
        "between two steps": 7,
        "before a manifest is written": door("rename", "step_00000008.tmp", nth=2),
        "between two held-out batches": Point("SIGKILL", "batch", step=9, rank=last),
        "while an old checkpoint goes": door("rmtree", "step_00000006.old"),
        "before the model appears": door("rename", "/pretrain/model"),
        "before the report says done": door("rename", "report.json"),
    }
    return {moment: found[moment] for moment in (WITH_LOADER_WORKERS if cell.workers else found)}


def door(name: str, path: str, *, when: str = "before", nth: int = 1) -> Point:
    """Killed at one of the door's calls, which the first process makes."""
    return Point("SIGKILL", "door", name=name, path=path, when=when, nth=nth)


@dataclass
class Trial:
    """One kill and what came of it.

    Attributes:
        cell: In which run.
        moment: When.
        survived: Whether it died as meant, lost no checkpoint, and the same command went on from the newest one.
        bitwise: Whether all that is there equals, to the last bit, what the run has that was not killed.
        why: What was not as it should be.
    """

    cell: str
    moment: str
    survived: bool = True
    bitwise: bool = True
    why: str = ""

    def check(self, what: str, holds: bool, why: str) -> None:
        """Note a finding of `survived` or `bitwise`."""
        if not holds:
            setattr(self, what, False)
            self.why += f"{why}\n"


class Run:
    """A command that is given again and again.

    Args:
        server: Runs it.
        folder: For its recipe, its run folder and its text.
        name: Of the recipe.
        words: What the command says besides the recipe.
        changes: To the recipe.
    """

    def __init__(self, server: Server, folder: Path, name: str, words: list[str], changes: Mapping[str, Any]):
        self._server = server
        full = command(folder, name, **changes)
        self.words = [*full[full.index("pretrain") :], *words]
        self.folder = folder / "runs" / name / "pretrain"
        self._order = folder / f"{name}.order"

    def __call__(self, *points: Point, **env: str) -> Ended:
        return self._server.run(self.words, *points, env={ORDER: str(self._order), **env})

    def tokenize(self) -> None:
        """Prepare the text, which runs of the same folder share."""
        ended = self._server.run(["tokenize", *self.words[1:4]])
        assert ended.code == 0, ended.said

    def order(self) -> dict[int, list[str]]:
        """Step -> its rows, which are the same however often it was made."""
        made: dict[tuple[int, int], str] = {}
        for line in self._order.read_text().splitlines():
            record = json.loads(line)
            for number, row in enumerate(record["rows"], start=record["micro"] * len(record["rows"])):
                place = record["step"], number
                assert made.setdefault(place, row) == row, (
                    f"step {place[0]} has another row {number} than before"
                )
        rows: dict[int, list[str]] = {}
        for (step, _), row in sorted(made.items()):
            rows.setdefault(step, []).append(row)
        return rows

    def helpers(self) -> int:
        """The most processes that one training process had started."""
        return max(json.loads(line)["helpers"] for line in self._order.read_text().splitlines())

    def whole_checkpoints(self) -> list[str]:
        """Those that could be gone on from."""
        return [path.name for path in sorted(self.folder.glob("checkpoints/step_*")) if is_whole(path)]

    def record(self) -> tuple[object, ...]:
        """What it has said of itself: losses, held-out losses and samples by step."""
        return losses(self.folder), losses(self.folder, "eval/loss"), read_samples(self.folder)


def is_whole(path: Path) -> bool:
    try:
        verify_folder(path)
    except CorruptError:
        return False
    return True


def content(checkpoint: Path) -> dict[str, bytes]:
    """All that a checkpoint holds, by name, but for the seconds it took and the room it was to have."""
    state = json.loads((checkpoint / "state.json").read_bytes())
    del state["state"]["elapsed_s"]
    del state["plan"]["disk_bytes"]  # `uninterrupted` keeps more of them
    found = {"state": json.dumps(state).encode()}
    for kind in ("model", "optimizer"):
        tensors = load_file(checkpoint / f"{kind}.safetensors")
        found |= {f"{kind}.{name}": tensor.tobytes() for name, tensor in tensors.items()}
    return found


def recipe_of(cell: Cell) -> dict[str, Any]:
    """The changes that make `training.recipe` the cell's."""
    return {
        **RECIPE,
        "pretrain__objective": cell.objective,
        **objectives.changes(cell.objective),
        "pretrain__model__dropout": 0.1 if cell.dropout else 0.0,
    }


def uninterrupted(server: Server, folder: Path, cell: Cell) -> Run:
    """A run of that kind which nothing happens to, all of its checkpoints kept."""
    run = Run(server, folder, "whole", [*cell.words, "pretrain.checkpoint.keep=100"], recipe_of(cell))
    run.tokenize()  # its threads would be in the way of forking workers
    ended = run()
    assert ended.code == 0, ended.said
    return run


def run_cell(server: Server, folder: Path, cell: Cell, whole: Run) -> list[Trial]:
    """Kill a run of the cell at all its moments, each time going on, and compare it with one that was not."""
    run = Run(server, folder, f"killed-{cell.workers}", [*cell.words, "--no-self-check"], recipe_of(cell))
    trials = []
    newest = 0
    for moment, point in moments(cell).items():
        trial = Trial(cell.name, moment)
        trials.append(trial)
        ended = run(LLMKIT_KILL_AT=str(point)) if isinstance(point, int) else run(point)
        check_death(trial, ended, cell)
        check_went_on(trials[-2:-1], ended, newest)
        there = run.whole_checkpoints()
        trial.check("survived", not there or step_of(there[-1]) >= newest, f"no longer there: step {newest}")
        newest = step_of(there[-1]) if there else newest
        check_checkpoints(trial, run, whole, there)
    ended = run()
    check_went_on(trials[-1:], ended, newest)
    check_end(trials, run, whole, ended)
    for trial in trials:
        trial.check("bitwise", run.helpers() >= cell.workers, "no loader processes were there")
    return trials


def step_of(checkpoint: str) -> int:
    return int(checkpoint.removeprefix("step_"))


def check_death(trial: Trial, ended: Ended, cell: Cell) -> None:
    """It died of SIGKILL; a parent that is left tells so and fails."""
    if cell.processes == 1:
        trial.check("survived", ended.code == -9, f"ended with {ended.code}: {ended.said}")
    else:
        told = ended.code == 1 and "was killed by SIGKILL" in ended.said
        trial.check("survived", told, f"ended with {ended.code}: {ended.said}")


def check_went_on(trials: list[Trial], ended: Ended, newest: int) -> None:
    """The start after a kill took the newest checkpoint and called nothing damaged."""
    for trial in trials:
        begun = f"from step_{newest:08d}" if newest else f"pretrain: {NUM_STEPS} steps"
        trial.check("survived", begun in ended.said, f"not {begun}: {ended.said}")
        trial.check("survived", "is damaged" not in ended.said, ended.said)


def check_checkpoints(trial: Trial, run: Run, whole: Run, names: list[str]) -> None:
    for name in names:
        same = content(run.folder / "checkpoints" / name) == content(whole.folder / "checkpoints" / name)
        trial.check("bitwise", same, f"{name} differs")


def check_end(trials: list[Trial], run: Run, whole: Run, ended: Ended) -> None:
    """The end is the end of the run that was not killed; if not, no trial has gone well."""
    for trial in trials:
        trial.check("survived", ended.code == 0, f"the last start ended with {ended.code}: {ended.said}")
        if ended.code == 0:
            trial.check(
                "bitwise", same_bits(weights(run.folder), weights(whole.folder)), "final weights differ"
            )
            trial.check("bitwise", run.record() == whole.record(), "losses or samples differ")
            trial.check("bitwise", run.order() == whole.order(), "rows differ")
            check_checkpoints(trial, run, whole, run.whole_checkpoints())


@dataclass(frozen=True)
class Drift:
    """How far a run that was resumed on other devices is from one that was not.

    Attributes:
        rows: Whether each step learnt from the same rows in the same order.
        loss: The largest difference of a loss, in nats.
        weights: The largest difference of a weight.
    """

    rows: bool
    loss: float
    weights: float


def drift(run: Run, whole: Run) -> Drift:
    """Compare two finished runs."""
    mine, its = losses(run.folder), losses(whole.folder)
    assert mine.keys() == its.keys()
    one, other = weights(run.folder), weights(whole.folder)
    return Drift(
        run.order() == whole.order(),
        max(abs(mine[step] - its[step]) for step in its),
        max(float(np.abs(one[name] - other[name]).max()) for name in other),
    )


# --- the table ----------------------------------------------------------------------------------------------


def leave_figures(folder: Path, trials: list[Trial]) -> None:
    """Keep a cell's figures for the table."""
    folder.mkdir(parents=True, exist_ok=True)
    name = trials[0].cell.replace(" ", "-").replace(",", "")
    (folder / f"{name}.json").write_text(json.dumps([asdict(trial) for trial in trials]))


def table(trials: list[Trial]) -> Iterator[str]:
    """Lines: each cell's trials, how many survived and how many were equal to the last bit."""
    by_cell: dict[str, list[Trial]] = {}
    for trial in trials:
        by_cell.setdefault(trial.cell, []).append(trial)
    width = max(map(len, by_cell), default=4)
    yield f"{'cell':<{width}}  trials  survived  bitwise"
    for name, group in [*sorted(by_cell.items()), ("all", trials)]:
        survived = sum(trial.survived for trial in group)
        bitwise = sum(trial.survived and trial.bitwise for trial in group)
        yield f"{name:<{width}}  {len(group):6}  {survived:8}  {bitwise:7}"


def main(folder: Path) -> int:
    """Print the table; 1 when a trial failed or there are no figures."""
    trials = [Trial(**one) for path in sorted(folder.glob("*.json")) for one in json.loads(path.read_bytes())]
    failed = [trial for trial in trials if not (trial.survived and trial.bitwise)]
    sys.stdout.write("\n".join(table(trials)) + "\n")
    for trial in failed:
        sys.stdout.write(f"\n{trial.cell}, {trial.moment}:\n{trial.why}")
    return 1 if failed or not trials else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
