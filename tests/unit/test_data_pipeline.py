"""Parts: made once, by any number of processes, kept when a run is killed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmkit.data.pipeline import Engine, MakePart, Stage, finish
from llmkit.errors import DataError, RunError


@dataclass(frozen=True)
class Shout:
    """Writes a part's number, and a line into a log each time it is made."""

    log: Path
    wrong: int = -1
    deadly: int = -1
    slow_s: float = 0.0

    def open(self):
        return self.fill

    def fill(self, number, folder):
        time.sleep(self.slow_s)
        if number == self.wrong:
            raise DataError(f"part {number} is bad", hint="mend it")
        if number == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "out.txt").write_text(f"{number}!")
        with self.log.open("a") as file:
            file.write(f"{number}\n")
        return {"shouted": number}


def made(log):
    return sorted(map(int, log.read_text().split()))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_part_is_made_once_and_in_order(tmp_path, workers):
    log, seen = tmp_path / "log", []
    stage = Stage(Shout(log), tmp_path / "store", [10] * 7)
    folders = finish(stage, Engine(workers), progress=lambda done, total: seen.append((done, total)))
    assert [(folder / "out.txt").read_text() for folder in folders] == [f"{i}!" for i in range(7)]
    assert made(log) == list(range(7))
    assert seen[-1] == (70, 70)
    assert len(seen) == 7
    finish(stage, Engine(workers))
    assert made(log) == list(range(7))


def test_a_damaged_part_is_made_again(tmp_path):
    log = tmp_path / "log"
    stage = Stage(Shout(log), tmp_path / "store", [1, 1, 1])
    folders = finish(stage)
    (folders[1] / "out.txt").write_text("2!")
    finish(stage)
    assert made(log) == [0, 1, 1, 2]
    assert (folders[1] / "out.txt").read_text() == "1!"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_through_as_it_was_raised_and_what_is_done_stays(tmp_path, workers):
    log = tmp_path / "log"
    stage = Stage(Shout(log, wrong=3), tmp_path / "store", [1] * 5)
    with pytest.raises(DataError, match="part 3 is bad") as raised:
        finish(stage, Engine(workers))
    assert raised.value.hint == "mend it"
    before = made(log)
    assert {0, 1, 2} <= {*before}
    finish(Stage(Shout(log), tmp_path / "store", [1] * 5))
    assert made(log) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_system_refuses_is_told_as_the_system_tells_it(tmp_path, workers):
    stage = Stage(Shout(tmp_path), tmp_path / "store", [1] * 3)  # its log is a folder
    with pytest.raises(IsADirectoryError) as raised:
        finish(stage, Engine(workers))
    assert raised.value.filename == str(tmp_path)


def test_a_killed_worker_is_named_and_its_part_is_made_by_the_next_run(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(RunError, match=r"killed by SIGKILL while it made part 2") as raised:
        finish(Stage(Shout(log, deadly=2), tmp_path / "store", [1] * 6), Engine(2))
    assert "workers" in raised.value.hint
    done = made(log)
    finish(Stage(Shout(log), tmp_path / "store", [1] * 6), Engine(2))
    assert made(log) == [0, 1, 2, 3, 4, 5]
    assert 2 not in done


def test_a_part_is_made_by_whoever_is_asked_and_only_once(tmp_path):
    log = tmp_path / "log"
    stage = Stage(Shout(log), tmp_path / "store", [1] * 3)
    for number in (2, 0, 2, 1, 0):
        MakePart(stage)(number)
    assert made(log) == [0, 1, 2]


RUNNER = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_data_pipeline import Shout
from llmkit.data.pipeline import Engine, Stage, finish
if __name__ == "__main__":
    here = Path(sys.argv[1])
    finish(Stage(Shout(here / "log", slow_s=0.4), here / "store", [1] * 40), Engine(2))
"""


def test_workers_end_when_the_parent_is_killed(tmp_path):
    script = tmp_path / "runner.py"
    script.write_text(RUNNER.format(tests=str(Path(__file__).parent)))
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = _children(process.pid)
    process.kill()
    process.wait()
    assert len(children) >= 2
    while any(Path(f"/proc/{pid}").exists() and _is_live(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def _is_live(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
