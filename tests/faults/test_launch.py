"""Real worker processes (without torch) that end in every way, and the parent's account of it."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from llmkit.errors import RunError
from llmkit.launch import (
    LOST_PEER,
    TIME_IS_UP,
    Limits,
    StopSignal,
    World,
    check_world,
    describe_stop,
    detect_world,
    exit_for,
    run_local_workers,
)
from llmkit.launch.crew import AwakeClock, Crew, Worker

# What a worker does is its argv: a mark that it runs, then an ending by rank.
WORKER = textwrap.dedent(
    """
    import json, os, signal, sys, time
    sys.path.insert(0, os.environ["LLMKIT_TEST_ROOT"])
    from pathlib import Path
    from llmkit.launch.signals import StopSignal, exit_for

    folder, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank, start = os.environ["RANK"], os.environ["LLMKIT_RESTART"]
    todo = next(plan[key] for key in (rank + "@" + start, rank, "*") if key in plan)

    def mark():
        seen = {k: v for k, v in os.environ.items() if k.isupper()} | {"pid": os.getpid(), "pgid": os.getpgid(0)}
        (folder / f"tmp{rank}").write_text(json.dumps(seen))
        (folder / f"tmp{rank}").rename(folder / f"up{rank}")

    if todo == "stop":                       # save and leave when asked
        with StopSignal() as stop:
            mark()
            while not stop.requested:
                time.sleep(0.01)
            (folder / f"saved{rank}").write_text(signal.Signals(stop.requested).name)
            sys.exit(exit_for(stop.requested))
    if todo == "deaf":                       # hangs in C++, so to say
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    mark()
    if todo in ("deaf", "plain"):            # plain: no handlers, dies of any signal
        signal.signal(signal.SIGINT, signal.SIG_DFL) if todo == "plain" else None
        time.sleep(60)
    if todo == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if todo == "freeze":                     # done as soon as someone continues it
        while not all((folder / f"up{n}").exists() for n in range(int(os.environ["WORLD_SIZE"]))):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGSTOP)
        sys.exit(0)
    if todo == "halt":                       # a debugger comes and holds it
        import ctypes, subprocess
        ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)  # PR_SET_PTRACER: it may, though it is no ancestor
        debugger = subprocess.Popen([sys.executable, "-c", os.environ["LLMKIT_TEST_DEBUGGER"], str(os.getpid())])
        sys.exit(f"no debugger: {debugger.wait()}")
    if str(todo).startswith("late"):         # fails after its peers have lost it
        time.sleep(1.5)
        todo = int(todo[4:])
    sys.stderr.write(f"worker {rank} says {todo}\\n")
    sys.exit(todo)
    """
)

DEBUGGER = textwrap.dedent(
    """
    import ctypes, os, sys, time
    pid, libc = int(sys.argv[1]), ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(16, pid, None, None):     # PTRACE_ATTACH
        sys.exit(os.strerror(ctypes.get_errno()))
    os.waitpid(pid, 0)
    time.sleep(60)
    """
)
PARENT = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from llmkit.launch import Limits, run_local_workers
    folder, count, worker = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    code = run_local_workers(count, [str(folder), sys.argv[5]], logs=folder / "logs",
                             program=[sys.executable, "-c", worker], limits=Limits(**json.loads(sys.argv[6])))
    sys.exit(code)
    """
)
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def _test_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_TEST_ROOT", ROOT)


def run_here(folder: Path, count: int, plan: dict[str, object], **options: object) -> tuple[int, str]:
    lines: list[str] = []
    arguments = [str(folder), json.dumps(plan)]
    program = [sys.executable, "-c", WORKER]
    limits = Limits(grace_s=0.5, stopped_s=0.5)
    settings = {"limits": limits, "on_line": lines.append, "program": program, **options}
    code = run_local_workers(count, arguments, logs=folder / "logs", **settings)
    return code, "\n".join(lines)


