"""`llmkit submit` on a real Slurm of two virtual nodes: chains, interruptions of every kind, refusals.

What an interrupted run ends with is compared, byte for byte, with what one gives that was left alone.
"""

import json
import time
from pathlib import Path

import pytest
from cluster import Cluster

from llmkit.launch.slurm import Job, Task, script_of
from llmkit.report.run_log import read_metrics

pytestmark = [pytest.mark.timeout(3600)]
slow = pytest.mark.slow
"""Of every test but one: `make test-slurm` runs all of them, `make test` that one where there is a Slurm."""
STEP = "step_*"


def submit(llmkit, cluster: Cluster, project: Path, *words: str) -> dict[str, str]:
    """Submit the recipe; numbers of the jobs by stage."""
    done = llmkit("submit", "my.yaml", *words, "--json", cwd=project, env=cluster.env, timeout=900)
    assert done.returncode == 0, done.stderr
    return {one["stage"]: one["id"] for one in json.loads(done.stdout)["jobs"]}


def weights(project: Path, name: str) -> bytes:
    return (project / "runs" / name / "pretrain" / "model" / "model.safetensors").read_bytes()


def log_of(project: Path, name: str, number: str) -> str:
    return (project / "runs" / name / "submit" / f"pretrain-{number}.log").read_text()


def wait_for_checkpoint(cluster: Cluster, project: Path, name: str, number: str) -> None:
    """Wait until there is something to go on from, and more to do."""
    end = time.monotonic() + 1800
    while not list((project / "runs" / name / "pretrain" / "checkpoints").glob(STEP)):
        assert time.monotonic() < end, log_of(project, name, number)
        assert cluster.state(number) in ("PENDING", "RUNNING"), log_of(project, name, number)
        time.sleep(0.1)


def interrupt(how: str, cluster: Cluster, number: str) -> None:
    """Take the nodes away from a job that runs."""
    if how == "a preemption":
        path = cluster.folder / "urgent.sh"
        path.write_text("#!/bin/bash\nsleep 1\n")
        cluster.call(
            "sbatch", "--partition=high", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", str(path)
        )
    elif how == "the signal before the limit":
        cluster.call("scancel", "--batch", "--signal=USR1", number)
    else:
        cluster.call("scontrol", "requeue", number)


@pytest.fixture(scope="module")
def left_alone() -> dict[str, bytes]:
    """Weights of the run that nobody interrupts; filled by the first test that needs them."""
    return {}


def hurry(cluster: Cluster, number: str) -> None:
    """Once it is queued again, spare a job the two minutes that Slurm lets it wait."""
    end = time.monotonic() + 600
    while cluster.job(number)["Restarts"] == "0":
        assert time.monotonic() < end, cluster.job(number)
        time.sleep(0.2)
    if cluster.wait(number, "PENDING", "RUNNING", "COMPLETED")["JobState"] == "PENDING":
        time.sleep(3)  # a node refuses a job that begins again in the second in which it ended
        cluster.call("scontrol", "update", f"JobId={number}", "StartTime=now")


@pytest.mark.parametrize(
    ("how", "tasks_per"),
    [
        ("a preemption", "node"),
        pytest.param("a preemption", "rank", marks=slow),
        pytest.param("the signal before the limit", "node", marks=slow),
        pytest.param("scontrol requeue", "node", marks=slow),
    ],
)
def test_an_interrupted_job_ends_with_the_same_weights(how, tasks_per, llmkit, cluster, project, left_alone):
    common = ("--nodes", "2", "--time", "2:00:00", "--tasks-per", tasks_per, "--command", "pretrain")
    if not left_alone:
        first = submit(llmkit, cluster, project, *common, "name=alone")["pretrain"]
        found = cluster.wait(first, "COMPLETED", "FAILED", "CANCELLED", timeout=1800)
        assert found["JobState"] == "COMPLETED", log_of(project, "alone", first)
        left_alone["weights"] = weights(project, "alone")
    number = submit(llmkit, cluster, project, *common)["pretrain"]
    wait_for_checkpoint(cluster, project, "my", number)
    interrupt(how, cluster, number)
    hurry(cluster, number)
    found = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", timeout=1800)
    said = log_of(project, "my", number)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), said
    assert said.count("step 0: held-out loss") == 1, said  # the second start began where the first had saved
    assert weights(project, "my") == left_alone["weights"]


