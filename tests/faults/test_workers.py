"""Real training in two processes, and what comes to some of them: signals, a death, a stop, an error, a slow disk."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from injection import environment
from training import command, losses, same_bits, start, weights

from llmkit.durable import verify_folder
from llmkit.errors import LostWorkerError, MissingError
from llmkit.train import worker

pytestmark = pytest.mark.timeout(1200)  # some start six times, and machines are busy

LENGTH = {"pretrain__train__length": "150 steps", "machine__micro_batch": 2}
SAVING = {**LENGTH, "pretrain__checkpoint__every": "7 steps"}
NEVER = {**LENGTH, "pretrain__checkpoint__every": "never"}  # what is there, a stop has saved

HASTY = """
import functools, importlib, sys
from llmkit.cli import main
from llmkit.launch import Limits

verb = importlib.import_module("llmkit.run.training")
verb.run_local_workers = functools.partial(verb.run_local_workers, limits=Limits(grace_s=5, stopped_s=2))
sys.argv[0] = "llmkit"
sys.exit(main())
"""
"""The command line with less patience for stopped workers than it has by itself."""


RANK_1 = """
import os
if os.environ.get("RANK") == "1":
    from llmkit.train import loop
    real = loop.train_step

    def train_step(run, step, *rest):
        if step == 3:
            raise ValueError("no such thing as step 3")
        return real(run, step, *rest)

    loop.train_step = train_step
"""
"""Run by every Python process before its first line: one of them makes an error that nobody foresaw."""

HOLDING = """
import os, time
from pathlib import Path
from llmkit.durable import calls
from llmkit.train import loop

loop._MEET_S = 1.0
if os.environ.get("RANK") == "0":
    place = Path(__file__).parent

    def hold(call):
        if call.name == "foreign" and "checkpoints" in str(call.path):
            (place / "holding").touch()
            while not (place / "go").exists():
                time.sleep(0.02)

    calls.fail_point = hold
"""
"""The first process saves only once it may; until then all meet every second."""


def spoilt(folder, program):
    """Variables under which Python runs `program` at each start."""
    (folder / "spoilt").mkdir()
    (folder / "spoilt" / "sitecustomize.py").write_text(program)
    return {"PYTHONPATH": os.pathsep.join([str(folder / "spoilt"), str(Path(__file__).parents[2])])}


class Run:
    """A command that trains in two processes, in a session of its own."""

    def __init__(self, words, **env):
        env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(words, env=env, start_new_session=True, **pipes)
        self.folder = Path(words[words.index("--runs") + 1]) / Path(words[words.index("pretrain") + 1]).stem
        self.folder /= "pretrain"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()  # the workers go with it
        self.process.communicate()

    def wait_for(self, condition, limit_s=240):
        """Wait until it holds, while the run goes on; return what it gave."""
        end = time.monotonic() + limit_s
        while not (held := condition()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.03)
        return held

    def wait_for_step(self, step):
        """Wait until that step has been recorded by this run."""
        log = self.folder / "metrics.jsonl"
        self.wait_for(lambda: log.exists() and max(losses(self.folder), default=0) >= step)

    def workers(self):
        """Process ids by rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            try:
                found[int(child.environ()["RANK"])] = child.pid
            except (psutil.Error, KeyError):  # between fork and exec it has no environment of its own
                continue
        return found if len(found) == 2 else {}

    def session(self):
        """Process ids of everything it has started, and its own."""
        return [p for p in psutil.pids() if _session_of(p) == self.process.pid]

    def end(self, limit_s=240):
        """Wait for the end; return exit code and words."""
        out, err = self.process.communicate(timeout=limit_s)
        assert not self.session(), "everything has ended"
        return self.process.returncode, out + err