def start_parent(folder: Path, plan: dict[str, object], **limits: float) -> subprocess.Popen[str]:
    """A parent in a process of its own, once both its workers are up."""
    limits = {"grace_s": 0.5, "stop_grace_s": 20.0, **limits}
    command = [
        sys.executable,
        "-c",
        PARENT,
        ROOT,
        str(folder),
        "2",
        WORKER,
        json.dumps(plan),
        json.dumps(limits),
    ]
    env = {**os.environ, "TMPDIR": str(folder)}  # a killed parent leaves its private folder behind
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    wait_for(lambda: (folder / "up0").exists() and (folder / "up1").exists())
    return parent


def wait_for(condition, limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def seen(folder: Path, rank: int) -> dict[str, object]:
    return json.loads((folder / f"up{rank}").read_text())


def runs(pid: object) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        ({"*": 0}, 0),
        ({"*": 75}, 75),
        ({"*": 130}, 130),
        ({"0": 0, "*": 75}, 75),
        ({"0": 75, "1": 3}, 3),
        ({"0": 0, "1": 2}, 2),
        ({"0": "kill", "1": 0}, 1),
    ],
)
def test_exit_code_tells_the_truth(tmp_path: Path, plan: dict[str, object], code: int) -> None:
    assert run_here(tmp_path, 2, plan)[0] == code


