"""The list of runs and the difference of two: from folders in every state, damaged ones too."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.cli import main
from llmkit.durable import RunLock, lock_holder
from llmkit.errors import MissingError, RunError
from llmkit.run.runs import find_run, find_runs
from llmkit.run.runs_diff import diff_runs, settings_of

RECIPE = """\
llmkit: 1
name: NAME
seed: 42
finetune:
  task: cls
  data:
    files: [rows.csv]
  train:
    length: 3 epochs  # as asked
    optim:
      lr: LR
  augment:
  - {method: swap, share: 0.1}
machine:
  processes: PROCESSES
"""


def stage(
    folder: Path,
    *,
    status: str = "done",
    final: dict[str, float] | None = None,
    made: str = "2026-01-02T03:04:05+00:00",
    steps: tuple[int, int] = (8, 8),
    lr: str = "5e-05",
    processes: int = 1,
    torch: str = "2.13.0",
    **more: object,
) -> Path:
    """What a verb leaves in its folder."""
    folder.mkdir(parents=True)
    step, num_steps = steps
    records = [{"step": n, "train/loss": 3.0, "elapsed_s": 2.0 * n} for n in range(1, step + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    text = RECIPE.replace("NAME", folder.parent.name).replace("LR", lr).replace("PROCESSES", str(processes))
    (folder / "resolved.yaml").write_text(text)
    report = {
        "kind": folder.name,
        "status": status,
        "made": made,
        "task": "cls",
        "headline": {"seconds": 2.0 * step, "num_steps": step},
        "final": final or {},
        "model": {"num_parameters": 1234},
        "plan": {"num_steps": num_steps, "world_size": processes},
        "environment": {"python": "3.11.7", "packages": {"torch": torch, "numpy": "2"}, "time": made},
        **more,
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    stage(root / "old" / "finetune", final={"eval/loss": 0.5, "eval/accuracy": 0.8, "eval/num_targets": 9.0})
    model = root / "old" / "finetune" / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"x" * 1000)
    stage(
        root / "new" / "finetune",
        final={"eval/loss": 0.6, "eval/accuracy": 0.9, "eval/num_targets": 9.0},
        made="2026-02-02T03:04:05+00:00",
        lr="1e-4",
        processes=2,
        torch="2.14.0",
    )
    return root


def test_what_the_list_says_of_each_run(runs: Path) -> None:
    stage(
        runs / "old" / "eval",
        final={"eval/accuracy": 0.75, "eval/loss": 0.7},
        made="2026-01-03T00:00:00+00:00",
        best="accuracy",
        figures={"accuracy": {"value": 0.75, "low": 0.7, "high": 0.8}},
    )
    stage(runs / "cut" / "finetune", status="interrupted", steps=(3, 8), made="2026-01-01T00:00:00+00:00")
    new, old, cut = find_runs(runs)
    assert [run.name for run in (new, old, cut)] == ["new", "old", "cut"]
    assert (new.status, old.status, cut.status) == ("done", "done", "interrupted")
    assert new.measured is not None
    assert (new.measured.best, new.measured.figures["accuracy"], new.loss) == ("accuracy", 0.9, 0.6)
    # What `llmkit eval` measured afterwards stands for the run, with its interval.
    assert old.to_dict()["metric"] == {
        "name": "accuracy", "value": 0.75, "stage": "eval", "low": 0.7, "high": 0.8,
    }  # fmt: skip
    assert (old.num_parameters, old.model_bytes, old.seconds) == (1234, 1000, 16.0)
    assert cut.trained is not None
    assert (cut.trained.step, cut.trained.num_steps) == (3, 8)
    assert cut.measured is None


def test_an_evaluation_of_an_older_model_does_not_stand_for_the_run(runs: Path) -> None:
    stage(runs / "old" / "eval", final={"eval/accuracy": 0.1}, made="2026-01-01T00:00:00+00:00")
    measured = find_run("old", runs).measured
    assert measured is not None
    assert (measured.name, measured.figures["accuracy"]) == ("finetune", 0.8)


def test_a_run_that_was_killed_has_no_report_and_is_told_by_its_records(runs: Path) -> None:
    folder = stage(runs / "killed" / "finetune", steps=(5, 8))
    (folder / "report.json").unlink()
    (folder / "plan.json").write_text('{"num_steps": 8}')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "eval/loss": 0.25, "eval/acc')  # cut short by the kill
    run = find_run("killed", runs)
    [only] = run.stages
    assert (run.status, only.step, only.num_steps, only.seconds) == ("interrupted", 5, 8, 10.0)


def test_a_held_lock_means_that_it_runs(runs: Path) -> None:
    assert lock_holder(runs / "old" / "finetune") is None
    with RunLock(runs / "old" / "finetune"):
        run = find_run("old", runs)
        assert run.status == "running"
        assert run.stages[0].said.startswith("pid ")
    assert find_run("old", runs).status == "done"


def test_looking_does_not_keep_a_run_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks holds the lock for a moment; a run that starts in it tries again before it gives up."""
    from llmkit.durable import locks

    (tmp_path / ".lock").touch()
    looking = (tmp_path / ".lock").open("rb")
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(locks.time, "sleep", lambda _: None)
    with pytest.raises(RunError, match="another run writes here"):
        RunLock(tmp_path).__enter__()
    monkeypatch.setattr(locks.time, "sleep", lambda _: looking.close())
    with RunLock(tmp_path):
        assert lock_holder(tmp_path) is not None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.json", b'{"status": "do'),
        ("report.json", b"[]"),
        ("report.json", b"\xff\xfe"),
        ("metrics.jsonl", b"no json\n"),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_listed(
    name: str, content: bytes, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "old" / "finetune" / name).write_bytes(content)
    assert main(["runs", "--runs", str(runs)]) == 0
    shown = capsys.readouterr()
    assert "new" in shown.out
    [line] = [line for line in shown.out.splitlines() if line.startswith("old")]
    assert " damaged " in line
    assert f"damaged: {runs / 'old' / 'finetune' / name}: " in shown.err


