"""The same parts on many machines: datatrove's executors run them, llmkit waits and tells what failed.

An engine is given a picklable `do`, which makes part `number` unless it is there, and the numbers of the parts that are
missing. Nothing else: whether a part is finished is never an engine's word, only what lies on the shared file
system, so a lost marker or a log folder of last week cannot hide a missing part, and one machine can go on where many
were stopped, or the other way round. Since every part is a function of its input alone, the result is the same too.

`slurm` sends a job array and waits for it; `local` starts processes on this machine that do what such a job does.
docs/decisions/0006-many-machines.md says why these, and why datatrove's own pool of processes is not used.
"""

import getpass
import json
import os
import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Literal

from llmkit import errors
from llmkit.durable import make_folders, remove_file, write_file, write_json
from llmkit.errors import LlmkitError, MissingError, RunError
from llmkit.launch.local import end_with_parent

Do = Callable[[int], None]
Engine = Literal["local", "slurm"]
Progress = Callable[[int, int], None]

_SHOWN = 5
_STARTED, _FAILED, _DONE = "started", "failed", "done"
# What Slurm says of a job that waits and will never run as it was asked for.
_HOPELESS = {"BadConstraints", "InvalidAccount", "InvalidQOS", "PartitionNodeLimit", "PartitionTimeLimit"}


@dataclass(frozen=True)
class Cluster:
    """What Slurm has to know; `local` has no use for it but `poll_s`.

    Attributes:
        partition: Where the jobs run; `slurm` needs it.
        time: The limit of one job, as sbatch takes it.
        cpus: Processor cores of a job.
        memory_gb: Memory for each core, in GB.
        max_array: The largest job array that this Slurm takes (MaxArraySize).
        jobs_per_worker: How many jobs a worker's share is cut into: with more, a job that dies takes fewer parts with
            it and the load is more even; with fewer, less time goes into starting Python.
        arguments: Further settings of sbatch by their long names: `(("account", "nlp"),)`.
        setup: Shell commands that a job runs first, such as `module load gcc`.
        poll_s: Seconds between two looks at the queue.
        settle_s: How long after the last job's end a shared file system may take to show its files.
    """

    partition: str = ""
    time: str = "24:00:00"
    cpus: int = 1
    memory_gb: int = 4
    max_array: int = 1000
    jobs_per_worker: int = 4
    arguments: tuple[tuple[str, str], ...] = ()
    setup: str = ""
    poll_s: float = 5.0
    settle_s: float = 30.0