def test_workers_know_their_place(tmp_path: Path) -> None:
    code, said = run_here(tmp_path, 2, {"*": 0}, env={**os.environ, "OMP_NUM_THREADS": "7"})
    first, second = seen(tmp_path, 0), seen(tmp_path, 1)
    assert (code, said) == (0, "")
    assert (first["RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "1", "1")
    assert {s["WORLD_SIZE"] + s["LOCAL_WORLD_SIZE"] for s in (first, second)} == {"22"}
    assert first["LLMKIT_RENDEZVOUS"] == second["LLMKIT_RENDEZVOUS"]
    assert (first["MASTER_ADDR"], first["GLOO_SOCKET_IFNAME"], first["OMP_NUM_THREADS"]) == (
        "127.0.0.1",
        "lo",
        "7",
    )
    assert first["pgid"] == first["pid"] != os.getpgid(0)
    assert not Path(first["LLMKIT_RENDEZVOUS"]).parent.exists(), "the private folder is removed"
    assert (tmp_path / "logs/rank_1.log").read_text() == "worker 1 says 0\n"


def test_cores_are_shared(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    run_here(tmp_path, 2, {"*": 0}, env=env)
    assert int(seen(tmp_path, 0)["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_dead_worker_is_named_and_the_others_end(tmp_path: Path) -> None:
    code, said = run_here(tmp_path, 3, {"0": "stop", "1": "deaf", "2": "kill"})
    assert code == 1
    assert "worker 2 (pid" in said
    assert "was killed by SIGKILL" in said
    assert "stopping the other workers (0, 1)" in said
    assert "worker 1 did not end in time and is killed" in said
    assert not any(runs(seen(tmp_path, rank)["pid"]) for rank in range(3))


@pytest.mark.parametrize(
    ("codes", "blamed", "ending"),
    [
        ([69, 7, 69], 1, (7, True)),
        ([69, 7, -9], 2, (1, False)),
        ([0, 8, 7], 1, (8, True)),
        ([75, 69, 69], 1, (1, False)),
    ],
)
def test_who_only_lost_the_connection_is_not_to_blame(
    codes: list[int], blamed: int, ending: tuple[int, bool]
) -> None:
    """When all have ended by the first look."""
    lines: list[str] = []
    crew = Crew(lines.append, Limits(), [])
    for rank, code in enumerate(codes):
        deed = f"exit {code}" if code >= 0 else f"kill {code} $$"
        process = subprocess.Popen(["sh", "-c", deed], process_group=0)
        process.wait()
        crew.workers.append(Worker(rank, process, None, 0))
    ended = crew.wait()
    assert lines[0].startswith(f"worker {blamed} (pid")
    assert (ended.code, ended.by_own_words) == ending
    assert LOST_PEER == 69
    assert ("lost the connection to another worker" in lines[0]) == (codes[blamed] == LOST_PEER)


def test_whom_others_have_lost_is_waited_for_and_blamed(tmp_path: Path) -> None:
    """It may take longer to end than they take to notice."""
    code, said = run_here(tmp_path, 3, {"0": 69, "1": "late7", "2": 69}, limits=Limits(grace_s=20))
    assert code == 7
    assert re.search(r"^worker 1 \(pid \d+\) failed with exit code 7$", said, re.MULTILINE)
    assert "  worker 1 says 7" in said
    assert "lost the connection" not in said
    assert "stopping the other workers" not in said


def test_whom_others_have_lost_is_not_waited_for_without_end(tmp_path: Path) -> None:
    limits = Limits(grace_s=0.5, lost_s=0.5)
    code, said = run_here(tmp_path, 3, {"0": 69, "1": "stop", "2": "deaf"}, limits=limits)
    assert code == 1
    assert "worker 0 (pid" in said
    assert "lost the connection to another worker" in said
    assert "stopping the other workers (1, 2)" in said
    assert not any(runs(seen(tmp_path, rank)["pid"]) for rank in range(3))


def test_a_failed_workers_last_lines_are_shown(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank_1.log").write_text("from an earlier run\n")
    code, said = run_here(tmp_path, 2, {"0": "stop", "1": 7})
    assert code == 7
    assert "worker 1 (pid" in said
    assert "failed with exit code 7" in said
    assert "  worker 1 says 7" in said
    assert "earlier run" not in said


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)],
    ids=lambda v: str(v),
)
def test_signals_reach_every_worker(tmp_path: Path, number: signal.Signals, code: int) -> None:
    parent = start_parent(tmp_path, {"*": "stop"})
    parent.send_signal(number)
    assert parent.wait(60) == code, parent.stderr.read()
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == [number.name] * 2


def test_stopped_before_the_handlers_are_set_up_is_no_failure(tmp_path: Path) -> None:
    parent = start_parent(tmp_path, {"0": "stop", "1": "plain"})
    parent.send_signal(signal.SIGTERM)
    said = parent.communicate(timeout=60)[1]
    assert parent.returncode == 75
    assert "before it could save; the newest checkpoint resumes" in said


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    parent = start_parent(tmp_path, {"*": "deaf"}, stop_grace_s=60)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert parent.poll() is None, "the first one waits for the workers"
    start = time.monotonic()
    parent.send_signal(signal.SIGINT)
    said = parent.communicate(timeout=60)[1]
    assert parent.returncode == 130
    assert time.monotonic() - start < 5
    assert "stopped at once" in said
    assert not any(runs(seen(tmp_path, rank)["pid"]) for rank in (0, 1))


def test_workers_that_do_not_stop_are_killed_in_the_end(tmp_path: Path) -> None:
    parent = start_parent(tmp_path, {"0": "stop", "1": "deaf"}, stop_grace_s=0.5)
    parent.send_signal(signal.SIGTERM)
    said = parent.communicate(timeout=60)[1]
    assert parent.returncode == 1
    assert "worker 1 did not end in time and is killed" in said
    assert "out of memory" not in said


def test_no_orphans_when_the_parent_is_killed(tmp_path: Path) -> None:
    parent = start_parent(tmp_path, {"*": "deaf"})
    parent.kill()
    parent.wait(60)
    wait_for(lambda: not any(runs(seen(tmp_path, rank)["pid"]) for rank in (0, 1)))


def state(pid: object) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_stopped_worker_is_named_and_all_are_ended(tmp_path: Path) -> None:
    code, said = run_here(tmp_path, 3, {"0": "stop", "1": "freeze", "2": "deaf"})
    assert code == 1
    assert re.search(r"worker 1 \(pid \d+\) was stopped for \d+ s \(SIGSTOP, or a debugger\)", said)
    assert "stopping the other workers (0, 2)" in said
    assert "out of memory" not in said
    assert not any(runs(seen(tmp_path, rank)["pid"]) for rank in range(3))


def test_a_worker_that_a_debugger_holds_is_stopped_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKIT_TEST_DEBUGGER", DEBUGGER)
    code, said = run_here(tmp_path, 2, {"0": "stop", "1": "halt"})
    if "no debugger" in said:
        pytest.skip(f"processes may not be traced here: {said}")
    assert code == 1
    assert re.search(r"worker 1 \(pid \d+\) was stopped for \d+ s \(SIGSTOP, or a debugger\)", said)


def test_every_stopped_worker_is_killed_without_grace(tmp_path: Path) -> None:
    limits = Limits(grace_s=1000, stopped_s=0.5)
    code, said = run_here(tmp_path, 2, {"*": "freeze"}, limits=limits)
    assert code == 1
    first = re.search(r"worker (\d) \(pid \d+\) was stopped for", said)
    second = re.search(r"worker (\d) \(pid \d+\) is stopped too and is killed", said)
    assert first, said
    assert second, said
    assert {first[1], second[1]} == {"0", "1"}


def test_a_worker_that_goes_on_in_time_is_left_alone(tmp_path: Path) -> None:
    parent = start_parent(tmp_path, {"0": "freeze", "1": 0}, stopped_s=1000)
    pid = seen(tmp_path, 0)["pid"]
    wait_for(lambda: state(pid) == "T")
    time.sleep(0.3)
    os.kill(int(pid), signal.SIGCONT)
    said = parent.communicate(timeout=60)[1]
    assert (parent.returncode, said) == (0, "")


def test_time_in_which_the_parent_was_stopped_itself_does_not_count(tmp_path: Path) -> None:
    parent = start_parent(tmp_path, {"0": "freeze", "1": 0}, stopped_s=3)
    pid = seen(tmp_path, 0)["pid"]
    wait_for(lambda: state(pid) == "T")
    parent.send_signal(signal.SIGSTOP)
    time.sleep(4.5)
    parent.send_signal(signal.SIGCONT)
    time.sleep(0.3)  # time for a look at the worker, which is still stopped
    assert parent.poll() is None, parent.communicate()
    os.kill(int(pid), signal.SIGCONT)
    said = parent.communicate(timeout=60)[1]
    assert (parent.returncode, said) == (0, "")


def test_awake_time_goes_on_by_looks_of_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 100.25, 160.0, 160.5])
    monkeypatch.setattr("llmkit.launch.crew.time.monotonic", lambda: next(times))
    clock = AwakeClock()
    steps = []
    for _ in range(3):
        clock.tick()
        steps.append(clock.step)
    assert (steps, clock.now) == ([0.25, 1.0, 0.5], 1.75)


def test_a_restart_goes_on_after_a_death(tmp_path: Path) -> None:
    plan = {"0@0": "stop", "1@0": "kill", "0@1": "kill", "1@1": "stop", "*": 0}
    code, said = run_here(tmp_path, 2, plan, restarts=3, progress=lambda: 0)
    assert code == 0
    lines = [line for line in said.splitlines() if line.startswith("restart")]
    assert [re.sub(r"\d{2,}", "N", line) for line in lines] == [
        "restart 1 of 3: worker 1 (pid N) was killed by SIGKILL; often the machine ran out of memory",
        "restart 2 of 3: worker 0 (pid N) was killed by SIGKILL; often the machine ran out of memory",
    ]
    assert seen(tmp_path, 0)["LLMKIT_RESTART"] == "2"


def test_a_stopped_worker_is_a_reason_to_restart(tmp_path: Path) -> None:
    code, said = run_here(tmp_path, 2, {"1@0": "freeze", "0@0": "stop", "*": 0}, restarts=1)
    assert code == 0
    assert re.search(r"restart 1 of 1: worker 1 \(pid \d+\) was stopped for", said)


def test_each_start_meets_at_a_place_of_its_own(tmp_path: Path) -> None:
    places = []

    def look() -> int:
        if (tmp_path / "up0").exists():
            places.append(seen(tmp_path, 0)["LLMKIT_RENDEZVOUS"])
        return 0

    run_here(tmp_path, 1, {"0": "kill"}, restarts=1, progress=look)
    assert len(set(places)) == 2


def test_restarts_are_counted_and_the_last_failure_told(tmp_path: Path) -> None:
    gained = iter(range(100))
    plan = {"*": 5, "0@2": 6, "1@2": "stop"}
    code, said = run_here(tmp_path, 2, plan, restarts=2, progress=lambda: next(gained))
    assert code == 6
    assert said.count("restart 1 of 2") == said.count("restart 2 of 2") == 1
    assert "not started again: all restarts are used up" in said


def test_who_fails_by_itself_without_gain_is_not_started_again(tmp_path: Path) -> None:
    gained = iter([0, 7, 7, 7])  # before and after each start
    code, said = run_here(tmp_path, 2, {"1": 5, "0": "stop"}, restarts=9, progress=lambda: next(gained))
    assert code == 5
    assert "restart 1 of 9: worker 1 (pid" in said
    assert "restart 2" not in said
    assert re.search(r"not started again: worker 1 .* exit code 5, and nothing was gained", said)


@pytest.mark.parametrize("end", [0, 2, 3, 4, 75, 130])
def test_what_another_start_would_not_change_is_final(tmp_path: Path, end: int) -> None:
    code, said = run_here(tmp_path, 1, {"*": end}, restarts=3, progress=iter(range(9)).__next__)
    assert code == end
    assert "restart" not in said
    assert seen(tmp_path, 0)["LLMKIT_RESTART"] == "0"


def test_a_failure_after_being_asked_to_stop_is_not_restarted(tmp_path: Path) -> None:
    def ask() -> None:
        wait_for((tmp_path / "up0").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    code, said = run_here(tmp_path, 1, {"*": "deaf"}, restarts=3, limits=Limits(stop_grace_s=0.5))
    asking.join()
    assert code == 1
    assert "worker 0 did not end in time and is killed" in said
    assert "restart" not in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_between_two_starts_ends_it(tmp_path: Path, number: int, code: int) -> None:
    asked = []

    def gained() -> int:  # called before a start and after it
        asked.append(1)
        if len(asked) == 2:
            os.kill(os.getpid(), number)
        return len(asked)

    ended, said = run_here(tmp_path, 1, {"*": "kill"}, restarts=3, progress=gained)
    assert ended == code
    assert f"not started again: {signal.Signals(number).name} came; the newest checkpoint resumes" in said
    assert seen(tmp_path, 0)["LLMKIT_RESTART"] == "0"


def test_one_worker_alone_is_no_world_for_accelerate(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    assert run_here(tmp_path, 1, {"*": 0}, env=env)[0] == 0
    alone = seen(tmp_path, 0)
    assert (alone["RANK"], alone["WORLD_SIZE"]) == ("0", "1")
    assert not {"LOCAL_RANK", "OMP_NUM_THREADS"} & alone.keys(), "as without a parent"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_one_worker_that_has_no_handlers_yet_is_no_failure(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    parent = start_parent(tmp_path, {"0": "stop", "1": "plain"})
    os.kill(int(seen(tmp_path, 1)["pid"]), number)
    said = parent.communicate(timeout=60)[1]
    assert parent.returncode == code, said
    assert f"was killed by {number.name} before it could save; the newest checkpoint resumes" in said


def test_ctrl_c_twice_in_a_worker_is_its_parents_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_RENDEZVOUS", "a-file")
    with StopSignal() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        assert stop.asked() == signal.SIGINT


def test_stop_signal_remembers_the_first_and_puts_handlers_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with StopSignal() as stop:
        assert stop.requested == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.requested == signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal may arrive a moment later
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_exit_for() -> None:
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, TIME_IS_UP)
    assert [int(exit_for(stop)) for stop in stops] == [130, 75, 75, 75]


def test_a_stop_has_a_name() -> None:
    assert [describe_stop(stop) for stop in (signal.SIGTERM, TIME_IS_UP)] == ["SIGTERM", "--max-time"]
    with pytest.raises(ValueError, match="0 is not a valid Signals"):
        describe_stop(0)


def test_time_is_up_with_what_stopping_takes_in_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("llmkit.launch.signals.time.monotonic", lambda: now)
    stop = StopSignal(deadline=1060.0)
    assert [stop.asked(reserve) for reserve in (0, 59, 60, 61)] == [0, 0, TIME_IS_UP, TIME_IS_UP]
    now = 1060.0
    assert stop.asked() == TIME_IS_UP
    assert StopSignal().asked(1e9) == 0, "no deadline: never"


def test_a_signal_goes_before_the_time() -> None:
    with StopSignal(deadline=time.monotonic() - 1) as stop:
        assert stop.asked() == TIME_IS_UP
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.asked() == signal.SIGINT


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}
MPIRUN = {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, None),
        (TORCHRUN, World(3, 4, 1, 2, "torchrun")),
        ({**TORCHRUN, "LLMKIT_RENDEZVOUS": "x"}, World(3, 4, 1, 2, "llmkit")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World(1, 2, 1, 2, "torchrun")),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}, World(4, 5, 0, 1, "srun")),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"}, None),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**SRUN, "SLURM_NTASKS": "1"}, None),
        ({"SLURM_PROCID": "0"}, None),
        ({f"OMPI_COMM_WORLD_{k}": v for k, v in MPIRUN.items()}, World(1, 2, 1, 2, "mpirun")),
        ({**SRUN, **TORCHRUN}, World(3, 4, 1, 2, "torchrun")),
    ],
)
def test_detect_world(env: dict[str, str], world: World | None) -> None:
    assert detect_world(env) == world


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "contradict"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
    ],
)
def test_half_a_world_is_an_error(env: dict[str, str], says: str) -> None:
    with pytest.raises(RunError, match=says):
        detect_world(env)


