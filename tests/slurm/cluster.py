"""A real Slurm on this machine: one controller and virtual nodes, all in one folder, gone at the end. Needs root.

`apt-get install slurm-wlm munge` brings the programs. The daemons are children of the process that asks for the
cluster and are ended by their numbers; nothing of a Slurm that may run here already is touched: key, socket, ports,
state and logs are its own.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = (
    "slurmctld",
    "slurmd",
    "munged",
    "mungekey",
    "sbatch",
    "srun",
    "squeue",
    "scontrol",
    "scancel",
    "sinfo",
)
START_S = 60.0

CONFIG = """\
ClusterName=llmkit
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
ReturnToService=2
SlurmdTimeout=300
InactiveLimit=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL Default=NO PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why there can be no cluster here; empty where there can."""
    lacking = [name for name in PROGRAMS if _program(name) is None]
    if lacking:
        return f"Slurm is not installed (no {', '.join(lacking)}): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "virtual nodes of Slurm need root"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@dataclass(frozen=True)
class Cluster:
    """Where it is.

    Attributes:
        folder: Its files, and the logs of its daemons.
        env: What its commands need in the environment.
    """

    folder: Path
    env: dict[str, str]

    def call(self, *words: str) -> str:
        """What a command of Slurm says; a failure is an error with its words."""
        done = subprocess.run(
            words, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        said = self.call("scontrol", "--oneliner", "show", "job", number).split(" ")
        return dict(word.split("=", 1) for word in said if "=" in word)

    def state(self, number: str) -> str:
        """A job's state, such as RUNNING."""
        return self.job(number)["JobState"]

    def wait(self, number: str, *states: str, timeout: float = 600.0) -> dict[str, str]:
        """Wait until a job is in one of the states; what the controller then knows of it."""
        end = time.monotonic() + timeout
        while (found := self.job(number))["JobState"] not in states:
            assert time.monotonic() < end, f"job {number} is {found['JobState']} after {timeout:g} s: {found}"
            time.sleep(0.5)
        return found


@contextmanager
def slurm(folder: Path, num_nodes: int = 2) -> Iterator[Cluster]:
    """A cluster of virtual nodes, ready for jobs; ended when the block is.

    Args:
        folder: For its files; made, must be new.
        num_nodes: How many; each has two processors, however many there are.
    """
    for name in ("state", "spool", "log"):
        (folder / name).mkdir(parents=True)
    ports = _free_ports(1 + num_nodes)
    host = socket.gethostname().split(".")[0]
    nodes = [
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[number]} CPUs=2 RealMemory=1000"
        for number in range(1, num_nodes + 1)
    ]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, folder=folder, port=ports[0], nodes="\n".join(nodes)))
    cluster = Cluster(folder, {"SLURM_CONF": str(config)})
    with ExitStack() as stack:
        _munge(folder, stack)
        _daemon(stack, cluster, "slurmctld", "-D", "-i", "-f", str(config))
        for number in range(1, num_nodes + 1):
            (folder / "spool" / f"n{number}").mkdir()
            _daemon(stack, cluster, "slurmd", "-D", "-f", str(config), "-N", f"n{number}")
        _wait_for_nodes(cluster, num_nodes)
        stack.callback(_cancel_all, cluster)
        yield cluster


def _munge(folder: Path, stack: ExitStack) -> None:
    key, socket_file = folder / "munge.key", folder / "munge.socket"
    subprocess.run([str(_program("mungekey")), "--create", f"--keyfile={key}"], check=True)
    words = ["--foreground", "--force", f"--key-file={key}", f"--socket={socket_file}", "--num-threads=2"]
    words += [f"--{name}-file={folder / f'munge.{name}'}" for name in ("pid", "seed", "log")]
    _daemon(stack, Cluster(folder, {}), "munged", *words)
    end = time.monotonic() + START_S
    while not socket_file.exists():
        assert time.monotonic() < end, (folder / "log" / "munged.log").read_text()
        time.sleep(0.05)


def _daemon(stack: ExitStack, cluster: Cluster, name: str, *words: str) -> None:
    """Start a daemon as a child; it is ended by its number."""
    log = stack.enter_context((cluster.folder / "log" / f"{name}.log").open("ab"))
    env = {**os.environ, **cluster.env}
    process = subprocess.Popen(
        [str(_program(name)), *words], env=env, stdout=log, stderr=log, start_new_session=True
    )
    stack.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for_nodes(cluster: Cluster, num_nodes: int) -> None:
    end = time.monotonic() + START_S
    said = ""
    while time.monotonic() < end:
        done = subprocess.run(
            ["sinfo", "--noheader", "--partition=low", "--format=%T %D"],
            env={**os.environ, **cluster.env},
            capture_output=True,
            text=True,
        )
        said = done.stdout + done.stderr
        if said.split() == ["idle", str(num_nodes)]:
            return
        time.sleep(0.2)
    logs = "\n".join(path.read_text()[-2000:] for path in (cluster.folder / "log").iterdir())
    raise AssertionError(f"the nodes did not come up: {said}\n{logs}")


def _cancel_all(cluster: Cluster) -> None:
    """End what runs, so that no step outlives its node."""
    subprocess.run(["scancel", "--user=root"], env={**os.environ, **cluster.env}, capture_output=True)
    end = time.monotonic() + START_S
    while time.monotonic() < end and cluster.call("squeue", "--noheader", "--states=RUNNING,COMPLETING"):
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
