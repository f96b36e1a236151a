"""`llmkit sweep`: a recipe trained many times with other settings, each time a run of its own, and the best of them.

What was tried and found stands in `sweep/sweep.json`, written after every change: the same command goes on from there,
and runs that were cut short go on from their checkpoints. The next settings follow from those before and the seed.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import sleep as wait
from typing import IO, Any

from llmkit.durable import discard, make_folders, remove_file, remove_folder, write_file, write_json
from llmkit.errors import ExitCode, InterruptedRunError, RunError, UsageError
from llmkit.hardware import Hardware, detect_hardware, usable_cores
from llmkit.launch.local import end_with_parent
from llmkit.launch.world import detect_world
from llmkit.recipe import Loaded, load_recipe
from llmkit.recipe.resolved import show_yaml
from llmkit.recipe.space import Axis, parse_axes, word_of
from llmkit.registry import MEASURED, TASKS, goal_of, lower_is_better, nearest
from llmkit.report.console import Reporter
from llmkit.report.run_log import read_metrics
from llmkit.report.trials import as_table, write_trials
from llmkit.report.trying import try_trained
from llmkit.run.folders import Options, Result, anchored, base_of, locked, refuse_variants, report_of
from llmkit.run.search import Trial, import_optuna, is_hopeless, ranked, suggest

FOLDER = "sweep"
PROGRAM = (sys.executable, "-P", "-m", "llmkit")
"""What carries a trial out."""
_LOOK_EVERY_S = 0.3
_STOPPED = (ExitCode.INTERRUPTED, ExitCode.CTRL_C, -signal.SIGTERM, 128 + signal.SIGTERM)
"""How a trial ends that is told to stop: by itself, or before it listens."""
_FIRST_FAILURES = 3
"""So many trials may fail before one has worked; then something is wrong with all of them."""


@dataclass(frozen=True)
class Search:
    """What a sweep does, decided.

    Attributes:
        recipe: The recipe as typed.
        words: What all trials have in common, as typed.
        axes: What is searched.
        loaded: The recipe with the words.
        verb: The command that trains a trial.
        section: The section whose model is measured.
        metric: By which trials are compared.
        trials: How many.
        jobs: How many at a time.
        prune: Whether a trial that is worse than half of the others is given up.
        smoke: Whether the recipe is shrunk.
    """

    recipe: str
    words: tuple[str, ...]
    axes: tuple[Axis, ...]
    loaded: Loaded
    verb: str
    section: str
    metric: str
    trials: int
    jobs: int
    prune: bool
    smoke: bool = False

    @property
    def lower(self) -> bool:
        """Whether a lower metric is better."""
        return lower_is_better(self.metric)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a sweep that goes on must have in common with the one that began; read once, as it begins.

        Raises:
            DataError: A file of rows cannot be read.
        """
        space = {axis.key: [str(end) for end in axis.ends] + [axis.log, axis.step] for axis in self.axes}
        return {
            "recipe": self.recipe,
            "settings of the recipe": _settings(self.loaded),
            "files of rows": _rows(self.loaded),
            "words": list(self.words),
            "space": space,
            "metric": self.metric,
            "seed": self.loaded.recipe.seed,
            "smoke": self.smoke,
        }

    def overrides(self, trial: Trial) -> list[str]:
        """The words of a trial."""
        return [*self.words, *(word_of(key, value) for key, value in trial.params.items())]


