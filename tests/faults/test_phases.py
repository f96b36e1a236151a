"""Whatever a run does when it is asked to stop: it saves once, tells by its exit code, and goes on to the same bits.

The signal is sent by the run itself, at a place that is always the same; see `sessions.Point`.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from matrix import NUM_STEPS, RECIPE, Run, step_of
from sessions import Point, shared_server
from training import same_bits, start, weights

from llmkit.launch import signals

CODES = {"SIGTERM": 75, "SIGINT": 130, "SIGUSR1": 75}
STOPS = pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
ONLY_WHEN_STOPPED = {**RECIPE, "pretrain__checkpoint": {"every": "never"}}
TWO = ("--processes", "2")


@pytest.fixture(scope="module")
def place():
    """A folder whose runs share their text."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="llmkit-test-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def server():
    return shared_server()


@pytest.fixture(scope="module")
def runs(server, place):
    """A function that makes a run, and runs that nothing happens to, by their number of processes."""
    whole = {}

    def make(name, *words, **changes):
        shutil.rmtree(place / "runs" / name, ignore_errors=True)
        return Run(server, place, name, ["machine.micro_batch=6", *words], {**ONLY_WHEN_STOPPED, **changes})

    def uninterrupted(*words):
        if words not in whole:
            run = make(f"whole-{len(whole)}", *words)
            run.tokenize()
            assert run().code == 0
            whole[words] = run
        return whole[words]

    return make, uninterrupted


def assert_saved_at(run, ended, step, there_before=()):
    """The one new checkpoint is of the step that all agreed on."""
    new = set(run.whole_checkpoints()) - set(there_before)
    assert new == {f"step_{step:08d}"}, ended.said
    assert f"after step {step}; everything is saved" in ended.said


def assert_goes_on(run, whole):
    ended = run()
    assert ended.code == 0, ended.said
    assert "is damaged" not in ended.said
    assert same_bits(weights(run.folder), weights(whole.folder))
    assert run.record() == whole.record()
    assert run.order() == whole.order()


PLACES = {
    "before the first step": (Point("", "phase", "prove"), 0),
    "amid a step": (Point("", "update", step=3), 4),
    "amid an evaluation": (Point("", "batch", step=6), 6),
    "amid the last measurement": (Point("", "batch", step=NUM_STEPS), NUM_STEPS),
}