def run_tasks(
    do: Do,
    tasks: Sequence[int],
    *,
    engine: Engine,
    workers: int,
    logs: Path,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> None:
    """Call `do(number)` once for every number of `tasks`, on an engine, and return when all have ended well.

    A part whose worker was killed does not stop the others; an error that `do` raised does, for it would come again.
    Jobs of an earlier call with the same `logs`, whose waiting process was killed, are ended first; so are the jobs of
    this one when it is interrupted.

    Args:
        do: Picklable; makes a part unless it is there, on a file system that all machines share.
        tasks: The numbers of the missing parts, each once.
        engine: Who runs them.
        workers: Parts made at the same time.
        logs: A folder on the shared file system; each call makes one of its own in it.
        cluster: Settings of the engine.
        progress: Told how many are done, and of how many.

    Raises:
        MissingError: datatrove is not installed, or this machine has no Slurm.
        LlmkitError: What `do` raised.
        RunError: Jobs could not be started or workers were killed; names the parts, the machines and the logs.
    """
    if not tasks:
        return
    settings = cluster or Cluster()
    if engine == "slurm":
        _refuse_without_slurm()
    pickle.dumps(do)  # a bug of the caller should show here, not in a log of another machine
    datatrove = _load(engine)
    logs = logs.resolve()
    if engine == "slurm":
        _end_earlier_jobs(logs, settings)
    look = _Look(_Step(do, tuple(tasks), _new_attempt(logs, engine)), progress)
    _loguru_to(look.step.attempt / "engine.log")
    if engine == "slurm":
        with _job(look.step, _slurm_executor(datatrove, look.step, workers, settings)) as name:
            _wait(look, name, settings)
    else:
        _run_here(look, workers, settings)
    _raise_what_failed(look.step)


# --- what runs in a job -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """A pipeline of one step: makes the part that a rank stands for, and leaves marks of its beginning and end."""

    do: Do
    numbers: tuple[int, ...]
    attempt: Path

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        number = self.numbers[rank]
        self._mark(_STARTED, number, {"host": socket.gethostname(), "pid": os.getpid()})
        try:
            self.do(number)
        except Exception as error:
            self._mark(_FAILED, number, _described(error))
            raise
        self._mark(_DONE, number, {})

    def _mark(self, what: str, number: int, facts: dict[str, object]) -> None:
        path = self.attempt / what / f"{number:06d}"
        write_json(path, facts)

    def marked(self, what: str) -> set[int]:
        """The numbers that have such a mark."""
        return {int(path.name) for path in (self.attempt / what).iterdir() if path.name[0] != "."}

    def facts(self, what: str, number: int) -> dict[str, Any]:
        """What a mark says."""
        facts: dict[str, Any] = json.loads((self.attempt / what / f"{number:06d}").read_bytes())
        return facts

    def missing(self) -> list[int]:
        """The parts that are not done, sorted."""
        return sorted(set(self.numbers) - self.marked(_DONE))

    def log(self, number: int) -> Path:
        """Where datatrove wrote down what it did for a part."""
        return self.attempt / "logs" / f"task_{self.numbers.index(number):05d}.log"


def _described(error: Exception) -> dict[str, object]:
    if isinstance(error, LlmkitError):
        # The nearest of its kinds that any process knows by name: a module's own error comes back as its base.
        known = next(kind for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
        return {"type": known.__name__, "message": error.message, "hint": error.hint}
    return {"type": "", "message": f"{type(error).__name__}: {error}", "hint": ""}


class _Look:
    """What the waiting process sees of the work."""

    def __init__(self, step: _Step, progress: Progress | None) -> None:
        self.step = step
        self._progress = progress
        self._told = -1

    def goes_on(self) -> bool:
        """Tell the progress; whether there is work left and nothing failed."""
        total = len(self.step.numbers)
        done = total - len(self.step.missing())
        if self._progress is not None and done != self._told:
            self._progress(done, total)
        self._told = done
        return done < total and not self.step.marked(_FAILED)


# --- datatrove ------------------------------------------------------------------------------------------------

_LAUNCHER = "datatrove.tools.launch_pickled_pipeline"


def _load(engine: Engine) -> Any:
    """The module with datatrove's executor.

    Raises:
        MissingError: It is not installed.
    """
    try:
        return import_module(f"datatrove.executor.{engine}")
    except ImportError as error:
        raise MissingError(
            f"work on many machines needs datatrove ({error})", hint="pip install 'llmkit[cluster]'"
        ) from error


def _loguru_to(path: Path) -> None:
    """Send what datatrove says in this process to a file; by itself it writes to stderr, where our own lines stand."""
    logger = import_module("loguru").logger
    logger.remove()
    logger.add(path)


def _search_path() -> str:
    """Where this process finds modules, for those that run elsewhere (a plug-in may lie in the current folder)."""
    return os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)


# --- on this machine ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """The ranks that one process here makes, one by one; what datatrove's launcher loads and runs.

    The pool of datatrove's own `run` waits for ever when a process of it is killed, and its manager outlives it.
    """

    executor: Any
    ranks: tuple[int, ...]

    def run(self) -> None:
        """Called by the launcher."""
        for rank in self.ranks:
            self.executor._run_for_rank(rank)


class _Worker:
    """A process on this machine and its share."""

    def __init__(self, step: _Step, ranks: Sequence[int]) -> None:
        self._step = step
        self._ranks = tuple(ranks)
        executor = _load("local").LocalPipelineExecutor(
            [step], tasks=len(step.numbers), workers=1, logging_dir=str(step.attempt), skip_completed=False
        )
        path = step.attempt / f"worker-from-{ranks[0]:05d}.pik"
        dill = import_module("dill")
        with path.open("wb") as file:
            dill.dump(_Share(executor, self._ranks), file, fmode=dill.CONTENTS_FMODE)
        with path.with_suffix(".out").open("wb") as out:
            self._process = _launched(path, out)

    def goes_on(self) -> "_Worker | None":
        """This worker while it lives; after it was killed, one for what it had not begun; else None."""
        code = self._process.poll()
        if code is None:
            return self
        begun = self._step.marked(_STARTED)
        left = [rank for rank in self._ranks if self._step.numbers[rank] not in begun]
        if code == 0 or not left or len(left) == len(self._ranks):
            return None
        return _Worker(self._step, left)

    def end(self) -> None:
        """Parts are published whole, so a worker can be ended at any moment."""
        self._process.kill()
        self._process.wait()


def _launched(pickled: Path, out: IO[bytes]) -> subprocess.Popen[bytes]:
    # A group of its own: Ctrl-C goes to the process that waits, and that one ends the workers.
    return subprocess.Popen(  # noqa: S603 (our own program, no shell)
        [sys.executable, "-m", _LAUNCHER, str(pickled)],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": _search_path(), "TOKENIZERS_PARALLELISM": "false"},
        preexec_fn=end_with_parent(),
        process_group=0,
    )


def _run_here(look: _Look, workers: int, cluster: Cluster) -> None:
    """Until no worker is left, or something failed."""
    count = len(look.step.numbers)
    shares = [range(count)[first::workers] for first in range(min(workers, count))]
    crew = [_Worker(look.step, share) for share in shares]
    try:
        while look.goes_on() and crew:
            time.sleep(min(cluster.poll_s, 0.1))
            crew = [after for worker in crew if (after := worker.goes_on())]
    finally:
        for worker in crew:
            worker.end()


# --- the job array ------------------------------------------------------------------------------------------


@contextmanager
def _job(step: _Step, executor: Any) -> Iterator[str]:
    """Submit the job array; give its name, by which it is found again; leave no job behind."""
    name: str = executor.job_name
    note = step.attempt / "job"
    write_file(note, name)
    try:
        try:
            executor.launch_job()
        except (subprocess.CalledProcessError, OSError) as error:
            raise RunError(
                f"Slurm did not take the job ({error})",
                hint=f"what sbatch said stands above; the script is {step.attempt / 'launch_script.slurm'}",
            ) from error
        yield name
    finally:
        _cancel(name)
    remove_file(note)


def _slurm_executor(datatrove: Any, step: _Step, workers: int, slurm: Cluster) -> Any:
    """The executor of datatrove for this job."""
    jobs = min(len(step.numbers), max(1, workers * slurm.jobs_per_worker), slurm.max_array)
    executor = datatrove.SlurmPipelineExecutor(
        [step],
        tasks=len(step.numbers),
        tasks_per_job=-(-len(step.numbers) // jobs),
        workers=workers,
        job_name=f"llmkit-{os.urandom(4).hex()}",
        time=slurm.time,
        partition=slurm.partition,
        cpus_per_task=slurm.cpus,
        mem_per_cpu_gb=slurm.memory_gb,
        max_array_size=slurm.max_array,
        qos=None,
        sbatch_args=dict(slurm.arguments),
        env_command=_environment(slurm),
        logging_dir=str(step.attempt),
        skip_completed=False,
        with_srun=False,
    )
    # A further job, which adds up statistics that we do not have, and stays in the queue for ever if a part fails.
    executor.launch_merge_stats = _nothing
    return executor


def _environment(slurm: Cluster) -> str:
    """Shell commands that give a job this very Python and its modules."""
    python = shlex.quote(sys.executable)
    return "\n".join(
        (
            *([slurm.setup] if slurm.setup else []),
            f"export PYTHONPATH={shlex.quote(_search_path())} TOKENIZERS_PARALLELISM=false",
            f'launch_pickled_pipeline() {{ {python} -m {_LAUNCHER} "$@"; }}',
        )
    )


def _nothing() -> None:
    pass


def _wait(look: _Look, name: str, slurm: Cluster) -> None:
    """Until nothing is left to do, or something failed, or the queue has no such job any more."""
    ended = float("inf")
    while True:
        waiting = _queued(name)
        # The files of the last job may be seen here only after its end is.
        ended = min(ended, time.monotonic()) if waiting == [] else float("inf")
        if not look.goes_on() or time.monotonic() - ended > slurm.settle_s:
            return
        _refuse_hopeless(waiting or [], look.step)
        time.sleep(slurm.poll_s)


def _refuse_hopeless(waiting: Sequence[str], step: _Step) -> None:
    for reason in waiting:
        if reason in _HOPELESS:
            raise RunError(
                f"Slurm will never start these jobs: {reason}",
                hint=f"change what is asked of Slurm; the script is {step.attempt / 'launch_script.slurm'}",
            )


def _raise_what_failed(step: _Step) -> None:
    if failed := sorted(step.marked(_FAILED)):
        raise _error_of(step, failed[0])
    if missing := step.missing():
        raise _killed(step, missing)


def _error_of(step: _Step, number: int) -> LlmkitError:
    """What `do` raised, as it was; a bug with the log that holds its traceback."""
    facts = step.facts(_FAILED, number)
    kind = getattr(errors, facts["type"] or "-", None)
    if isinstance(kind, type) and issubclass(kind, LlmkitError):
        return kind(facts["message"], hint=facts["hint"])
    return RunError(f"part {number} failed: {facts['message']}", hint=f"where: {step.log(number)}")


def _killed(step: _Step, missing: Sequence[int]) -> RunError:
    begun = [number for number in missing if number in step.marked(_STARTED)]
    lines = [f"{len(missing)} of {len(step.numbers)} parts were not finished: {_some(missing)}"]
    for number in begun[:_SHOWN]:
        facts = step.facts(_STARTED, number)
        lines.append(
            f"part {number} was being made by process {facts['pid']} on {facts['host']}: {step.log(number)}"
        )
    if not begun:
        lines.append("no worker came as far as to begin one")
    return RunError(
        "\n  ".join(lines),
        hint=f"what the workers said: {step.attempt}. "
        "The parts that are finished are kept: run the same command again.",
    )


def _some(numbers: Sequence[int]) -> str:
    rest = len(numbers) - _SHOWN
    return ", ".join(map(str, numbers[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")


def _new_attempt(logs: Path, engine: Engine) -> Path:
    number = 1 + max((int(path.name[-3:]) for path in logs.glob(f"{engine}-[0-9][0-9][0-9]")), default=0)
    attempt = logs / f"{engine}-{number:03d}"
    for what in (_STARTED, _FAILED, _DONE):
        make_folders(attempt / what)
    return attempt


# --- Slurm's own commands -----------------------------------------------------------------------------------


def _refuse_without_slurm() -> None:
    lacking = [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]
    if lacking:
        raise MissingError(
            f"this machine has no Slurm: there is no {', '.join(lacking)}",
            hint="run it where jobs are submitted, or on one machine: `machine.engine=here`",
        )


def _queued(name: str) -> list[str] | None:
    """The reasons why this job's tasks wait or `None` for those that run; None: Slurm does not answer just now."""
    command = ["squeue", "--noheader", "--array", f"--name={name}", "--format=%r"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (fixed words)
    return found.stdout.split("\n")[:-1] if found.returncode == 0 else None


def _cancel(name: str) -> None:
    # By name and user, never by number alone: numbers come round again.
    command = ["scancel", f"--name={name}", f"--user={getpass.getuser()}"]
    subprocess.run(command, capture_output=True, check=False)  # noqa: S603 (fixed words)


def _end_earlier_jobs(logs: Path, slurm: Cluster) -> None:
    """End what a killed call left in the queue, so that no part is made twice at once."""
    for note in sorted(logs.glob("slurm-*/job")):
        name = note.read_text()
        _cancel(name)
        while _queued(name) != []:
            time.sleep(min(1.0, slurm.poll_s))
        remove_file(note)