def _settings(loaded: Loaded) -> str:
    """A hash of what the recipe says, its name apart: editing it makes another sweep."""
    values = loaded.recipe.model_dump(mode="json", exclude={"name"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _rows(loaded: Loaded) -> list[str]:
    """Hashes of the labelled rows that lie in files here; others would have to be fetched first."""
    from llmkit.data.records import fingerprint

    section = loaded.recipe.finetune
    if section is None or section.task not in TASKS:
        return []
    return [
        fingerprint(source, base_of(loaded))[:12]
        for source in (section.data, section.validation)
        if source is not None and source.files and not any("://" in pattern for pattern in source.files)
    ]


def make_search(
    recipe: str,
    words: Sequence[str],
    *,
    trials: int,
    jobs: int = 1,
    metric: str | None = None,
    prune: bool = True,
    runs: Path = Path("runs"),
    smoke: bool = False,
) -> Search:
    """Decide what a sweep does; every value at the ends of its space is tried on the recipe first.

    Raises:
        MissingError: optuna is not installed.
        RecipeError: The recipe cannot have a value that is searched.
        UsageError: The command asks for what cannot be.
    """
    if recipe == "-":
        raise UsageError(
            "a sweep starts the recipe many times, so stdin cannot hold it", hint="give it as a file"
        )
    if detect_world() is not None:
        raise UsageError("a sweep starts processes of its own; start it once, without a launcher")
    import_optuna()
    axes, given = parse_axes(words)
    loaded = load_recipe(recipe, overrides=given, smoke=smoke)
    refuse_variants(loaded)
    for axis in axes:
        for value in axis.ends:
            load_recipe(recipe, overrides=[*given, word_of(axis.key, value)], smoke=smoke)
    verb, section = _verb_of(loaded, axes)
    if "/" in loaded.recipe.name:
        raise UsageError(
            f"the name {loaded.recipe.name!r} is that of a variant; trials have names below a recipe's own",
            hint="name=NAME",
        )
    return Search(
        recipe=recipe,
        words=(*given, *_base(loaded, verb, runs)),
        axes=tuple(axes),
        loaded=loaded,
        verb=verb,
        section=section,
        metric=_metric_of(loaded, section, metric),
        trials=trials,
        jobs=jobs,
        prune=prune,
        smoke=smoke,
    )


def _verb_of(loaded: Loaded, axes: Sequence[Axis]) -> tuple[str, str]:
    recipe = loaded.recipe
    section = "finetune" if recipe.finetune is not None else "pretrain"
    if getattr(recipe, section) is None:
        raise UsageError("the recipe trains nothing", hint="a sweep needs a `pretrain` or `finetune` section")
    both = recipe.finetune is not None and recipe.pretrain is not None
    below = any(axis.key.split(".")[0] in ("tokenize", "pretrain") for axis in axes)
    return ("run" if both and below else section), section


def _base(loaded: Loaded, verb: str, runs: Path) -> list[str]:
    """Where only fine-tuning is searched, all trials start from the model that `pretrain` made once."""
    recipe = loaded.recipe
    if verb != "finetune" or recipe.pretrain is None or recipe.finetune is None or recipe.finetune.model.name:
        return []
    return [f"finetune.model.name={runs / recipe.name / 'pretrain' / 'model'}"]


def _metric_of(loaded: Loaded, section: str, asked: str | None) -> str:
    objective = getattr(loaded.recipe, section).objective
    goal = goal_of(objective)
    known = [f"eval/{name}" for name in goal.metrics]
    if asked is None:
        return f"eval/{goal.best}"
    if asked not in known:
        guess = nearest(asked, known) or (f"eval/{asked}" if f"eval/{asked}" in known else None)
        raise UsageError(
            f"--metric {asked}: not measured of {objective!r}"
            + (", though of others" if asked in MEASURED else ""),
            hint=f"did you mean {guess}?" if guess else f"one of {', '.join(known)}",
        )
    return asked


def sweep(search: Search, options: Options, reporter: Reporter) -> Result:
    """Carry a sweep out, going on where it stopped.

    Raises:
        InterruptedRunError: It was stopped; the same command goes on.
        RunError: All trials failed, or the folder holds another sweep.
        UsageError: The search has changed since it began.
    """
    home = options.runs / search.loaded.recipe.name
    folder = home / FOLDER
    with locked(folder):
        work = _Sweep(search, options, reporter, home)
        if options.fresh:
            work.clear()
        work.load()
        work.run()
        return work.finish()


@dataclass
class _Running:
    """A trial whose process runs."""

    trial: Trial
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    slot: int
    given_up: bool = False


@dataclass
class _Sweep:
    """A sweep while it is carried out."""

    search: Search
    options: Options
    reporter: Reporter
    home: Path
    trials: list[Trial] = field(default_factory=list)
    running: list[_Running] = field(default_factory=list)

    def load(self) -> None:
        """Take up what an earlier session has found."""
        path = self.home / FOLDER / "sweep.json"
        wanted = json.loads(json.dumps(self.search.identity))
        if not path.is_file():
            return
        found = json.loads(path.read_bytes())
        changed = [key for key in wanted if found["search"].get(key) != wanted[key]]
        if changed:
            shown = "; ".join(f"{key}: {found['search'].get(key)} -> {wanted[key]}" for key in changed)
            raise UsageError(
                f"{self.home / FOLDER}: the search has changed since it began: {shown}",
                hint="start over with --fresh, or give the recipe another name: name=NAME",
            )
        self.trials = [Trial.from_dict(one) for one in found["trials"]]

    def clear(self) -> None:
        """Remove what an earlier sweep of this name left."""
        for place in self.home.glob("trial-[0-9]*"):
            discard(place)
        for name in ("sweep.json", "best.yaml"):
            remove_file(self.home / FOLDER / name)

    def run(self) -> None:
        """Start trials, and look after them until all have ended."""
        waiting = [trial for trial in self.trials if trial.state == "running"]
        with self._all_ended():
            while True:
                while len(self.running) < self.search.jobs and (waiting or self._wants_more()):
                    self._start(waiting.pop(0) if waiting else self._next())
                if not self.running:
                    return
                wait(_LOOK_EVERY_S)
                for one in list(self.running):
                    self._look(one)

    def _wants_more(self) -> bool:
        if len(self.trials) >= self.search.trials:
            return False
        failed = [trial for trial in self.trials if trial.state == "failed"]
        ended = [trial for trial in self.trials if trial.state != "running"]
        return len(failed) < _FIRST_FAILURES or len(failed) < len(ended)

    def _next(self) -> Trial:
        search = self.search
        params = suggest(search.axes, self.trials, seed=search.loaded.recipe.seed, lower=search.lower)
        self.trials.append(Trial(len(self.trials) + 1, params))
        self.save()
        return self.trials[-1]

    def _start(self, trial: Trial) -> None:
        slot = min(set(range(self.search.jobs)) - {one.slot for one in self.running})
        words = [*self.search.overrides(trial), f"name={self.home.name}/{trial.name}"]
        command = [*PROGRAM, self.search.verb, self.search.recipe, *words]
        command += ["--runs", str(self.options.runs), "--quiet"]
        if self.options.processes is not None:
            command += ["--processes", str(self.options.processes)]
        if self.search.smoke:
            command += ["--smoke"]
        if not self.options.self_check:
            command += ["--no-self-check"]
        log = self._log(trial).open("ab")
        process = subprocess.Popen(  # noqa: S603 - our own program and the user's words, no shell
            command,
            env={**os.environ, **self._share(slot)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            preexec_fn=end_with_parent(),
            start_new_session=True,  # Ctrl-C is for the sweep, which then stops its trials itself
        )
        self.running.append(_Running(trial, process, log, slot))
        self.reporter.note(f"trial {trial.number} of {self.search.trials}: {_shown(trial)}")

    def _share(self, slot: int) -> dict[str, str]:
        """What one of several jobs may use of the machine."""
        jobs = self.search.jobs
        if jobs == 1:
            return {}
        hardware = detect_hardware(self.search.loaded.recipe.machine)
        if hardware.device != "cuda":
            return {"OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))}
        devices = _visible(hardware)
        if len(devices) < jobs:
            return {}  # they share the GPUs, as was asked for
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices[slot::jobs])}

    def _look(self, one: _Running) -> None:
        """Note what a trial has measured; end it where it is hopeless; take its result when it has ended."""
        ended = one.process.poll() is not None
        curve = self._curve(one.trial)
        if curve != one.trial.curve:
            one.trial.curve = curve
            hopeless = self.search.prune and is_hopeless(curve, self.trials, lower=self.search.lower)
            if hopeless and not ended and not one.given_up:
                one.given_up = True
                one.process.send_signal(signal.SIGTERM)
        if ended:
            self.running.remove(one)
            one.log.close()
            self._judge(one)
            self.save()

    def _judge(self, one: _Running) -> None:
        trial, code = one.trial, one.process.returncode
        if code == ExitCode.DONE:
            self._take_result(trial)
        elif one.given_up and code in _STOPPED:
            trial.state, trial.value = "pruned", list(trial.curve.values())[-1]
        elif code in (ExitCode.INTERRUPTED, ExitCode.CTRL_C):
            raise InterruptedRunError(
                f"trial {trial.number} was stopped", hint="The same command goes on from there."
            )
        else:
            trial.state, trial.error = "failed", _last_words(self._log(trial), code)
        told = {"failed": f"failed: {trial.error}", "pruned": "given up"}.get(trial.state, "")
        figure = "" if trial.value is None else f"{self.search.metric} {trial.value:.5g}"
        self.reporter.note(f"trial {trial.number}: {', '.join(filter(None, (told, figure)))}")
        if trial.state in ("done", "pruned"):
            self._remove_checkpoints(trial)

    def _take_result(self, trial: Trial) -> None:
        value = (report_of(self._place(trial)).get("final") or {}).get(self.search.metric)
        if isinstance(value, int | float):
            trial.state, trial.value = "done", float(value)
        else:
            trial.state, trial.error = "failed", f"it has no {self.search.metric} at its end"

    def _remove_checkpoints(self, trial: Trial) -> None:
        """Of a run that will not go on only its model and figures are needed."""
        place = self._place(trial) / "checkpoints"
        if place.is_dir():
            remove_folder(place)

    def _curve(self, trial: Trial) -> dict[int, float]:
        metric = self.search.metric
        records = read_metrics(self._place(trial))
        return {
            int(record["step"]): float(record[metric])
            for record in records
            if isinstance(record.get(metric), int | float) and record["step"] > 0
        }

    def _place(self, trial: Trial) -> Path:
        return self.home / trial.name / self.search.section

    def _log(self, trial: Trial) -> Path:
        return self.home / FOLDER / f"{trial.name}.log"

    def save(self) -> None:
        """Write down what was tried and found."""
        make_folders(self.home / FOLDER)
        found = {"search": self.search.identity, "trials": [trial.to_dict() for trial in self.trials]}
        write_json(self.home / FOLDER / "sweep.json", found)

    @contextmanager
    def _all_ended(self) -> Iterator[None]:
        """See that no process is left, however the sweep ends: those that still run save and stop."""
        with ExitStack() as stack:
            stack.callback(self.save)
            try:
                yield
            finally:
                for one in self.running:
                    one.process.send_signal(signal.SIGTERM)
                for one in self.running:
                    one.process.wait()
                    one.log.close()

    def finish(self) -> Result:
        """Compare the trials, write the best one's recipe, and say what came of it.

        Raises:
            RunError: All of them failed.
        """
        search, folder = self.search, self.home / FOLDER
        order = ranked(self.trials, lower=search.lower)
        reports = {trial.number: report_of(self._place(trial)) for trial in order}
        rows = write_trials(
            folder,
            [trial.to_dict() | {"name": trial.name} for trial in order],
            reports,
            metric=search.metric,
            log_axes=[axis.key for axis in search.axes if axis.log],
            command=self.options.command,
        )
        self.reporter.note(f"report: {folder / 'report.html'}")
        best = order[0]
        if best.state != "done":
            raise RunError(
                f"not one of {len(self.trials)} trials was finished; the last said: {order[-1].error}",
                hint=f"what they said is in {folder}",
            )
        name = f"{self.home.name}-best"
        words = [*search.overrides(best), f"name={name}"]
        made = load_recipe(search.recipe, overrides=words, smoke=search.smoke)
        write_file(folder / "best.yaml", show_yaml(anchored(made)))
        section = getattr(search.loaded.recipe, search.section)
        return Result(
            folder,
            {
                "best": best.to_dict() | {"name": best.name},
                "recipe": str(folder / "best.yaml"),
                "metric": search.metric,
                "trials": [trial.to_dict() for trial in order],
                "failed": sum(trial.state == "failed" for trial in order),
                "report": str(folder / "report.html"),
            },
            try_trained(section.objective, str(self.home / best.name), section.prompts),
            table=as_table(rows, search.metric),
        )


def _shown(trial: Trial) -> str:
    return ", ".join(word_of(key, value) for key, value in trial.params.items())


def _visible(hardware: Hardware) -> list[str]:
    """The GPUs of this machine that a process may use, by the names that CUDA takes."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(hardware.num_devices)]


def _last_words(log: Path, code: int) -> str:
    """What a process said last that is an error, or its exit code."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith("error")] or lines
    return said[-1][:300] if said else f"exit code {code}"


def outline(search: Search) -> list[tuple[str, str, str]]:
    """What a sweep would do, as rows of section, key and value, for a dry run."""
    rows = [
        ("sweep", "each trial", f"llmkit {search.verb} {search.recipe}"),
        ("sweep", "trials", f"{search.trials}, {search.jobs} at a time"),
        ("sweep", "metric", f"{search.metric}, {'lower' if search.lower else 'higher'} is better"),
        ("sweep", "given up", "when worse than half of the others" if search.prune else "never"),
    ]
    return [*rows, *(("search", axis.key, str(axis)) for axis in search.axes)]