@slow
def test_stages_follow_each_other_and_runs_shows_them(llmkit, cluster, project):
    jobs = submit(llmkit, cluster, project, "--nodes", "2", "--time", "1:00:00", "--tasks-per", "rank")
    assert list(jobs) == ["tokenize", "pretrain"]
    assert cluster.job(jobs["pretrain"])["Dependency"].startswith(f"afterok:{jobs['tokenize']}")
    listed = llmkit("runs", "--json", cwd=project, env=cluster.env)
    states = {one["stage"]: one["state"] for one in json.loads(listed.stdout)["runs"][0]["jobs"]}
    assert states["pretrain"] == "PENDING"
    assert states["tokenize"] in ("PENDING", "RUNNING")
    assert (
        cluster.wait(jobs["pretrain"], "COMPLETED", "FAILED", "CANCELLED", timeout=1800)["JobState"]
        == "COMPLETED"
    )
    listed = llmkit("runs", "--json", cwd=project, env=cluster.env)
    (run,) = json.loads(listed.stdout)["runs"]
    assert {one["state"] for one in run["jobs"]} == {"COMPLETED"}
    assert run["status"] == "done"


@slow
def test_a_stage_that_fails_takes_those_behind_it_along(llmkit, cluster, project):
    recipe = (project / "my.yaml").read_text()
    (project / "my.yaml").write_text(
        recipe.replace("{files: text.txt, documents: line}", "{files: nothing.jsonl}")
    )
    (project / "nothing.jsonl").write_text("not json\n")
    jobs = submit(llmkit, cluster, project, "--time", "1:00:00")
    assert cluster.wait(jobs["tokenize"], "FAILED", "COMPLETED", timeout=600)["JobState"] == "FAILED"
    assert cluster.wait(jobs["pretrain"], "CANCELLED", timeout=120)["Reason"] == "DependencyNeverSatisfied"


@slow
def test_a_cancelled_job_is_not_queued_again(llmkit, cluster, project):
    number = submit(llmkit, cluster, project, "--time", "1:00:00", "--command", "pretrain")["pretrain"]
    wait_for_checkpoint(cluster, project, "my", number)
    cluster.call("scancel", number)
    found = cluster.wait(number, "CANCELLED", timeout=300)
    time.sleep(5)
    assert (cluster.state(number), found["Restarts"]) == ("CANCELLED", "0")