def _session_of(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def two(folder, name, *words, **changes):
    return command(folder, name, "--processes", "2", *words, **changes)


def hasty(words):
    """The same command with short limits."""
    return [sys.executable, "-c", HASTY, *words[words.index("pretrain") :]]


def last_step(run):
    return max(losses(run.folder), default=0)


def checkpoints(run):
    return sorted(path.name for path in (run.folder / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights and losses of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    with Run(two(folder, "whole", **NEVER)) as run:
        assert run.end()[0] == 0
    return weights(run.folder), losses(run.folder)


def assert_same(run, whole):
    assert same_bits(weights(run.folder), whole[0])
    assert losses(run.folder) == whole[1]


def stop(words, who, number):
    """Start or go on, let some steps pass, signal; return the run, its exit code and its words."""
    with Run(words) as run:
        begun = last_step(run) if run.folder.exists() else 0
        run.wait_for_step(begun + 10)
        workers = run.workers()
        pids = {
            "rank 0": [workers[0]],
            "rank 1": [workers[1]],
            "all ranks": [workers[0], workers[1]],
            "parent": [run.process.pid],
            "session": run.session(),
        }
        for pid in pids[who]:
            os.kill(pid, number)
        code, said = run.end()
    return run, code, said


def assert_saved_once(run, said, saved_before):
    """All ranks agreed on one step, and exactly that was saved."""
    new = sorted(set(checkpoints(run)) - set(saved_before))
    assert len(new) == 1, (new, said)
    verify_folder(run.folder / "checkpoints" / new[0])
    assert f"after step {int(new[0][5:])}; everything is saved" in said.replace(",", "")
    assert f"after step {int(new[0][5:])};" in (run.folder / "logs/rank_1.log").read_text().replace(",", "")
    assert last_step(run) == int(new[0][5:]), "nothing was trained after it"


def kill_one(words, rank, number, limit_s=240):
    """Start or go on, wait for two checkpoints, signal one worker; return the run, its exit code and words."""
    with Run(words) as run:
        before = set(checkpoints(run))
        run.wait_for(lambda: len(set(checkpoints(run)) - before) >= 2)
        os.kill(run.wait_for(run.workers)[rank], number)
        code, said = run.end(limit_s)
    for name in checkpoints(run):
        verify_folder(run.folder / "checkpoints" / name)
    return run, code, said


def test_a_signal_to_one_rank_stops_all_and_a_death_is_survived(tmp_path, whole):
    words = two(tmp_path, "run", **NEVER)
    run, code, said = stop(words, "rank 1", signal.SIGTERM)
    assert code == 75, said
    assert_saved_once(run, said, [])
    words = two(tmp_path, "run", "--restarts", "1", **SAVING)
    run, code, said = kill_one(words, 1, signal.SIGKILL)
    assert code == 0, said
    assert "restart 1 of 1: worker 1 (pid" in said
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_that_nobody_foresaw_ends_both_and_is_told(tmp_path, rank):
    """The one that made it is blamed, not the one that lost it."""
    words = two(tmp_path, "run", "--no-self-check", **NEVER)
    with Run(words, **spoilt(tmp_path, RANK_1.replace('"1"', f'"{rank}"'))) as run:
        code, said = run.end()
    assert code == 1, said
    assert re.search(rf"worker {rank} \(pid \d+\) failed with exit code 1\n", said), said
    assert "error: ValueError: no such thing as step 3" in said
    assert re.search(r'sitecustomize.py", line \d+, in train_step\n', said), "where it happened"
    assert said.count("Traceback") == 1, said
    assert last_step(run) == 3


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 1, "error: Permission denied: a/b\n"),
        (LostWorkerError("no one is there"), 69, "error: no one is there\n"),
        (MissingError("no package"), 3, "error: no package\n"),
    ],
)
def test_what_a_worker_says_and_ends_with(monkeypatch, capsys, error, code, says):
    def fail(job, reporter):
        raise error

    monkeypatch.setattr(worker, "pretrain", fail)
    monkeypatch.setattr(
        worker.Job, "load", lambda path: SimpleNamespace(face={"json": False, "quiet": False})
    )
    assert worker.main("job.json") == code
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_save_that_fails_on_one_rank_ends_both_and_the_run_goes_on(tmp_path, whole):
    words = two(tmp_path, "run", **SAVING)
    with Run(words, **environment("ENOSPC", 40, lasting=True, path="checkpoints")) as run:
        code, said = run.end()
    assert code == 1, said
    assert re.search(r"worker 0 \(pid \d+\) failed with exit code 1\n", said), said
    assert "error: no space left on the disk while writing " in said
    assert "Traceback" not in said
    assert "another process could not save" in (run.folder / "logs/rank_1.log").read_text()
    assert checkpoints(run) == ["step_00000007"]
    verify_folder(run.folder / "checkpoints/step_00000007")
    with Run(words) as resumed:
        code, said = resumed.end()
    assert code == 0, said
    assert_same(resumed, whole)