@pytest.mark.parametrize(
    "report", [{}, {"final": [1]}, {"final": {"eval/loss": None}}, {"plan": 3, "headline": ""}]
)
def test_a_report_of_another_form_is_no_crash(report: dict[str, object], runs: Path) -> None:
    (runs / "old" / "finetune" / "report.json").write_text(json.dumps({"status": "done", **report}))
    assert main(["runs", "--runs", str(runs)]) == 0
    assert main(["runs", "diff", "old", "new", "--runs", str(runs)]) == 0


def test_variants_and_trials_stand_indented_below_their_run(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, value in ((1, 0.5), (2, 0.6)):
        stage(runs / "search" / f"trial-00{number}" / "finetune", final={"eval/accuracy": value})
    trials = [{"name": "trial-002", "value": 0.6}, {"name": "trial-001", "value": 0.5}]
    report = {
        "kind": "sweep",
        "made": "2026-03-01T00:00:00+00:00",
        "metric": "eval/accuracy",
        "trials": trials,
    }
    (runs / "search" / "sweep").mkdir()
    (runs / "search" / "sweep" / "report.json").write_text(json.dumps(report))
    assert main(["runs", "--runs", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "search", "trial-001", "trial-002", "new", "old"]
    assert lines[2].startswith("  trial-001")
    assert "accuracy 0.6" in lines[1]
    assert find_run("search/trial-001", runs).stages[0].figures == {"accuracy": 0.5}


def test_an_array_is_as_its_runs_are(runs: Path) -> None:
    for number, status in ((1, "done"), (2, "interrupted")):
        stage(runs / "grid" / f"grid-{number}" / "pretrain", status=status)
    assert find_run("grid", runs).status == "interrupted"
    with RunLock(runs / "grid" / "grid-1" / "pretrain"):
        assert find_run("grid", runs).status == "running"


def test_the_list_as_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--runs", str(runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in found["runs"]] == ["new", "old"]
    assert found["runs"][0]["metric"] == {"name": "accuracy", "value": 0.9, "stage": "finetune"}


def test_no_runs_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == []
    assert main(["runs", "--runs", str(tmp_path / "none")]) == 3
    assert "llmkit demo" in capsys.readouterr().err


def test_a_run_is_found_by_its_name_its_folders_and_its_model(runs: Path) -> None:
    for word in (
        "old",
        str(runs / "old"),
        str(runs / "old" / "finetune"),
        str(runs / "old" / "finetune" / "model"),
    ):
        assert find_run(word, runs).stages[0].figures["accuracy"] == 0.8, word
    with pytest.raises(MissingError) as found:
        find_run("odl", runs)
    assert "'old'" in found.value.hint


def test_in_what_two_runs_differ(runs: Path) -> None:
    found = diff_runs(find_run("old", runs), find_run("new", runs))
    assert [(one.key, one.a, one.b) for one in found.recipe] == [("finetune.train.optim.lr", 5e-05, 1e-4)]
    assert [(one.key, one.a, one.b) for one in found.machine] == [("machine.processes", 1, 2)]
    assert [(one.key, one.a, one.b) for one in found.environment] == [
        ("packages.torch", "2.13.0", "2.14.0"),
        ("world_size", 1, 2),
    ]
    # More accuracy is better, more loss is worse; counts are no figures.
    assert {one.name: (one.a, one.b, one.verdict) for one in found.figures} == {
        "loss": (0.5, 0.6, "worse"),
        "accuracy": (0.8, 0.9, "better"),
    }


def test_intervals_that_overlap_are_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value, low in (("old", 0.8, 0.75), ("new", 0.82, 0.77)):
        stage(
            runs / name / "eval",
            final={"eval/accuracy": value, "eval/macro_recall": value, "eval/loss": 0.5},
            made="2026-04-01T00:00:00+00:00",
            figures={"accuracy": {"value": value, "low": low, "high": low + 0.1}},
        )
    assert main(["runs", "diff", "old", "new", "--runs", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    [accuracy] = [line for line in lines if line.startswith("eval accuracy")]
    assert accuracy.endswith("new is better, but the intervals overlap")
    [recall] = [line for line in lines if line.startswith("eval macro_recall")]
    assert recall.endswith("new is better")
    assert not any(line.startswith("eval loss") for line in lines), "what is the same is only counted"
    assert "figures (1 more is the same)" in lines


@pytest.mark.parametrize(
    ("more", "said"),
    [({"task": "tag"}, "whose figures do not compare"), ({"data_address": "b"}, "on different data")],
)
def test_figures_that_do_not_compare_get_no_verdict(more: dict[str, str], said: str, runs: Path) -> None:
    for name, own in (("old", {"data_address": "a"}), ("new", {"data_address": "a", **more})):
        stage(runs / name / "eval", final={"eval/accuracy": 0.5 if name == "old" else 0.6}, **own)  # type: ignore[arg-type]
    found = diff_runs(find_run("old", runs), find_run("new", runs))
    [figure] = [one for one in found.figures if one.stage == "eval"]
    assert figure.verdict == ""
    assert any(said in note for note in found.notes)


def test_a_loss_per_token_is_judged_on_the_same_tokens_alone(runs: Path) -> None:
    def verdicts(references: dict[str, float]) -> dict[str, str]:
        for name, loss, lines in (("a", 3.0, {"unigram": 5.5}), ("b", 2.0, references)):
            place = runs / f"{name}{len(references)}" / "pretrain"
            stage(place, final={"eval/loss": loss, "eval/bits_per_byte": loss / 2}, references=lines, task="")
        found = diff_runs(*(find_run(f"{name}{len(references)}", runs) for name in "ab"))
        return {one.name: one.verdict for one in found.figures}

    assert verdicts({"unigram": 5.5}) == {"loss": "better", "bits_per_byte": "better"}
    assert verdicts({"unigram": 7.5, "other": 1.0}) == {"loss": "", "bits_per_byte": "better"}


def test_the_difference_as_json_and_of_a_run_with_itself(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "diff", "old", "new", "--runs", str(runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == [{"key": "finetune.train.optim.lr", "a": 5e-05, "b": 1e-4}]
    assert main(["runs", "diff", "old", "old", "--runs", str(runs)]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["runs", "diff", "old", "nwe", "--runs", str(runs)]) == 3
    assert "'new'" in capsys.readouterr().err


def test_settings_of_three_runs(runs: Path) -> None:
    stage(runs / "third" / "finetune", lr="5e-05")
    found = settings_of([find_run(name, runs) for name in ("old", "new", "third")])
    assert {"key": "finetune.train.optim.lr", "values": [5e-05, 1e-4, 5e-05]} in found


def test_listing_needs_no_torch(runs: Path) -> None:
    code = (
        "import sys; from llmkit.cli import main; "
        "assert main(['runs', '--runs', sys.argv[1]]) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("next: ")
