"""A teacher that is asked once: any number of processes, a kill at any time, and one that is always asked agree."""

import json
from pathlib import Path

import objectives
import pytest
import training
import tuning
from sessions import Point, shared_server
from training import losses, same_bits, weights

SHORT = {
    "pretrain__train__length": "6 steps",
    "pretrain__checkpoint": {"every": "2 steps", "keep": 10},
    "pretrain__eval": {"every": "3 steps", "rows": 20},
    "pretrain__prompts": [],
}
ALL = 100_000
"""More outputs than there are."""


class Text:
    """An objective on text: each training position is kept by itself."""

    def __init__(self, folder, objective):
        self.folder = folder
        self.changes = {**objectives.changes(objective), **SHORT}

    def words(self, runs, name, *more, **distil):
        changes = {**self.changes, **({"pretrain__distil": distil} if distil else {})}
        return [*training.command(self.folder, name, *more, **changes)[3:5], "--runs", str(runs), *more]

    def place(self, runs, name):
        return runs / name / "pretrain"


class Labelled:
    """A task on labelled rows: each row is kept."""

    def __init__(self, folder, task):
        self.folder, self.task = folder, task

    def words(self, runs, name, *more, **distil):
        changes = {"finetune__distil": distil} if distil else {}
        given = tuning.words(self.folder, self.task, name, *more, **changes)
        return [*given[:2], "--runs", str(runs), *more]

    def place(self, runs, name):
        return runs / name / "finetune"


KINDS = {"clm": Text, "mlm": Text, "sft": Labelled, "cls": Labelled}


def done(kind, runs, name, *more, **distil):
    ended = shared_server().run(kind.words(runs, name, *more, **distil))
    assert ended.code == 0, ended.said
    return kind.place(runs, name), ended.said


def kept(runs):
    """Every file of the caches of teachers, by name."""
    folder = runs / ".cache" / "teacher"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_with_all_kept_it_is_the_teacher_that_is_always_asked_whatever_happens(in_memory, name):
    folder = Path(in_memory)
    kind, runs = KINDS[name](folder, name), folder / "runs"
    teacher, _ = done(kind, runs, "teacher")
    distil = {"teacher": str(teacher), "weight": 0.6, "temperature": 2.0}
    live, _ = done(kind, runs, "live", **distil)
    distil["cache"] = {"top_k": ALL}
    whole, said = done(kind, runs, "whole", **distil)
    assert "the teacher is asked of" in said
    one, other = losses(live), losses(whole)
    assert one.keys() == other.keys()
    assert max(abs(one[step] - other[step]) for step in one) < 1e-5
    assert len(set(one.values())) > 3
    made = kept(runs)
    assert len(made) == 5
    assert sum(map(len, made.values())) == pytest.approx(planned(whole), rel=0.2, abs=1500)
    (place,) = runs.glob(".cache/teacher/*/part-*")
    stamp = place.stat().st_ino
    again, said = done(kind, runs, "again", **distil)
    assert "the teacher is not loaded" in said
    assert place.stat().st_ino == stamp  # nothing was made anew
    assert same_bits(weights(again), weights(whole))
    # Killed while it is written, then in a step; elsewhere, so that nothing is there.
    elsewhere = folder / "elsewhere"
    words = kind.words(elsewhere, "killed", **distil)
    for point in (
        Point("SIGKILL", "door", name="fsync", path="part-000000"),
        Point("SIGKILL", "update", step=3),
    ):
        ended = shared_server().run(words, point)
        assert ended.code == -9, ended.said
        assert bool(kept(elsewhere).get(next(iter(made)))) == (point.where == "update")
    killed, said = done(kind, elsewhere, "killed", **distil)
    assert "from step_00000002" in said
    assert kept(elsewhere) == made
    assert same_bits(weights(killed), weights(whole))
    assert losses(killed) == losses(whole)


def planned(folder):
    return json.loads((folder / "plan.json").read_text())["teacher_cache"]["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_two_processes_equal_one_and_keep_the_same(in_memory, name):
    folder = Path(in_memory)
    kind, runs, elsewhere = KINDS[name](folder, name), folder / "runs", folder / "elsewhere"
    teacher, _ = done(kind, runs, "teacher")
    distil = {"teacher": str(teacher), "weight": 0.6, "cache": {"top_k": 8}}
    even = ["machine.micro_batch=4"] if isinstance(kind, Text) else []
    place, _ = done(kind, runs, "one", *even, **distil)
    two, _ = done(kind, elsewhere, "two", "--processes", "2", *even, **distil)
    assert json.loads((two / "plan.json").read_text())["world_size"] == 2
    assert kept(elsewhere) == kept(runs)
    if name in ("mlm", "clm"):  # without padding, so that dropout's masks go by the rows alone
        one, other = losses(place), losses(two)
        assert max(abs(one[step] - other[step]) for step in one) < 1e-5


@pytest.mark.slow
def test_a_signal_while_the_teacher_is_asked_is_an_interruption_that_goes_on(in_memory):
    folder = Path(in_memory)
    kind, runs = Text(folder, "clm"), folder / "runs"
    teacher, _ = done(kind, runs, "teacher")
    distil = {"teacher": str(teacher), "cache": {"top_k": 8}}
    point = Point("SIGTERM", "phase", name="teach")
    ended = shared_server().run(kind.words(runs, "student", **distil), point)
    assert ended.code == 75, ended.said
    assert "while the teacher was asked" in ended.said
    assert "--processes" not in ended.said
    done(kind, runs, "student", **distil)