def test_under_another_launcher_nobody_leaves_before_the_save_is_on_the_disk(tmp_path):
    """Such a launcher may end the others as soon as one has left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    changes = {**NEVER, "pretrain__train__length": "4000 steps", "pretrain__eval__every": "never"}
    words = command(tmp_path, "pair", "--no-self-check", **changes)
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world |= {"GLOO_SOCKET_IFNAME": "lo", **spoilt(tmp_path, HOLDING)}
    folder = tmp_path / "runs/pair/pretrain"
    pair = [start(words, RANK=str(n), LOCAL_RANK=str(n), **world) for n in (0, 1)]
    try:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and max(losses(folder), default=0) >= 5, pair)
        pair[1].send_signal(signal.SIGTERM)
        wait_for((tmp_path / "spoilt/holding").exists, pair)
        with pytest.raises(subprocess.TimeoutExpired):
            pair[1].wait(timeout=5)
        assert not list((folder / "checkpoints").glob("step_*"))
        (tmp_path / "spoilt/go").touch()
        said = [process.communicate(timeout=120) for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [75, 75], said
    assert all("stopped by SIGTERM after step" in words[1] for words in said), said
    (saved,) = (folder / "checkpoints").glob("step_*")
    verify_folder(saved)


def wait_for(condition, processes, limit_s=240):
    end = time.monotonic() + limit_s
    while not condition():
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.03)


@pytest.mark.slow
def test_whoever_gets_a_signal_all_stop_at_one_step(tmp_path, whole):
    words = two(tmp_path, "run", **NEVER)
    saved = []
    for who, number, expected in [
        ("rank 0", signal.SIGUSR1, 75),
        ("rank 1", signal.SIGINT, 130),
        ("all ranks", signal.SIGTERM, 75),
        ("parent", signal.SIGINT, 130),
        ("session", signal.SIGTERM, 75),
        ("session", signal.SIGINT, 130),
    ]:
        run, code, said = stop(words, who, number)
        assert code == expected, (who, number, said)
        assert_saved_once(run, said, saved)
        saved = checkpoints(run)
    with Run(words) as run:
        code, said = run.end()
    assert code == 0, said
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_or_stopped_worker_ends_the_run_and_it_goes_on(tmp_path, whole, rank):
    words = two(tmp_path, "run", **SAVING)
    _, code, said = kill_one(words, rank, signal.SIGKILL)
    assert code == 1, said
    assert f"worker {rank} (pid " in said
    assert ") was killed by SIGKILL" in said
    _, code, said = kill_one(hasty(words), rank, signal.SIGSTOP)
    assert code == 1, said
    assert f"worker {rank} (pid " in said
    assert ") was stopped for 2 s (SIGSTOP, or a debugger) and had to be killed" in said
    with Run(words) as resumed:
        code, said = resumed.end()
    assert code == 0, said
    assert_same(resumed, whole)


@pytest.mark.slow
def test_with_its_own_patience_a_stopped_worker_is_noticed_within_the_promised_minute(tmp_path):
    promised_s = 60
    _, code, said = kill_one(two(tmp_path, "run", **SAVING), 1, signal.SIGSTOP, promised_s)
    assert code == 1, said
    assert ") was stopped for 20 s" in said


@pytest.mark.slow
def test_one_process_with_restarts_goes_on_by_itself_to_the_same_bits(tmp_path):
    """Alone or as the only worker, the numbers are the same."""
    with Run(command(tmp_path, "whole", **NEVER)) as run:
        code, said = run.end()
    assert code == 0, said
    whole = weights(run.folder), losses(run.folder)
    words = command(tmp_path, "run", "--restarts", "1", **SAVING)
    with Run(words) as run:
        run.wait_for(lambda: len(checkpoints(run)) >= 2)
        (worker,) = psutil.Process(run.process.pid).children()
        worker.kill()
        code, said = run.end()
    assert code == 0, said
    assert "restart 1 of 1" in said
    assert_same(run, whole)
