"""Jobs of Slurm: a job as the script that sbatch takes, sending it, and asking what became of it. No torch.

The script does five things: it looks whether it is where it should be, starts one agent a node (or one task a process),
passes the signals of Slurm on, waits until all have saved, and has the job queued again when the run says that it was
interrupted (exit code 75). It says by itself when that is of no use.
"""

import getpass
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmkit.errors import ExitCode, MissingError, RunError, UsageError

IDLE_STARTS = 3
"""So many interrupted starts in a row that saved nothing, and a job is not queued again."""
SIGNAL = "USR1"
REACT_S = 30
"""Seconds for all processes to agree on a stop, and to end."""
_KILLED = " | ".join(str(128 + number) for number in (signal.SIGUSR1, signal.SIGTERM))
_ANSWER_S = 20
_LIMIT = re.compile(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]{1,2}))?(?::([0-9]{1,2}))?", re.ASCII)
_OURS = (
    *("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "time", "signal", "requeue"),
    *("open-mode", "output", "array", "dependency", "ntasks", "parsable", "wrap"),
)
"""Settings of sbatch that a job has of its own."""


@dataclass(frozen=True)
class Task:
    """What one job does, or one of an array.

    Attributes:
        words: What is added to the command line.
        run: The run's folder, in which checkpoints are progress.
    """

    words: tuple[str, ...]
    run: Path


@dataclass(frozen=True)
class Job:
    """A job, or an array of them.

    Attributes:
        name: As the queue shows it.
        program: What is started: the words before the verb.
        command: The verb and what follows it.
        tasks: One, or those of an array.
        folder: Where it is started from.
        log: Where its words go; `%j` is its number.
        nodes: Machines.
        processes: Worker processes of a machine.
        gpus: Of a machine.
        cores: Of a machine.
        limit_s: Seconds after which Slurm ends it.
        lead_s: So many seconds before that it is told to save.
        is_timed: Whether the command takes `--max-time` and, of several nodes, which of them it is.
        lead_is_told: Whether a person said how long saving takes: the signal then comes in time, and the run, which
            does not know it, need not stop earlier by itself.
        start: Who starts the workers: an agent on each `node`, or Slurm itself, one task for each `rank`.
        settings: Further settings of sbatch by their long names; an empty value stands for a flag.
        setup: Shell commands that come first.
        env: Variables to set.
        comment: What made the script.
    """

    name: str
    program: tuple[str, ...]
    command: tuple[str, ...]
    tasks: tuple[Task, ...]
    folder: Path
    log: Path
    nodes: int
    processes: int
    gpus: int
    cores: int
    limit_s: int
    lead_s: int
    is_timed: bool
    start: Literal["node", "rank"]
    lead_is_told: bool = False
    settings: tuple[tuple[str, str], ...] = ()
    setup: str = ""
    env: tuple[tuple[str, str], ...] = ()
    comment: str = ""

    @property
    def tasks_per_node(self) -> int:
        """Of Slurm's tasks."""
        return self.processes if self.start == "rank" else 1


def script_of(job: Job) -> str:
    """The script that sbatch takes.

    Raises:
        UsageError: A further setting is one that the job has of its own, or cannot be one.
    """
    parts = (_head(job), _place(job), _what(job), _watch(job), _end())
    return "\n".join(parts)


def _head(job: Job) -> str:
    own: dict[str, str] = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.tasks_per_node),
        "cpus-per-task": str(max(1, job.cores // job.tasks_per_node)),
    }
    if job.gpus:
        own["gpus-per-node"] = str(job.gpus)
    own |= {
        "time": shown_limit(job.limit_s),
        "signal": f"B:{SIGNAL}@{job.lead_s}",
        "requeue": "",
        "open-mode": "append",
        "output": _log(job.log),
    }
    if len(job.tasks) > 1:
        own["array"] = f"0-{len(job.tasks) - 1}"
    for name, value in job.settings:
        if name in _OURS:
            raise UsageError(f"--sbatch {name}: llmkit sets this itself", hint="see llmkit submit --help")
        if not re.fullmatch(r"[a-z][a-z-]*", name) or "\n" in value:
            raise UsageError(f"--sbatch {name}={value}: not a setting of sbatch", hint="--sbatch qos=high")
        own[name] = value
    lines = [f"#SBATCH --{name}" + (f"={_quoted(value)}" if value else "") for name, value in own.items()]
    comment = f"# {' '.join(job.comment.split())}"
    return "\n".join(["#!/bin/bash", comment, *lines, ""])


def _quoted(value: str) -> str:
    """A value as sbatch reads it in a script: it knows quotes, a backslash before them, and a `#` begins a comment."""
    if not re.search(r"[\s#'\"\\]", value):
        return value
    escaped = value.replace("\\", r"\\").replace('"', r"\"")
    return f'"{escaped}"'


def _log(log: Path) -> str:
    """A log's path as sbatch reads it: in its name `%j` and the like stand for numbers, in its folder nothing does.

    Raises:
        UsageError: A backslash is in it, with which no number would be put in.
    """
    if "\\" in str(log):
        raise UsageError(
            f"{log.parent}: Slurm cannot write logs into a folder with a backslash in its name",
            hint="--runs another folder",
        )
    return f"{str(log.parent).replace('%', '%%')}/{log.name}"


def _place(job: Job) -> str:
    folder = shlex.quote(str(job.folder))
    lines = [
        "set -u",
        f"cd {folder} || {{",
        f'  echo "llmkit: $(hostname) does not see" {folder}": all nodes must share it, at the same path" >&2',
        f"  exit {ExitCode.MISSING:d}",
        "}",
        *([job.setup] if job.setup else []),
        *(f"export {name}={shlex.quote(value)}" for name, value in job.env),
    ]
    return "\n".join([*lines, ""])


def _what(job: Job) -> str:
    """The run's folder, and the words of this task of an array."""

    def line(task: Task) -> str:
        return f"run={shlex.quote(str(task.run))}; set -- {shlex.join(task.words)}".rstrip()

    if len(job.tasks) == 1:
        return line(job.tasks[0]) + "\n"
    cases = [f"  {number}) {line(task)} ;;" for number, task in enumerate(job.tasks)]
    return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", ""])


def _watch(job: Job) -> str:
    """Start, pass signals on, and wait; what is there of checkpoints before and after."""
    words = ["srun", f"--ntasks-per-node={job.tasks_per_node}", '--cpus-per-task="$SLURM_CPUS_PER_TASK"']
    words += [shlex.join([*job.program, *job.command])]
    if job.start == "node":
        words += [f"--processes {job.nodes * job.processes}"] if job.is_timed else []
        words += ['--nodes "$SLURM_JOB_NUM_NODES"'] if job.is_timed and job.nodes > 1 else []
    limits_itself = job.is_timed and not job.lead_is_told
    words += ['--max-time "${left}s"'] if limits_itself else []
    timed = [
        "# What is left, of which the run keeps what saving takes; a requeued job has its whole time again.",
        f'end="${{SLURM_JOB_END_TIME:-$(($(date +%s) + {job.limit_s}))}}"',
        f"left=$((end - $(date +%s) - {REACT_S}))",
        "[ $left -gt 0 ] || left=1",
    ]
    lines = [
        "# The checkpoints that are there.",
        "saved() { find \"$run\" -maxdepth 4 -path '*/checkpoints/step_*' -prune -print 2>/dev/null | sort; }",
        "before=$(saved)",
        *(timed if limits_itself else []),
        f"trap 'kill -{SIGNAL} \"$step\" 2>/dev/null' {SIGNAL} TERM",
        " ".join([*words, '"$@" &']),
        "step=$!",
        "# A signal ends `wait` too; only the last one has the exit code.",
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; done',
        'wait "$step"; code=$?',
    ]
    return "\n".join([*lines, ""])


def _end() -> str:
    lines = [
        "# Killed by a signal that asks to stop: before the run listened, or when it was done. What is saved goes on.",
        f"case $code in {ExitCode.INTERRUPTED:d} | {_KILLED}) ;; *) exit $code ;; esac",
        "# Interrupted, and all is saved. One that is cancelled, or queued again by Slurm itself, does not run.",
        "# The last task of an array has the whole array's number for its own: only with its task is it one job.",
        'me="$SLURM_JOB_ID"',
        '[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || me="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
        'state=$(squeue --noheader --jobs="$me" --format=%T 2>/dev/null)',
        '[ "$state" = RUNNING ] || exit $code',
        'note="$run/submit/.idle-$SLURM_JOB_ID"',
        'if [ "$(saved)" = "$before" ]; then idle=$(($(cat "$note" 2>/dev/null || echo 0) + 1)); else idle=0; fi',
        'mkdir -p "$run/submit" && echo $idle > "$note"',
        f"if [ $idle -ge {IDLE_STARTS} ]; then",
        f'  echo "llmkit: interrupted {IDLE_STARTS} times in a row before anything was saved; not queued again" >&2',
        "  exit $code",
        "fi",
        'echo "llmkit: interrupted; job $me is queued again" >&2',
        'scontrol requeue "$me"',
        "exit $code",
    ]
    return "\n".join([*lines, ""])


# --- time limits ----------------------------------------------------------------------------------------------


def parse_limit(text: str, option: str = "--time") -> int:
    """The seconds of a limit, as sbatch takes it (`12:00:00`, `2-00`, `90` minutes) or as llmkit does (`12h`, `90m`).

    Raises:
        UsageError: It is no time.
    """
    found = _LIMIT.fullmatch(text)
    if found is None:
        from llmkit.recipe.units import duration_of

        return max(1, int(duration_of(text, option)))
    days, *rest = found.groups()
    first, second, third = (int(part or 0) for part in rest)
    if days is not None:  # days-hours[:minutes[:seconds]]
        seconds = (int(days) * 24 + first) * 3600 + second * 60 + third
    elif rest[2] is not None:  # hours:minutes:seconds
        seconds = first * 3600 + second * 60 + third
    else:  # minutes[:seconds]
        seconds = first * 60 + second
    if seconds < 1:
        raise UsageError(f"{option} {text}: no time at all", hint=f"{option} 12:00:00, or {option} 12h")
    return seconds


def shown_limit(seconds: int) -> str:
    """A limit as sbatch takes it."""
    hours, rest = divmod(seconds, 3600)
    days, hours = divmod(hours, 24)
    clock = f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


# --- Slurm's own commands -----------------------------------------------------------------------------------


def refuse_without_slurm() -> None:
    """Refuse where jobs cannot be sent from.

    Raises:
        MissingError: This machine has no Slurm.
    """
    lacking = [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]
    if lacking:
        raise MissingError(
            f"this machine has no Slurm: there is no {', '.join(lacking)}",
            hint="run it where jobs are submitted, such as a login node; --dry-run shows the scripts anywhere",
        )


def send(script: Path, *, after: str | None = None) -> str:
    """Give a script to sbatch.

    Args:
        script: Where it is.
        after: The job that must have ended well before; if it does not, this one is cancelled.

    Returns:
        The number of the job.

    Raises:
        RunError: Slurm refused it; its own words.
    """
    words = ["sbatch", "--parsable"]
    words += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    done = subprocess.run([*words, str(script)], capture_output=True, text=True, check=False)  # noqa: S603 (no shell)
    number = done.stdout.strip().split(";")[0]
    if done.returncode or not number.isdigit():
        said = " ".join(
            (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").split("\n")
        )
        raise RunError(
            f"Slurm did not take the job: {said}",
            hint=f"the script is {script}; --partition, --account and --sbatch KEY=VALUE change what is asked for",
        )
    return number


def cancel(numbers: Sequence[str]) -> None:
    """Cancel jobs of ours."""
    subprocess.run(["scancel", *numbers], capture_output=True, check=False)  # noqa: S603, S607 (fixed words)


@dataclass(frozen=True)
class State:
    """What Slurm says of a job.

    Attributes:
        name: `PENDING`, `RUNNING`, `COMPLETED`, `FAILED`, ...; of an array, those of its tasks with commas between.
        reason: Why it waits; empty else.
        is_queued: Whether it is in the queue: it waits or runs.
    """

    name: str
    reason: str
    is_queued: bool


_LIVE = {
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "REQUEUED",
    "CONFIGURING",
    "COMPLETING",
    "REQUEUE_HOLD",
    "RESIZING",
}


def states_of(jobs: Mapping[str, str]) -> dict[str, State]:
    """What Slurm says of jobs: its queue, and for those that have left it the accounting, where there is one.

    Args:
        jobs: Their names by number: numbers come round again.

    Returns:
        By number; a job that nobody knows any more is left out, and without Slurm all are.
    """
    if not jobs or shutil.which("squeue") is None:
        return {}
    found = _collected(jobs, _queue())
    gone = [number for number in jobs if number not in found]
    return {**(_collected(jobs, _accounted(gone)) if gone else {}), **found}


def _collected(jobs: Mapping[str, str], lines: Sequence[Sequence[str]]) -> dict[str, State]:
    """One state a job from lines of number, name, state and reason; an array has several."""
    said: dict[str, dict[str, str]] = {}
    for number, name, state, reason in lines:
        if jobs.get(number) == name:
            said.setdefault(number, {})[state.split()[0] if state else "UNKNOWN"] = reason
    return {number: _state(states) for number, states in said.items()}


def _state(states: Mapping[str, str]) -> State:
    reason = states.get("PENDING", "")
    is_queued = not _LIVE.isdisjoint(states)
    return State(", ".join(sorted(states)), "" if reason == "None" else reason, is_queued)


def _queue() -> list[list[str]]:
    words = ["squeue", "--noheader", f"--user={getpass.getuser()}", "--states=all", "--format=%F|%j|%T|%r"]
    return _lines(words)


def _accounted(numbers: Collection[str]) -> list[list[str]]:
    if shutil.which("sacct") is None:
        return []
    words = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,JobName,State"]
    rows = _lines([*words, f"--jobs={','.join(numbers)}"], cells=3)
    return [[number.split("_")[0], name, state, ""] for number, name, state in rows]


def _lines(words: Sequence[str], cells: int = 4) -> list[list[str]]:
    """What a command of Slurm prints, cut at its bars; nothing where Slurm does not answer."""
    try:
        done = subprocess.run(  # noqa: S603 (fixed words)
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=_ANSWER_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split("|") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [row for row in rows if len(row) == cells]