def test_a_worlds_place_is_told_to_torch_whoever_launched_it() -> None:
    slurm = {
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_TASKS_PER_NODE": "2(x2)",
        "SLURM_JOB_ID": "12345",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    }
    world = detect_world(slurm)
    assert world is not None
    told = world.environment(slurm)
    assert (told["RANK"], told["WORLD_SIZE"], told["LOCAL_RANK"]) == ("3", "4", "1")
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("10.0.0.7", "29845")
    elsewhere = {
        **slurm,
        "SLURM_STEP_NODELIST": "localhost,other",
    }  # typed on another machine than where it runs
    assert world.environment(elsewhere)["MASTER_ADDR"] == "localhost"
    unknown = {**slurm, "SLURM_STEP_NODELIST": "no-such-node-[1-2]"}
    assert world.environment(unknown)["MASTER_ADDR"] == "10.0.0.7"
    given = world.environment({**slurm, "MASTER_ADDR": "head", "MASTER_PORT": "7"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("head", "7")


def test_check_world_names_both_numbers() -> None:
    check_world(None, 1)
    check_world(World(0, 2, 0, 2, "srun"), 2)
    with pytest.raises(RunError, match=r"made for 4 .* but 2 .* srun(.|\n)*machine.processes=2"):
        check_world(World(0, 2, 0, 2, "srun"), 4)
    with pytest.raises(RunError, match=r"made for 2 .* runs by itself"):
        check_world(None, 2)