@STOPS
@pytest.mark.parametrize("when", PLACES)
def test_asked_to_stop_it_saves_once_and_goes_on(runs, when, name):
    make, uninterrupted = runs
    whole, run = uninterrupted(), make("stopped", "--no-self-check")
    point, step = PLACES[when]
    ended = run(replace(point, do=name))
    assert ended.code == CODES[name], ended.said
    assert_saved_at(run, ended, step)
    assert step not in run.record()[1], "an evaluation that is left amid leaves no figure"
    assert_goes_on(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", PLACES)
def test_so_do_two_processes_of_which_one_is_asked(runs, when, rank):
    """Only the first process has phases; the other one gets its signal before the first update."""
    make, uninterrupted = runs
    whole, run = uninterrupted(*TWO), make("stopped", "--no-self-check", *TWO)
    point, step = PLACES[when]
    ended = run(replace(point, do="SIGUSR1", rank=0 if point.where == "phase" else rank))
    assert ended.code == 75, ended.said
    assert_saved_at(run, ended, step)
    assert_goes_on(run, whole)


@STOPS
def test_asked_while_a_checkpoint_is_being_written_that_one_is_finished_too(runs, name):
    """The writer is held until the training thread has noticed and waits for it."""
    make, uninterrupted = runs
    often = {"every": "2 steps", "keep": 100}
    whole, run = uninterrupted(), make("stopped", "--no-self-check", pretrain__checkpoint=often)
    ended = run(Point(f"hold {name}", "door", name="rename", path="/step_00000002"))
    assert ended.code == CODES[name], ended.said
    assert "step_00000002" in run.whole_checkpoints()
    newest = step_of(run.whole_checkpoints()[-1])
    assert newest in (2, 3), "the step under way is finished, no other one is begun"
    assert f"after step {newest}; everything is saved" in ended.said
    assert_goes_on(run, whole)


@STOPS
def test_asked_while_the_model_is_exported_it_gets_done(runs, name):
    make, uninterrupted = runs
    run = make("stopped", "--no-self-check")
    ended = run(Point(name, "phase", "export"))
    assert ended.code == 0, ended.said
    assert same_bits(weights(run.folder), weights(uninterrupted().folder))


@STOPS
@pytest.mark.parametrize("phase", ["tokenizer", "encode"])
def test_asked_while_text_is_prepared_it_leaves_and_nothing_half_made_is_used(
    server, runs, tmp_path, name, phase
):
    _, uninterrupted = runs
    run = Run(server, tmp_path, "stopped", ["machine.micro_batch=6", "--no-self-check"], ONLY_WHEN_STOPPED)
    at = {
        "tokenizer": Point(name, "phase", "tokenizer"),
        "encode": Point(name, "door", name="rename", path="/.cache/", nth=2),
    }
    ended = run(at[phase])
    assert ended.code == CODES[name], ended.said
    assert "what was complete is kept" in ended.said
    assert run.whole_checkpoints() == []
    assert run().code == 0
    assert same_bits(weights(run.folder), weights(uninterrupted().folder))


IMPORTING = """
import os, signal, sys
from llmkit.cli import main

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))

sys.meta_path.insert(0, Hook())
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy", "SIGTERM"),
        ("torch", "SIGINT"),
        ("torch.optim", "SIGTERM"),
        ("transformers.modeling_utils", "SIGTERM"),
        ("transformers.models.llama.modeling_llama", "SIGINT"),
        ("accelerate", "SIGTERM"),
    ],
)
def test_asked_while_it_imports_it_leaves(runs, module, name):
    """The text is prepared already, so that it is training that imports."""
    make, uninterrupted = runs
    uninterrupted()
    words = [sys.executable, "-c", IMPORTING, module, name, *make("importing").words]
    process = start(words, PYTHONPATH=str(Path(__file__).parents[2]))
    _, said = process.communicate(timeout=240)
    assert process.returncode == CODES[name], said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_asked_at_any_function_it_stops_and_goes_on(runs):
    """From the command line's first functions to the last: the signal comes while Python calls the n-th function."""
    make, uninterrupted = runs
    whole, run = (
        uninterrupted(),
        make("stopped", "--no-self-check", pretrain__checkpoint={"every": "2 steps"}),
    )
    codes = []
    for nth in (*range(500, 20_000, 1_800), *range(20_000, 1_000_000, 8_000)):
        ended = run(Point("SIGTERM", "function", nth=nth))
        assert ended.code in (0, 75), (nth, ended.said)
        codes.append(ended.code)
        if ended.code == 0:
            break
    assert len(codes) > 12
    assert_goes_on(run, whole)


def test_when_its_time_is_up_it_saves_and_goes_on(runs):
    make, uninterrupted = runs
    whole, run = uninterrupted(), make("timed", "--no-self-check", "--max-time", "10h")
    for where, step in ((Point("", "update", step=2), 3), (Point("", "batch", step=6), 6)):
        before = run.whole_checkpoints()
        ended = run(replace(where, do="time is up"))
        assert ended.code == 75, ended.said
        assert f"stopped by --max-time after step {step}" in ended.said
        assert_saved_at(run, ended, step, before)
    assert_goes_on(run, whole)


def test_a_time_too_short_for_a_single_step_is_an_error_or_a_loop_that_starts_it_again_would_never_end(runs):
    make, uninterrupted = runs
    ended = (run := make("timed", "--no-self-check", "--max-time", "1s"))()
    assert ended.code == 1, ended.said
    assert "--max-time is too short for a single step" in ended.said
    assert not run.whole_checkpoints()
    assert_goes_on(make("timed", "--no-self-check"), uninterrupted())


def age_backwards(folder):
    """Let every file look the older the later it was written."""
    paths = sorted(folder.rglob("*"), key=lambda path: path.stat().st_mtime_ns)
    for number, path in enumerate(reversed(paths)):
        os.utime(path, (number, number))


def test_which_checkpoint_is_newest_never_depends_on_a_clock(runs):
    make, uninterrupted = runs
    whole, run = (
        uninterrupted(),
        make("clock", "--no-self-check", pretrain__checkpoint={"every": "2 steps", "keep": 2}),
    )
    assert run(LLMKIT_KILL_AT="7").code == -9
    assert (
        run(Point("SIGTERM", "phase", "prove")).code == 75
    )  # a save that was under way may be gone; this sweeps
    age_backwards(run.folder / "checkpoints")
    newest = run.whole_checkpoints()[-1]
    ended = run(Point("SIGTERM", "phase", "prove"))
    assert f"from {newest}" in ended.said
    age_backwards(run.folder / "checkpoints")
    assert_goes_on(run, whole)
    assert run.whole_checkpoints() == ["step_00000010", "step_00000012"]


@pytest.mark.slow
def test_a_clock_that_is_put_back_an_hour_changes_nothing(runs):
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed (apt install faketime)")
    make, uninterrupted = runs
    whole, run = uninterrupted(), make("clock", pretrain__checkpoint={"every": "2 steps", "keep": 2})
    assert run(LLMKIT_KILL_AT="5").code == -9
    an_hour_ago = ["faketime", "-f", "-1h"]
    shown = subprocess.run([*an_hour_ago, "date", "+%s"], capture_output=True, text=True, check=True)
    assert int(shown.stdout) < (run.folder / "checkpoints").stat().st_mtime - 3000, "the clock is put back"
    killed = start([*an_hour_ago, sys.executable, "-m", "llmkit", *run.words], LLMKIT_KILL_AT="9")
    _, said = killed.communicate(timeout=240)
    assert "from step_0000000" in said
    *_, newest = run.whole_checkpoints()
    assert newest > "step_00000004", "the past has saved something"
    ended = run()
    assert f"from {newest}" in ended.said
    assert ended.code == 0, ended.said
    assert run.whole_checkpoints() == ["step_00000010", "step_00000012"]
    assert same_bits(weights(run.folder), weights(whole.folder))
    assert run.record() == whole.record()


def test_a_signal_whose_exception_was_lost_in_a_destructor_is_obeyed_when_training_begins():
    noted = signals.NOTED
    noted.append(signal.SIGUSR1)
    try:
        with signals.StopSignal() as stop:
            assert stop.asked() == signal.SIGUSR1
    finally:
        noted.clear()
    with signals.StopSignal() as stop:
        assert stop.asked() == 0
