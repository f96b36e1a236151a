"""Processes that prepare batches: the same bits, no reaction to signals that ask to stop, no trace when gone."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from loading import batches, bug, doubled, endless, large, masked, refusing_seven, who

from llmkit.data.loader import Prefetcher
from llmkit.data.loader_workers import LoaderWorkers
from llmkit.data.shards import SplitCounts, TokenStream
from llmkit.errors import DataError, RunError

WAIT_S = 60


def eventually(condition):
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def crew(of_step, steps, workers=2, **limits):
    leaving = threading.Event()
    return LoaderWorkers(of_step, steps, workers, leaving, **limits), leaving


def in_a_thread(work):
    """`work()` in a thread of its own: signals are blocked there as in the prefetching thread."""
    found = []

    def run():
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(WAIT_S)
    assert found, "the thread did not end"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_same_bits_with_any_number_of_processes(workers):
    options = {"encode": masked, "isolate": True}
    plain = [(step, batches(**options).of_step(step)) for step in range(5, 12)]
    with Prefetcher(batches(**options), 5, 12, workers=workers) as prefetched:
        got = list(prefetched)
    assert [step for step, _ in got] == list(range(5, 12))
    for (_, micro), (_, expected) in zip(got, plain, strict=True):
        assert [k for k, _ in micro] == [k for k, _ in expected]
        for (_, examples), (_, others) in zip(micro, expected, strict=True):
            for a, b in zip(examples, others, strict=True):
                assert a.keys() == b.keys()
                assert all(a[key].tobytes() == b[key].tobytes() and a[key].dtype == b[key].dtype for key in a)
    assert not children_serving()


def test_steps_come_in_order_from_processes_that_signals_do_not_reach():
    def work():
        loader, _ = crew(who, range(6), workers=2)
        return list(loader.prepared())

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    found = in_a_thread(work)
    assert [step for step, _ in found] == list(range(6))
    pids = [pid for _, (pid, _) in found]
    assert pids == pids[:2] * 3
    assert len(set(pids) | {os.getpid()}) == 3
    for _, (_, blocked) in found:
        assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} <= set(blocked)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert not any(psutil.pid_exists(pid) for pid in set(pids))


def test_fewer_steps_than_processes_and_none_at_all():
    assert in_a_thread(lambda: list(crew(doubled, range(3, 4), workers=5)[0].prepared())) == [(3, 6)]
    assert in_a_thread(lambda: list(crew(doubled, range(0), workers=2)[0].prepared())) == []


def test_an_error_comes_back_as_it_was_and_in_its_turn():
    loader = crew(refusing_seven, range(4, 12))[0]
    got = []

    def work():
        for step, _ in loader.prepared():
            got.append(step)

    with pytest.raises(DataError, match=r"books\.txt:3") as caught:
        in_a_thread(work)
    assert caught.value.hint == "mend it"
    assert got == [4, 5, 6]
    with pytest.raises(RuntimeError, match="no such key"):
        in_a_thread(lambda: list(crew(bug, range(2))[0].prepared()))


def children_serving():
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize("of_step", [endless, large])
def test_a_killed_process_is_an_error_that_says_so(of_step):
    """In the middle of its work; and in the middle of a message, the pipe being full."""
    loader, _ = crew(of_step, range(100), workers=2)

    def work():
        steps = loader.prepared()
        if of_step is large:
            next(steps)
            victim = loader._crew[1][0]
            eventually(lambda: loader._crew[1][1].poll(0))
        else:
            loader._start()
            victim = loader._crew[0][0]
        os.kill(victim.pid, signal.SIGKILL)
        return list(steps)

    with pytest.raises(RunError, match=r"was killed by SIGKILL before it had made step") as caught:
        in_a_thread(work)
    assert "`machine.loader_workers: 2`" in str(caught.value)
    assert "out of memory" in caught.value.hint
    eventually(lambda: not children_serving())


def test_a_process_killed_in_its_last_message_is_an_error_that_says_so():
    """It has been asked for nothing more, so the system tells it otherwise than in the middle of a run."""
    loader, _ = crew(large, range(2))

    def work():
        steps = loader.prepared()
        next(steps)
        eventually(lambda: loader._crew[1][1].poll(0))
        os.kill(loader._crew[1][0].pid, signal.SIGKILL)
        return list(steps)

    with pytest.raises(RunError, match=r"was killed by SIGKILL before it had made step 2"):
        in_a_thread(work)


@pytest.mark.parametrize("of_step", [doubled, large])
def test_a_stopped_process_is_given_up_and_named(of_step):
    """Between two steps; and in the middle of a message, which is then waited for."""
    loader, _ = crew(of_step, range(100), stopped_s=0.5)
    victim = []

    def work():
        steps = loader.prepared()
        next(steps)
        eventually(lambda: loader._crew[1][1].poll(0))
        victim.append(loader._crew[1][0].pid)
        os.kill(victim[0], signal.SIGSTOP)
        return list(steps)

    with pytest.raises(RunError, match=r"was stopped for \d+ s \(SIGSTOP, or a debugger\)") as caught:
        in_a_thread(work)
    assert f"(pid {victim[0]}, one of `machine.loader_workers: 2`)" in str(caught.value)
    assert "out of memory" not in str(caught.value)
    assert not children_serving()


def test_a_process_that_goes_on_in_time_is_left_alone():
    loader, _ = crew(doubled, range(20), stopped_s=1000)

    def work():
        steps = loader.prepared()
        got = [next(steps)]
        victim = loader._crew[1][0].pid
        os.kill(victim, signal.SIGSTOP)
        threading.Timer(1.0, os.kill, (victim, signal.SIGCONT)).start()
        return got + list(steps)

    assert in_a_thread(work) == [(step, 2 * step) for step in range(20)]
    assert not [thread for thread in threading.enumerate() if thread.name == "watch-loaders"]


def test_leaving_does_not_wait_for_a_process_that_is_busy():
    before = threading.active_count()
    loader = batches(encode=endless)
    with Prefetcher(loader, 0, workers=2):
        eventually(lambda: len(children_serving()) == 2)
    assert threading.active_count() == before
    assert not children_serving()


def test_a_stream_opens_its_files_itself_in_another_process(tmp_path):
    tokens = np.arange(100_000, dtype=np.uint16)
    np.save(tmp_path / "train-00000.npy", tokens[:60_000])
    np.save(tmp_path / "train-00001.npy", tokens[60_000:])
    np.save(tmp_path / "train-documents.npy", np.array([0, 70_000]))
    counts = SplitCounts(documents=2, tokens=100_000, bytes=5, tokens_per_file=60_000)
    sent = pickle.dumps(TokenStream(tmp_path, "train", "books", counts))
    assert len(sent) < 1000
    got = pickle.loads(sent)
    assert np.array_equal(got.read(59_000, 61_000), tokens[59_000:61_000])
    assert got.document_starts(0, 100_000).tolist() == [0, 70_000]
    assert (got.name, got.num_bytes, got.num_documents) == ("books", 5, 2)


TRAINER = """
import os, signal, sys, threading, time
sys.path[:0] = {paths!r}
import psutil
from llmkit.data.loader import Prefetcher
from loading import batches

if __name__ == "__main__":
    got = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: got.append(number))
    with Prefetcher(batches(), 0, 1000, workers=2) as prefetched:
        steps = iter(prefetched)
        print("started", flush=True)
        while len(got) < 3:
            time.sleep(0.01)
            number, _ = next(steps)
        print("signals", sorted(got), flush=True)
        for _ in range(20):
            number, _ = next(steps)
        children = [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]
        print("step", number >= 19, *[child.pid for child in children], flush=True)
        time.sleep(3600)
"""


def trainer(tmp_path):
    script = tmp_path / "trainer.py"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    script.write_text(TRAINER.format(paths=paths))
    return subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_signals_to_the_whole_group_reach_the_trainer_alone_and_its_death_ends_all(tmp_path):
    with trainer(tmp_path) as process:
        try:
            assert process.stdout.readline() == "started\n"
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.killpg(process.pid, number)  # from the first moment on, while processes start
            assert json.loads(process.stdout.readline().removeprefix("signals")) == [2, 10, 15]
            word, later, *pids = process.stdout.readline().split()
            assert (word, later, len(pids)) == ("step", "True", 2)
        finally:
            process.kill()
    eventually(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids))
