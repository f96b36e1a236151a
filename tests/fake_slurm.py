"""Slurm's commands for tests: a job array's tasks are processes of this machine, so many at once.

`install(folder)` writes the commands; with `folder` on PATH the real submitting code runs unchanged.
"""

import os
import stat
import sys
from pathlib import Path

_PROGRAM = '''#!{python}
import os, re, signal, subprocess, sys, time
from pathlib import Path

STATE = Path({state!r})
command = Path(sys.argv[0]).name
options = dict(re.fullmatch("--([a-z-]+)(?:=(.*))?", word).groups() for word in sys.argv[1:] if word[:2] == "--")


def alive():
    """Whether this job's keeper lives, which starts its tasks and waits for them."""
    pid = STATE / options["name"]
    try:
        return pid.exists() and b"keep" in Path("/proc", pid.read_text(), "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def settings(script):
    return dict(re.findall("#SBATCH --([a-z-]+)(?:=(.*))?", script))


def keep(path, offset):
    asked = settings(Path(path).read_text())
    last, width = map(int, re.fullmatch("0-([0-9]+)%([0-9]+)", asked["array"]).groups())
    running, tasks = [], list(range(last + 1))
    while tasks or running:
        running = [task for task in running if task.poll() is None]
        while tasks and len(running) < width:
            number = tasks.pop(0)
            environment = dict(os.environ, SLURM_ARRAY_TASK_ID=str(number), RUN_OFFSET=offset, SLURM_NODELIST="n1")
            out = open(asked["output"].replace("%A", "1").replace("%a", str(number)), "wb")
            running.append(subprocess.Popen(["bash", path], stdout=out, stderr=out, env=environment))
        time.sleep(0.02)


if command == "scontrol":
    print("n1")
elif command == "squeue":
    if alive():
        print("None")
elif command == "scancel":
    if alive():
        os.killpg(int((STATE / options["name"]).read_text()), signal.SIGTERM)
elif sys.argv[1] == "keep":
    keep(sys.argv[2], sys.argv[3])
else:
    script = Path(sys.argv[-1]).read_text()
    asked = settings(script)
    if asked["partition"] == "closed":
        sys.exit("sbatch: error: invalid partition specified: closed")
    copy = STATE / (asked["job-name"] + ".sh")
    copy.write_text(script)
    words = [sys.executable, sys.argv[0], "keep", str(copy), options["export"].split("=")[1]]
    keeper = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (STATE / asked["job-name"]).write_text(str(keeper.pid))
    print("Submitted batch job 1")
'''


def install(folder: Path) -> str:
    """Write the commands into `folder`; return the PATH on which they come first."""
    folder.mkdir()
    state = folder / "state"
    state.mkdir()
    for name in ("sbatch", "squeue", "scancel", "scontrol"):
        path = folder / name
        path.write_text(_PROGRAM.replace("{python}", sys.executable).replace("{state!r}", repr(str(state))))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