@slow
def test_what_slurm_refuses_is_told_in_its_own_words(llmkit, cluster, project):
    done = llmkit(
        "submit", "my.yaml", "--partition", "gpu", "--command", "pretrain", cwd=project, env=cluster.env
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "invalid partition specified: gpu" in done.stderr


@slow
def test_at_its_time_limit_a_job_has_saved_and_is_queued_again(llmkit, cluster, project):
    """A limit of two minutes, and training that takes longer: by its own clock, not by a signal of the test."""
    words = ("--time", "2m", "--command", "pretrain", "pretrain.train.length=1000000 steps")
    number = submit(llmkit, cluster, project, *words)["pretrain"]
    end = time.monotonic() + 600
    while cluster.job(number)["Restarts"] == "0":
        assert cluster.state(number) in ("PENDING", "RUNNING", "COMPLETING"), log_of(project, "my", number)
        assert time.monotonic() < end, log_of(project, "my", number)
        time.sleep(0.2)
    saved = sorted((project / "runs" / "my" / "pretrain" / "checkpoints").glob(STEP))[-1]
    assert "DUE TO TIME LIMIT" not in log_of(project, "my", number)
    hurry(cluster, number)
    cluster.wait(number, "RUNNING", timeout=120)
    end = time.monotonic() + 600
    while sorted(saved.parent.glob(STEP))[-1] == saved:
        assert time.monotonic() < end, log_of(project, "my", number)
        time.sleep(0.2)
    cluster.call("scancel", number)
    cluster.wait(number, "CANCELLED", "COMPLETED", timeout=300)
    said = log_of(project, "my", number)
    assert f"pretrain: from {saved.name}, " in said, said
    records = read_metrics(project / "runs" / "my" / "pretrain")
    steps = [one["step"] for one in records if "eval/loss" in one]
    assert steps == list(range(0, 60 * len(steps), 60))  # none lost, none twice


@slow
def test_each_task_of_an_array_is_queued_again_by_itself(cluster, tmp_path):
    """Of stand-ins for training the last is interrupted, whose job has the array's number, when the others are done."""
    stand_in = tmp_path / "train.sh"
    stand_in.write_text("""
mkdir -p "$1/checkpoints"
echo >> "$1/starts"
[ "${1##*/}" = last ] && [ "$(wc -l < "$1/starts")" = 1 ] || exit 0
sleep 8
mkdir "$1/checkpoints/step_1"
exit 75
""")
    tasks = tuple(Task((str(tmp_path / name),), tmp_path / name) for name in ("first", "second", "last"))
    job = Job(
        name="array", program=("/bin/bash",), command=(str(stand_in),), tasks=tasks, folder=tmp_path,
        log=tmp_path / "%A_%a.log", nodes=1, processes=1, gpus=0, cores=1, limit_s=600, lead_s=30,
        is_timed=False, start="node", comment="",
    )  # fmt: skip
    script = tmp_path / "array.sbatch"
    script.write_text(script_of(job))
    number = cluster.call("sbatch", "--parsable", str(script)).strip()
    end = time.monotonic() + 300
    while not (tmp_path / "last/checkpoints/step_1").exists() or cluster.state(f"{number}_2") != "PENDING":
        assert time.monotonic() < end, cluster.state(f"{number}_2")
        time.sleep(0.2)
    time.sleep(3)
    cluster.call("scontrol", "update", f"JobId={number}_2", "StartTime=now")
    cluster.wait(f"{number}_2", "COMPLETED", timeout=300)
    starts = {task.run.name: (task.run / "starts").read_text().count("\n") for task in tasks}
    assert starts == {"first": 1, "second": 1, "last": 2}
    assert {cluster.state(f"{number}_{n}") for n in range(3)} == {"COMPLETED"}


@slow
def test_settings_with_several_values_are_an_array_of_runs(llmkit, cluster, project):
    words = ("--time", "1:00:00", "pretrain.train.length=6 steps", "seed=1|2")
    number = submit(llmkit, cluster, project, *words)["run"]
    end = time.monotonic() + 1200
    while cluster.call("squeue", "--noheader", "--jobs", number, "--states", "PENDING,RUNNING,COMPLETING"):
        assert time.monotonic() < end
        time.sleep(0.5)
    listed = llmkit("runs", "--json", cwd=project, env=cluster.env)
    (run,) = json.loads(listed.stdout)["runs"]
    assert run["status"] == "done"
    assert {one["name"]: one["status"] for one in run["runs"]} == {"my/grid-1": "done", "my/grid-2": "done"}
    here = llmkit(
        "pretrain",
        "my.yaml",
        "pretrain.train.length=6 steps",
        "seed=2",
        "name=here",
        cwd=project,
        timeout=900,
    )
    assert here.returncode == 0, here.stderr
    first, second = (weights(project, f"my/grid-{place}") for place in (1, 2))
    assert second == weights(project, "here")
    assert first != second
