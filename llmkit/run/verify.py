"""`llmkit verify-resume`: a recipe's own proof that a run which is killed ends as one that is not.

The recipe is trained for a few steps, once in one go and once killed in the middle and started again; what both leave
is compared bit for bit. Every run is a real process, the kill is SIGKILL.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from llmkit.durable import discard, make_folders, scratch_folder
from llmkit.errors import ExitCode, GateError, RunError, UsageError
from llmkit.launch.local import end_with_parent
from llmkit.launch.world import detect_world
from llmkit.plan import Plan
from llmkit.recipe import Loaded, load_recipe
from llmkit.report.console import Reporter
from llmkit.report.run_log import read_metrics
from llmkit.run.compare import Finding, compare_runs, distance_moved
from llmkit.run.folders import CACHE, Options
from llmkit.run.planning import plan as plan_ahead
from llmkit.run.training import KILL_AT
from llmkit.train.steps import checkpoint_path, saved_steps

FEWEST_STEPS = 8
TOLERANCES = {
    "fp32": {"losses": 1e-4, "held-out": 1e-4, "weights": 1e-2, "optimizer": 1e-2, "export": 1e-2},
    "bf16": {"losses": 1e-2, "held-out": 1e-2, "weights": 3e-2, "optimizer": 3e-2, "export": 3e-2},
}
"""On another number of processes: how far things may be apart, as `Finding.apart` measures. Sums are added up in
another order there, and training makes the difference grow; an error in the order of data or in a mask is far above it.
Measured with a tiny model, 8 to 32 steps, learning rates of 1e-4 and 1e-2, on CPU: weights 7e-7 and optimizer 2e-7 in
fp32, less in bf16; with other dropout masks after the resume (a rate of 0.1) 0.065 to 0.15, and 0.08 to 0.34."""

_SAVES = 4
_KILLED = "was killed by SIGKILL"
"""How the launcher tells of such a worker."""
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
        tolerances: How far losses, weights and the rest may be apart there; texts may differ, but not their number.
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
            one for one in self.elsewhere if not self.within(one)
        ]

    def within(self, one: Finding) -> bool:
        """Whether what was found on the other number of processes can be rounding."""
        return one.same or not (one.unlike or one.apart > self.tolerances.get(one.what, math.inf))

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
    section = loaded.recipe.pretrain
    assert section is not None  # or there would be no plan
    words = [*overrides, *_shortened(steps), *_pins(plan, other_processes, section.checkpoint.keep)]
    with scratch_folder(options.runs) as place:
        trial = _Trial(place, options, recipe, words, loaded.recipe.name, steps, reporter)
        whole = trial.folder("whole")
        trial.train("whole", "1 of 3: without a break")
        begun = Plan.from_dict(json.loads((whole / "plan.json").read_bytes()))
        trial = replace(trial, words=[*words, *_settled(begun)], self_check=False)
        killed_at, saved_at = trial.kill("2 of 3: killed")
        if other_processes is not None:
            _copy(place / "killed", place / "elsewhere")
        trial.train("killed", "3 of 3: resumed")
        resumed = compare_runs(whole, trial.folder("killed"), steps)
        elsewhere: Sequence[Finding] = ()
        if other_processes is not None:
            other = replace(trial, options=replace(options, processes=other_processes))
            other.train("elsewhere", f"and resumed on another number of processes: {other_processes}")
            other.check_processes("elsewhere", other_processes)
            saved = trial.folder("elsewhere") / "checkpoints"
            moved = distance_moved(*(checkpoint_path(saved, step) for step in (saved_at, steps)))
            elsewhere = compare_runs(whole, trial.folder("elsewhere"), steps, moved=moved)
        found = Verified(
            steps=steps,
            saved_at=saved_at,
            killed_at=killed_at,
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
        """From here on; the third of four checkpoints was due just before.

        So the second is whole by then, and the third perhaps half written.
        """
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

    def kill(self, doing: str) -> tuple[int, int]:
        """Train until the kill, which comes at the first step from `kill_at` on whose figures are recorded.

        Returns:
            That step, and the step of the newest checkpoint that is there then.

        Raises:
            RunError: It ended in another way, or left no checkpoint.
        """
        code = self._run("killed", doing, {KILL_AT: str(self.kill_at)})
        folder = self.folder("killed")
        reached = max((r["step"] for r in read_metrics(folder) if "train/loss" in r), default=0)
        if reached < self.kill_at or not self._was_killed("killed", code):
            raise self._failed("killed", doing, code)
        saved = saved_steps(folder / "checkpoints")
        if not saved:
            raise RunError(f"killed after step {reached}, but no checkpoint of the steps before was there")
        return reached, saved[-1]

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
            process = _start(command, env, log)
            with _ended(process):
                while _still_runs(process):
                    step = max((record["step"] for record in read_metrics(self.folder(which))), default=0)
                    self.reporter.progress("verify", step, self.steps)
                return process.returncode

    def _was_killed(self, which: str, code: int) -> bool:
        """Whether SIGKILL ended the run: the process itself, or a worker of it, as the launcher has told."""
        if code >= 0:
            return _KILLED in self._log(which).read_text(encoding="utf-8", errors="replace")
        return code == -signal.SIGKILL

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
        first = next((record for record in before if "train/loss" in record), None)
        if first is not None and first not in read_metrics(self.folder(which)):
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


def _pins(plan: Plan, other_processes: int | None, keep: int) -> list[str]:
    """What the whole recipe would choose and a short run might not; and micro-batches that both worlds can have."""
    pins = [f"machine.compile={str(plan.compile).lower()}"]
    if other_processes is not None:
        share = [plan.rows_per_step // size for size in (plan.world_size, other_processes)]
        size = max(m for m in range(1, plan.micro_batch_size + 1) if not any(rows % m for rows in share))
        pins.append(f"machine.micro_batch={size}")
        # The checkpoint where the runs part stays too: how far training goes from there is the measure of weights.
        pins.append(f"pretrain.checkpoint.keep={max(keep, _SAVES - 1)}")
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


def _start(command: Sequence[str], env: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own program and the user's words, no shell
        command,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        preexec_fn=end_with_parent(),
    )


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
