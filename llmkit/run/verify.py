"""`llmkit verify-resume`: a recipe's own proof that a run which is killed ends as one that is not.

The recipe is trained for a few steps, once in one go and once killed in the middle and started again; what both leave
is compared bit for bit. Every run is a real process, the kill is SIGKILL.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmkit.durable import discard, make_folders, scratch_folder
from llmkit.errors import ExitCode, GateError, RunError, UsageError
from llmkit.launch.local import end_with_parent
from llmkit.launch.world import detect_world
from llmkit.plan import Plan
from llmkit.recipe import Loaded, load_recipe
from llmkit.report.console import Reporter
from llmkit.report.run_log import read_metrics
from llmkit.run.compare import Finding, compare_runs
from llmkit.run.folders import CACHE, Options
from llmkit.run.planning import plan as plan_ahead
from llmkit.run.pretrain import KILL_AT

FEWEST_STEPS = 8
TOLERANCES = {
    "fp32": {"losses": 1e-4, "held-out": 1e-4},
    "bf16": {"losses": 1e-2, "held-out": 1e-2},
}
"""On another number of processes: how far losses may be apart, relative to themselves. Sums are added up in another
order there, and training makes the difference grow; an error in the order of data or in a mask is far above it."""

_SAVES = 4
_LOOK_EVERY_S = 1.0
_WORDS_SHOWN = 12


@dataclass(frozen=True)
class Verified:
    """What a verification found.

    Attributes:
        steps: The runs' length.
        saved_at: The step of the checkpoint that the killed run went on from.
        killed_at: The step after which it was killed.
        processes: On so many the runs were made.
        resumed: What the resumed run has that the uninterrupted one has not, on the same number of processes.
        other_processes: The other number that it was resumed on, if one was asked for.
        elsewhere: The same there.
        tolerances: How far losses and weights may be apart there, at most; samples may differ.
        kept: Where the runs are, when they are not the same; None when they were removed.
    """

    steps: int
    saved_at: int
    killed_at: int
    processes: int
    resumed: Sequence[Finding]
    other_processes: int | None
    elsewhere: Sequence[Finding]
    tolerances: Mapping[str, float]
    kept: Path | None = None

    @property
    def wrong(self) -> list[Finding]:
        """The findings that are not as promised."""
        return [one for one in self.resumed if not one.same] + [
            one for one in self.elsewhere if one.largest > self.tolerances.get(one.what, math.inf)
        ]

    def check(self) -> None:
        """Do nothing when all is as promised.

        Raises:
            GateError: It is not; names what differs first.
        """
        if not self.wrong:
            return
        words = "; ".join(f"{one.what}: {one.first}" for one in self.wrong)
        steps = [one.step for one in self.wrong if one.step is not None]
        since = f" from step {min(steps)} on" if steps else ""
        raise GateError(
            f"the resumed run is another one than the uninterrupted{since}: {words}",
            hint=f"both are kept in {self.kept}" if self.kept else "",
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "same": not self.wrong,
            "steps": self.steps,
            "killed_at": self.killed_at,
            "resumed_from": self.saved_at,
            "processes": self.processes,
            "resumed": [one.to_dict() for one in self.resumed],
            "other_processes": self.other_processes,
            "elsewhere": [one.to_dict() for one in self.elsewhere],
            "tolerances": dict(self.tolerances),
            "kept": str(self.kept) if self.kept else None,
        }


def verify_resume(
    recipe: str,
    overrides: Sequence[str],
    options: Options,
    reporter: Reporter,
    *,
    steps: int,
    other_processes: int | None = None,
) -> Verified:
    """Train a recipe for `steps` steps without a break, and killed and resumed; compare all that both leave.

    The recipe's own data, model, batch and schedule; its length is cut to `steps`, and it is saved four times. The
    text, if it is not prepared yet, is prepared for good; everything else is removed, unless something differs.

    Args:
        recipe: A recipe's file, or the name of a shipped one.
        overrides: Words such as `pretrain.train.optim.lr=3e-4`.
        options: Where run folders are, and on how many processes.
        reporter: Told what happens.
        steps: At least 8.
        other_processes: Resume the killed run on this number too.

    Raises:
        UsageError: The recipe cannot be verified so.
        RunError: A run failed for another reason than the kill.
    """
    loaded = load_recipe(recipe, overrides=overrides)
    plan = _plan(recipe, loaded, options, steps, other_processes)
    words = [*overrides, *_shortened(steps), *_pins(plan, other_processes)]
    with scratch_folder(options.runs) as place:
        trial = _Trial(place, options, recipe, words, loaded.recipe.name, steps, reporter)
        whole = trial.folder("whole")
        trial.train("whole", "1 of 3: without a break")
        begun = Plan.from_dict(json.loads((whole / "plan.json").read_bytes()))
        trial = replace(trial, words=[*words, *_settled(begun)], self_check=False)
        saved_at = trial.kill("2 of 3: killed")
        if other_processes is not None:
            _copy(place / "killed", place / "elsewhere")
        trial.train("killed", "3 of 3: resumed")
        resumed = compare_runs(whole, trial.folder("killed"), steps)
        elsewhere: Sequence[Finding] = ()
        if other_processes is not None:
            other = replace(trial, options=replace(options, processes=other_processes))
            other.train("elsewhere", f"and resumed on another number of processes: {other_processes}")
            other.check_processes("elsewhere", other_processes)
            elsewhere = compare_runs(whole, trial.folder("elsewhere"), steps)
        found = Verified(
            steps=steps,
            saved_at=saved_at,
            killed_at=trial.kill_at,
            processes=begun.world_size,
            resumed=resumed,
            other_processes=other_processes,
            elsewhere=elsewhere,
            tolerances=TOLERANCES[begun.precision],
        )
        return found if not found.wrong else replace(found, kept=trial.keep())


@dataclass(frozen=True)
class _Trial:
    """Runs of one recipe, each in a folder of run folders of its own below `place`; they share the prepared text."""

    place: Path
    options: Options
    recipe: str
    words: Sequence[str]
    name: str
    steps: int
    reporter: Reporter
    self_check: bool = True

    def folder(self, which: str) -> Path:
        """The run folder of one of the runs."""
        return self.place / which / self.name / "pretrain"

    @property
    def every(self) -> int:
        """Steps between two checkpoints."""
        return self.steps // _SAVES

    @property
    def kill_at(self) -> int:
        """After the third of four checkpoints was due: the second is whole by then, the third perhaps half written."""
        return 3 * self.every + 1

    def train(self, which: str, doing: str) -> None:
        """Train to the end, going on from what is there.

        Raises:
            RunError: It failed.
        """
        before = read_metrics(self.folder(which))
        code = self._run(which, doing, {})
        if code:
            raise self._failed(which, doing, code)
        self._check_gone_on(which, before)

    def kill(self, doing: str) -> int:
        """Train until the kill; return the step of the checkpoint that is there then.

        Raises:
            RunError: It ended in another way, or left no checkpoint.
        """
        code = self._run("killed", doing, {KILL_AT: str(self.kill_at)})
        folder = self.folder("killed")
        reached = max((record["step"] for record in read_metrics(folder)), default=0)
        if code == 0 or reached != self.kill_at:
            raise self._failed("killed", doing, code)
        saved = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*")]
        if not saved:
            raise RunError(f"killed after step {reached}, but no checkpoint of the steps before was there")
        return max(saved)

    def check_processes(self, which: str, wanted: int) -> None:
        """See that a run was made by as many processes as asked for.

        Raises:
            RunError: It was not.
        """
        made_by = Plan.from_dict(json.loads((self.folder(which) / "plan.json").read_bytes())).world_size
        if made_by != wanted:
            raise RunError(f"{which}: {made_by} processes trained where {wanted} were asked for")

    def keep(self) -> Path:
        """Move the runs to where a person finds them."""
        kept = self.options.runs / self.name / "verify-resume"
        make_folders(kept.parent)
        discard(kept)
        make_folders(kept)
        for path in self.place.glob("[!.]*"):
            (path / CACHE).unlink(missing_ok=True)  # a link
            path.rename(kept / path.name)
        return kept

    def _run(self, which: str, doing: str, env: Mapping[str, str]) -> int:
        runs = self.place / which
        make_folders(runs)
        if not (runs / CACHE).exists():
            make_folders(self.options.runs / CACHE)
            (runs / CACHE).symlink_to((self.options.runs / CACHE).absolute())
        command = [sys.executable, "-P", "-m", "llmkit", "pretrain", self.recipe, *self.words]
        command += ["--runs", str(runs)]
        if self.options.processes is not None:
            command += ["--processes", str(self.options.processes)]
        if not self.self_check:
            command += ["--no-self-check"]
        self.reporter.phase("verify", doing)
        with self._log(which).open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - our own program and the user's words, no shell
                command,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                preexec_fn=end_with_parent(),
            )
            with _ended(process):
                while _still_runs(process):
                    step = max((record["step"] for record in read_metrics(self.folder(which))), default=0)
                    self.reporter.progress("verify", step, self.steps)
                return process.returncode

    def _log(self, which: str) -> Path:
        return self.place / which / "log.txt"

    def _failed(self, which: str, doing: str, code: int) -> RunError:
        lines = self._log(which).read_text(encoding="utf-8", errors="replace").splitlines()
        said = "\n".join(f"  {line}" for line in lines[-_WORDS_SHOWN:])
        error = RunError(f"{doing}: the run ended by itself with exit code {code}:\n{said}")
        error.exit_code = ExitCode(code) if code in (ExitCode.USAGE, ExitCode.MISSING) else ExitCode.FAILED
        return error

    def _check_gone_on(self, which: str, before: Sequence[Mapping[str, Any]]) -> None:
        """Records of before the checkpoint, with their times, are still there: the run did not start over."""
        if not before:
            return
        first = next(record for record in before if "train/loss" in record)
        if first not in read_metrics(self.folder(which)):
            raise RunError(f"{which}: the run did not go on from its checkpoint but started over")


def _plan(recipe: str, loaded: Loaded, options: Options, steps: int, other_processes: int | None) -> Plan:
    """The plan of the recipe as it is; its choices are what is to be verified."""
    if recipe == "-":
        raise UsageError(
            "verify-resume starts the recipe several times, so stdin cannot hold it", hint="a file"
        )
    if steps < FEWEST_STEPS:
        raise UsageError(
            f"--steps {steps}: at least {FEWEST_STEPS}, to save four times and be killed between"
        )
    if detect_world() is not None:
        raise UsageError("verify-resume starts processes of its own; start it once, without a launcher")
    plan = plan_ahead(loaded, options)
    if other_processes is not None and plan.rows_per_step % other_processes:
        raise UsageError(
            f"--other-processes {other_processes}: they cannot share the {plan.rows_per_step} rows of a step evenly"
        )
    return plan


def _shortened(steps: int) -> list[str]:
    every = steps // _SAVES
    return [
        f"pretrain.train.length={steps} steps",
        f"pretrain.checkpoint.every={every} steps",
        f"pretrain.eval.every={2 * every} steps",
    ]


def _pins(plan: Plan, other_processes: int | None) -> list[str]:
    """What the whole recipe would choose and a short run might not; and micro-batches that both worlds can have."""
    pins = [f"machine.compile={str(plan.compile).lower()}"]
    if other_processes is not None:
        share = [plan.rows_per_step // size for size in (plan.world_size, other_processes)]
        size = max(m for m in range(1, plan.micro_batch_size + 1) if not any(rows % m for rows in share))
        pins.append(f"machine.micro_batch={size}")
    return pins


def _settled(plan: Plan) -> list[str]:
    """What the first run has chosen by measuring: the others do not measure anew."""
    return [
        f"machine.attention={plan.attention}",
        f"machine.precision={plan.precision}",
        f"machine.micro_batch={plan.micro_batch_size}",
    ]


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)


def _still_runs(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_LOOK_EVERY_S)
    except subprocess.TimeoutExpired:
        return True
    return False


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """See that the process has ended after the block, however that ends."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
