"""`llmkit verify-resume` passes a run that resumes exactly, and finds one that does not."""

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sessions
from safetensors.numpy import load_file, save_file
from training import recipe

from llmkit.cli import main
from llmkit.errors import CorruptError, GateError, RunError, UsageError
from llmkit.launch.crew import Worker
from llmkit.report.console import make_reporter
from llmkit.run import Options
from llmkit.run.compare import (
    compare_records,
    compare_runs,
    compare_samples,
    compare_tensors,
    distance_moved,
    read_tensors,
)
from llmkit.run.verify import TOLERANCES, Verified, _Trial, verify_resume

SERVER = f"""
# As sessions.py, but that runs can have what exact runs must not: where HISTORY is in the environment, dropout seeds
# follow from how often this process has asked for one.
import itertools, os, sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
import llmkit.train.state as state
real, asked = state.mix_seed, itertools.count()
state.mix_seed = lambda *parts: real(parts[0], next(asked)) if "HISTORY" in os.environ else real(*parts)
import sessions
sessions.serve(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Runs what verify-resume starts: real processes, killed in earnest, but forked from one that has imported all."""
    folder = tmp_path_factory.mktemp("server")
    program = folder / "server.py"
    program.write_text(SERVER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "__file__", str(program))
        made = sessions.Server(folder)
    with made:
        yield made


@dataclass
class Over:
    """A process that has ended."""

    returncode: int

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        return self.returncode


@pytest.fixture
def verified(project, server, monkeypatch, capfd):
    """`llmkit verify-resume` in this process, its runs in the server's: exit code, stdout, stderr."""

    def start(words, env, log):
        ended = server.run(words[words.index("llmkit") + 1 :], env={**history, **env})
        log.write(ended.said.encode())
        return Over(ended.code)

    history = {}

    def verify(*words, with_history=False):
        history.update({"HISTORY": "1"} if with_history else {})
        code = main(["verify-resume", str(project), "--runs", str(project.parent / "runs"), *words])
        return code, *capfd.readouterr()

    monkeypatch.setattr("llmkit.run.verify._start", start)
    return verify


@pytest.fixture
def project(tmp_path):
    """A recipe file with dropout; what its runs leave is in `runs`."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(recipe(tmp_path)))
    return path


def left_in(runs):
    return sorted(path.name for path in runs.iterdir())


ALL = {
    "losses": "8 records",
    "held-out": "3 records",
    "weights": "20 tensors",
    "optimizer": "60 tensors",
    "export": "20 tensors",
    "samples": "3 texts",
}


@pytest.mark.slow
def test_an_exact_run_passes_and_leaves_nothing_but_the_prepared_text(project, llmkit):
    done = llmkit("verify-resume", project.name, "--steps", "8", "--json", cwd=project.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"]
    assert (found["steps"], found["killed_at"]) == (8, 7)
    assert found["resumed_from"] in (4, 6)
    assert all(one["same"] for one in found["resumed"])
    assert {one["what"]: one["compared"] for one in found["resumed"]} == ALL
    assert left_in(project.parent / "runs") == [".cache"]


def test_a_run_with_a_history_is_found_and_kept(project, verified):
    code, out, err = verified("--steps", "8", with_history=True)
    assert code == 4, err
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert all("DIFFERS" in lines[what] for what in ("losses", "weights", "optimizer", "export"))
    assert re.search("from step [457] on", err), err  # 4: the sample of that step is made again
    assert "weights: lm_head" in err or "weights: model." in err, err
    kept = project.parent / "runs" / "tiny" / "verify-resume"
    assert str(kept) in err
    assert left_in(kept) == ["killed", "whole"]
    assert (kept / "whole" / "tiny" / "pretrain" / "model" / "model.safetensors").is_file()


def test_what_there_is_none_of_is_not_said_to_be_the_same(verified):
    code, out, err = verified("--steps", "8", "pretrain.prompts=[]")
    assert code == 0, err
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert "nothing to compare" in lines["samples"]
    assert all("same bits" in lines[what] for what in ALL if what != "samples")


ELSEWHERE = ("--steps", "8", "--other-processes", "2", "--json", "machine.micro_batch=2")


def test_on_another_number_of_processes_all_is_equal_to_rounding(verified):
    code, out, err = verified(*ELSEWHERE)
    assert code == 0, err
    found = json.loads(out)
    assert found["other_processes"] == 2
    apart = {one["what"]: one["apart"] for one in found["elsewhere"]}
    for what in ("losses", "weights", "optimizer", "export"):
        assert 0 < apart[what] <= found["tolerances"][what] / 10, apart


@pytest.mark.slow
def test_on_another_number_of_processes_too_a_history_is_found(verified):
    code, out, _ = verified(*ELSEWHERE, with_history=True)
    assert code == 4
    found = json.loads(out)
    apart = {one["what"]: one["apart"] for one in found["elsewhere"]}
    for what in ("weights", "optimizer", "export"):
        assert apart[what] > found["tolerances"][what] * 2, apart


@pytest.mark.slow
def test_a_killed_worker_of_several_counts_as_the_kill(verified):
    code, out, err = verified("--steps", "8", "--processes", "2", "--json", "machine.micro_batch=4")
    assert code == 0, err
    assert json.loads(out)["processes"] == 2


def test_a_run_that_fails_by_itself_says_why(project, verified):
    code, _, err = verified("pretrain.train.optim.lr=1e30", "pretrain.train.grad_clip=null")
    assert code == 1
    assert "1 of 3: without a break: the run ended by itself with exit code 1" in err
    assert "not finite" in err
    assert left_in(project.parent / "runs") == [".cache"]


@pytest.mark.parametrize(
    ("word", "changes", "said"),
    [
        ("-", {}, "stdin cannot hold it"),
        ("tiny.json", {"steps": 7}, "--steps 7: at least 8"),
        ("tiny.json", {"other_processes": 3}, "cannot share the 8 rows"),
    ],
)
def test_what_cannot_be_verified_is_refused_before_anything_runs(project, monkeypatch, word, changes, said):
    monkeypatch.chdir(project.parent)
    monkeypatch.setattr("llmkit.run.verify.load_recipe", load_anything(project))
    with pytest.raises(UsageError, match=said):
        verify_resume(word, (), Options(), make_reporter(quiet=True), **{"steps": 8, **changes})
    assert not (project.parent / "runs").exists()


def load_anything(project):
    from llmkit.recipe import load_recipe

    return lambda *_, **words: load_recipe(project, **words)


# The comparison.


def folder_of(path, tensors, records=(), samples=()):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    for name, rows in (("metrics.jsonl", records), ("samples.jsonl", samples)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros(4, np.float32),
    "c": np.arange(3),
}


@pytest.mark.parametrize(
    ("change", "first", "largest"),
    [
        ({}, "", 0.0),
        ({"b": np.float32([0, 0, -0.0, 0])}, "b differs by 0.00e+00", 0.0),
        ({"b": np.float32([0, 0, 0.5, 0])}, "b differs by 5.00e-01", 0.5),
        ({"a": TENSORS["a"] + 2, "b": np.ones(4, np.float32)}, "a differs by 2.00e+00, and 1 more", 2.0),
        ({"b": np.float32([0, 0, np.nan, 0])}, "b differs by inf", math.inf),
        ({"b": np.zeros(4, np.float16)}, "b differs by inf", math.inf),
        ({"a": TENSORS["a"].reshape(3, 2)}, "a differs by inf", math.inf),
        ({"c": np.array([0, 1, 3])}, "c differs by inf", math.inf),
        ({"d": np.zeros(1)}, "only one of the runs has d", math.inf),
    ],
)
def test_every_bit_of_a_tensor_counts(tmp_path, change, first, largest):
    one = folder_of(tmp_path / "one", TENSORS)
    other = folder_of(tmp_path / "other", {**TENSORS, **change})
    found = compare_tensors(one, other, what="weights", files="model*.safetensors")
    assert (found.first, found.largest, found.same) == (first, largest, not first)


def test_bfloat16_is_compared_as_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save

    for name, value in (("one", 1.0), ("other", 1.5)):
        (tmp_path / name).mkdir()
        save({"a": torch.full((3,), value, dtype=torch.bfloat16)}, tmp_path / name / "model.safetensors")
    found = compare_tensors(tmp_path / "one", tmp_path / "other", what="weights", files="*.safetensors")
    assert found.largest == 0.5


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = folder_of(tmp_path / "one", TENSORS)
    (folder / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{nope")
    with pytest.raises(CorruptError, match=r"model\.safetensors: not readable"):
        read_tensors(folder, "model*.safetensors")
    with pytest.raises(CorruptError, match="there is no optimizer"):
        read_tensors(folder, "optimizer*.safetensors")


RECORDS = [{"step": s, "elapsed_s": s * 1.5, "train/loss": 5.0 - s, "train/lr": 0.1} for s in (1, 2, 3)]


@pytest.mark.parametrize(
    ("change", "first", "step"),
    [
        ({"elapsed_s": 99.0, "tokens_per_s": 1.0}, "", None),
        ({"train/loss": 3.5}, "step 2: train/loss is 3.0 and 3.5", 2),
        ({"train/lr": 0.2}, "step 2: train/lr is 0.1 and 0.2", 2),
        ({"train/loss": None}, "step 2: train/loss is 3.0 and None", 2),
        ({"step": 7}, "of step 2 one of the runs has 1 and the other 0 records", 2),
        ({"step": 3}, "of step 2 one of the runs has 1 and the other 0 records", 2),
        ({"train/new": 1.0}, "step 2: train/new is None and 1.0", 2),
    ],
)
def test_every_figure_but_times_counts(tmp_path, change, first, step):
    one = folder_of(tmp_path / "one", TENSORS, RECORDS)
    other = folder_of(tmp_path / "other", TENSORS, [RECORDS[0], {**RECORDS[1], **change}, RECORDS[2]])
    found = compare_records(one, other, what="losses", key="train/loss")
    assert (found.first, found.step) == (first, step)
    assert found.compared == "3 records"


def test_a_record_written_twice_is_found(tmp_path):
    one = folder_of(tmp_path / "one", TENSORS, RECORDS)
    other = folder_of(tmp_path / "other", TENSORS, [*RECORDS[:2], *RECORDS[1:]])
    found = compare_records(one, other, what="losses", key="train/loss")
    assert found.first == "of step 2 one of the runs has 1 and the other 2 records"
    assert found.unlike


def test_what_neither_run_has_is_not_the_same(tmp_path):
    folders = [finished(tmp_path / name, 2.0, records=(), samples=()) for name in ("one", "other")]
    found = {one.what: one for one in compare_runs(*folders, 8)}
    assert found["losses"].first == "neither run has recorded one"
    assert not found["losses"].same
    assert found["held-out"].to_dict()["same"] is None
    assert found["samples"].to_dict()["same"] is None
    assert found["weights"].to_dict()["same"] is True
    save_file({}, folders[0] / "model" / "model.safetensors")
    with pytest.raises(CorruptError, match="holds no tensor"):
        compare_runs(*folders, 8)


def test_samples_are_compared_in_order(tmp_path):
    made = [{"step": 4, "prompt": "a", "text": "b"}, {"step": 8, "prompt": "a", "text": "c"}]
    one = folder_of(tmp_path / "one", TENSORS, samples=made)
    assert compare_samples(one, one).same
    other = folder_of(tmp_path / "other", TENSORS, samples=[made[0], {**made[1], "text": "d"}])
    assert compare_samples(one, other).step == 8
    shutil.rmtree(other)
    assert not compare_samples(one, folder_of(tmp_path / "other", TENSORS, samples=made[:1])).same


FACTS = {"steps": 8, "saved_at": 4, "killed_at": 7, "processes": 1, "resumed": [], "other_processes": 2}


def test_elsewhere_counts_what_has_a_tolerance(tmp_path):
    one = folder_of(tmp_path / "one", TENSORS, RECORDS)
    near = folder_of(
        tmp_path / "near", TENSORS, [{**row, "train/loss": row["train/loss"] * 1.00001} for row in RECORDS]
    )
    finding = compare_records(one, near, what="losses", key="train/loss")
    within = Verified(**FACTS, elsewhere=[finding], tolerances={"losses": 1e-4})
    within.check()
    with pytest.raises(GateError, match=r"from step 1 on: losses: step 1: train/loss is 4\.0"):
        Verified(**FACTS, elsewhere=[finding], tolerances={"losses": 1e-6}).check()
    with pytest.raises(GateError):
        Verified(**{**FACTS, "resumed": [finding]}, elsewhere=[], tolerances={"losses": 1.0}).check()


MOMENTS = {f"{kind}.a": np.full(100, size, np.float32) for kind, size in (("exp_avg", 1.0), ("step", 8.0))}


def finished(path, weight, *, records=RECORDS, samples=({"step": 8, "prompt": "a", "text": "b"},), **tensors):
    """A run folder of 8 steps whose 100 weights were 1 at step 4 and are `weight` in the end."""
    weights = {"a": np.full(100, weight, np.float32), **tensors}
    folder_of(path, TENSORS, records, samples)
    for name, content in (
        ("checkpoints/step_00000004/model", {name: np.ones_like(tensor) for name, tensor in weights.items()}),
        ("checkpoints/step_00000008/model", weights),
        ("checkpoints/step_00000008/optimizer", MOMENTS),
        ("model/model", weights),
    ):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(content, path / f"{name}.safetensors")
    return path


def elsewhere(one, other):
    moved = distance_moved(*(other / "checkpoints" / f"step_{step:08d}" for step in (4, 8)))
    findings = compare_runs(one, other, 8, moved=moved)
    return Verified(**FACTS, elsewhere=findings, tolerances=TOLERANCES["fp32"])


@pytest.mark.parametrize(
    ("one", "other", "passes"),
    [(1.1, 1.1005, True), (1.1, 1.102, False), (1.0 + 2**-23, 1.0, True), (1.00001, 1.0, False)],
)
def test_elsewhere_weights_may_differ_by_a_share_of_what_training_moved_them(tmp_path, one, other, passes):
    found = elsewhere(finished(tmp_path / "one", one), finished(tmp_path / "other", other))
    names = [finding.what for finding in found.wrong]
    assert names == ([] if passes else ["weights", "export"])
    assert all(finding.first for finding in found.elsewhere if finding.what in ("weights", "export"))


@pytest.mark.parametrize("what", ["weights", "optimizer", "export", "samples"])
def test_elsewhere_too_what_is_missing_fails(tmp_path, what):
    one, other = (finished(tmp_path / name, 1.5, b=np.ones(3, np.float32)) for name in ("one", "other"))
    assert not elsewhere(one, other).wrong
    if what == "samples":
        (other / "samples.jsonl").write_text("")
    else:
        place = {"export": "model/model", "weights": "checkpoints/step_00000008/model"}.get(what)
        path = other / f"{place or 'checkpoints/step_00000008/optimizer'}.safetensors"
        tensors = dict(load_file(path))
        del tensors["step.a" if what == "optimizer" else "b"]
        save_file(tensors, path)
    found = elsewhere(one, other)
    assert [finding.what for finding in found.wrong] == [what]
    with pytest.raises(GateError, match=f"{what}: "):
        found.check()


# The kill.


class FakeTrial(_Trial):
    """Its run is not made: it left `records` and checkpoints, and ended with `code`."""

    code, said, last = -9, "", 755

    def _run(self, which, doing, env):
        folder = self.folder(which)
        for name in ("step_00000500", "step_00000750", "step_00000999.bak"):
            (folder / "checkpoints" / name).mkdir(parents=True)
        records = [{"step": step, "train/loss": 1.0} for step in range(5, self.last + 1, 5)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        self._log(which).write_text(self.said)
        return self.code


def trial(folder):
    return FakeTrial(folder, Options(), "x.yaml", [], "x", 1000, make_reporter(quiet=True))


def test_the_kill_may_come_at_the_next_step_whose_figures_are_recorded(tmp_path):
    assert trial(tmp_path).kill_at == 751
    assert trial(tmp_path).kill("killed") == (755, 750)


@pytest.mark.parametrize(
    ("code", "last", "said"),
    [
        (0, 1000, ""),
        (1, 755, "out of disk"),
        (-15, 755, ""),
        (-9, 750, ""),
        (1, 755, "worker 1 failed with exit code 1"),
    ],
)
def test_another_end_than_the_kill_is_an_error(tmp_path, monkeypatch, code, last, said):
    for name, value in (("code", code), ("last", last), ("said", said)):
        monkeypatch.setattr(FakeTrial, name, value)
    with pytest.raises(RunError, match=f"ended by itself with exit code {code}"):
        trial(tmp_path).kill("killed")


def test_a_killed_worker_is_known_by_the_launchers_words(tmp_path, monkeypatch):
    worker = Worker(1, SimpleNamespace(returncode=-9, poll=lambda: -9), None, 0)
    monkeypatch.setattr(FakeTrial, "code", 1)
    monkeypatch.setattr(FakeTrial, "said", f"worker 1 {worker.how_it_ended()}")
    assert trial(tmp_path).kill("killed") == (755, 750)
