"""`llmkit submit`: the scripts, what is refused before anything is sent, and what Slurm's commands are told."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tuning

from llmkit.cli import main
from llmkit.errors import UsageError
from llmkit.launch import slurm
from llmkit.recipe import load_recipe
from llmkit.run.folders import Options
from llmkit.run.planning import plan
from llmkit.run.submit import prepare
from llmkit.run.submit_plan import Wanted, lead_of, plans_of
from llmkit.train.saving import Keep, Saver

RECIPE = """\
llmkit: 1
name: tiny
tokenize: {vocab_size: 400}
pretrain:
  model: {preset: gpt-tiny, context: 32}
  data: {files: text.txt, documents: line}
  train: {length: 4 steps, batch: 16 samples}
eval: {}
"""

FAKE = """#!{python}
import json, os, sys
from pathlib import Path

home = Path({folder!r})
name = Path(sys.argv[0]).name
with (home / "calls").open("a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "sbatch":
    if (home / "closed").exists() and (home / "closed").read_text() in Path(sys.argv[-1]).read_text():
        sys.exit("sbatch: error: Batch job submission failed: Invalid account specified")
    number = int((home / "number").read_text()) + 1 if (home / "number").exists() else 41
    (home / "number").write_text(str(number))
    print(f"{number};cluster")
elif (home / name).with_suffix(".out").exists():
    print((home / name).with_suffix(".out").read_text(), end="")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, which is the current one."""
    (tmp_path / "text.txt").write_text("the small cat sat on the mat\n" * 50)
    (tmp_path / "my.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fake(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands on PATH: they note how they were called, and say what their `.out` holds."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("sbatch", "squeue", "scancel", "sacct"):
        path = folder / name
        path.write_text(FAKE.replace("{python}", sys.executable).replace("{folder!r}", repr(str(folder))))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def calls(fake: Path, name: str) -> list[list[str]]:
    lines = (fake / "calls").read_text().splitlines() if (fake / "calls").exists() else []
    return [words for line in lines if (words := json.loads(line)).pop(0) == name]


def job(**changes: object) -> slurm.Job:
    given = {
        "name": "my-pretrain",
        "program": ("python", "-m", "llmkit"),
        "command": ("pretrain", "/data/my recipe.yaml", "--runs", "/runs"),
        "tasks": (slurm.Task((), Path("/runs/my")),),
        "folder": Path("/home/me/a folder"),
        "log": Path("/runs/my/submit/pretrain-%j.log"),
        "nodes": 2,
        "processes": 8,
        "gpus": 8,
        "cores": 32,
        "limit_s": 43200,
        "lead_s": 90,
        "is_timed": True,
        "start": "node",
        "comment": "Made by a test",
    }
    return slurm.Job(**(given | changes))


GOLDEN = """\
#!/bin/bash
# Made by a test
#SBATCH --job-name=my-pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/runs/my/submit/pretrain-%j.log
#SBATCH --partition=gpu

set -u
cd '/home/me/a folder' || {
  echo "llmkit: $(hostname) does not see" '/home/me/a folder'": all nodes must share it, at the same path" >&2
  exit 3
}
module load cuda
export PYTHONPATH=/src

run=/runs/my; set --

# The checkpoints that are there.
saved() { find "$run" -maxdepth 4 -path '*/checkpoints/step_*' -prune -print 2>/dev/null | sort; }
before=$(saved)
# What is left, of which the run keeps what saving takes; a requeued job has its whole time again.
end="${SLURM_JOB_END_TIME:-$(($(date +%s) + 43200))}"
left=$((end - $(date +%s) - 30))
[ $left -gt 0 ] || left=1
trap 'kill -USR1 "$step" 2>/dev/null' USR1 TERM
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" python -m llmkit pretrain '/data/my recipe.yaml' \
--runs /runs --processes 16 --nodes "$SLURM_JOB_NUM_NODES" --max-time "${left}s" "$@" &
step=$!
# A signal ends `wait` too; only the last one has the exit code.
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"; code=$?

# Killed by a signal that asks to stop: before the run listened, or when it was done. What is saved goes on.
case $code in 75 | 138 | 143) ;; *) exit $code ;; esac
"""


def test_the_script():
    made = slurm.script_of(
        job(settings=(("partition", "gpu"),), setup="module load cuda", env=(("PYTHONPATH", "/src"),))
    )
    assert made.startswith(GOLDEN)
    assert 'scontrol requeue "$me"' in made[len(GOLDEN) :]


def test_one_task_a_process_has_no_agent():
    made = slurm.script_of(job(start="rank"))
    assert "--ntasks-per-node=8 --cpus-per-task=" in made
    assert "#SBATCH --cpus-per-task=4\n" in made
    assert not re.search(r"--processes|--nodes ", made)


def test_an_array_has_words_and_a_folder_for_each_task():
    tasks = tuple(slurm.Task((f"seed={n}", f"name=my/grid-{n}"), Path(f"/runs/my/grid-{n}")) for n in (1, 2))
    made = slurm.script_of(job(tasks=tasks))
    assert "#SBATCH --array=0-1\n" in made
    assert "  1) run=/runs/my/grid-2; set -- seed=2 name=my/grid-2 ;;\n" in made


@pytest.mark.parametrize(
    "setting", [("time", "1"), ("output", "x"), ("Bad Name", "x"), ("qos", "a\n#SBATCH --x")]
)
def test_a_setting_that_is_ours_or_none_is_refused(setting):
    with pytest.raises(UsageError):
        slurm.script_of(job(settings=(setting,)))


def run_script(
    folder: Path, srun: str, *, state: str = "RUNNING", times: int = 1, more: str = ""
) -> tuple[list[int], list[str]]:
    """Run a job's script here with Slurm's commands played by shell functions; exit codes, and what was requeued.

    `more` are further commands before it. Only a job that is asked for by its own number runs.
    """
    made = slurm.script_of(
        job(folder=folder, tasks=(slurm.Task((), folder / "run"),), program=("true",), nodes=1, limit_s=600)
    )
    play = f"""
srun() {{ {srun}; }}
squeue() {{ case " $* " in *" --jobs=7 "* | *" --jobs=7_2 "*) echo {state};; esac; }}
scontrol() {{ echo "$@" >> requeued; }}
SLURM_CPUS_PER_TASK=1 SLURM_JOB_ID=7 SLURM_JOB_NUM_NODES=1
{more}
"""
    path = folder / "job.sh"
    path.write_text(play + made)
    codes = [subprocess.run(["bash", str(path)], cwd=folder, timeout=60).returncode for _ in range(times)]
    queued = folder / "requeued"
    return codes, queued.read_text().splitlines() if queued.exists() else []


SAVING = 'mkdir -p "run/pretrain/checkpoints/step_$RANDOM$RANDOM"; exit 75'


@pytest.mark.parametrize(
    ("srun", "state", "times", "codes", "requeues"),
    [
        ("exit 0", "RUNNING", 1, [0], 0),
        ("exit 1", "RUNNING", 1, [1], 0),
        ("exit 4", "RUNNING", 1, [4], 0),
        (SAVING, "RUNNING", 5, [75] * 5, 5),
        (SAVING, "COMPLETING", 1, [75], 0),
        ("exit 75", "RUNNING", 5, [75] * 5, 2),
        ("exit 138", "RUNNING", 1, [138], 1),
    ],
    ids=["done", "failed", "gate", "saves each time", "cancelled", "never saves", "killed at its start"],
)
def test_a_job_is_queued_again_only_when_that_is_of_use(tmp_path, srun, state, times, codes, requeues):
    found = run_script(tmp_path, srun, state=state, times=times)
    assert found == (codes, ["requeue 7"] * requeues)


def test_folders_of_any_name_are_written_as_sbatch_reads_them():
    made = slurm.script_of(job(log=Path('/a "b" 100%job/%j.log'), settings=(("comment", 'x\\"y'),)))
    assert '#SBATCH --output="/a \\"b\\" 100%%job/%j.log"\n' in made
    assert '#SBATCH --comment="x\\\\\\"y"\n' in made
    with pytest.raises(UsageError, match="backslash"):
        slurm.script_of(job(log=Path("/a\\b/%j.log")))


@pytest.mark.parametrize("number", [7, 9])
def test_a_task_of_an_array_is_asked_for_and_queued_again_by_its_own_number(tmp_path, number):
    """The last one's job has the number of the array; by that Slurm would take all tasks."""
    more = f"SLURM_JOB_ID={number} SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=2"
    assert run_script(tmp_path, SAVING, more=more) == ([75], ["requeue 7_2"])


def test_a_signal_to_the_script_is_passed_on_and_the_end_is_waited_for(tmp_path):
    (tmp_path / "told.sh").write_text(
        "trap 'echo told > told; sleep 0.3; exit 75' USR1\nkill -USR1 $1\nwhile :; do sleep 0.05; done\n"
    )
    codes, queued = run_script(tmp_path, "exec bash told.sh $$")
    assert (tmp_path / "told").read_text() == "told\n"
    assert (codes, queued) == ([75], ["requeue 7"])


def test_a_node_without_the_folder_says_so(tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(slurm.script_of(job(folder=tmp_path / "gone")))
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert "all nodes must share it" in done.stderr


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("12:00:00", 43200),
        ("2-00", 172800),
        ("1-02:30", 95400),
        ("1-02:03:04", 93784),
        ("12h", 43200),
        ("1h30m", 5400),
    ],
)
def test_limits_are_read_as_sbatch_and_as_llmkit_write_them(text, seconds):
    assert slurm.parse_limit(text) == seconds
    assert slurm.parse_limit(slurm.shown_limit(seconds)) == seconds


@pytest.mark.parametrize("text", ["soon", "0", "1:2:3:4"])
def test_what_is_no_limit_is_refused(text):
    with pytest.raises(UsageError, match="--time"):
        slurm.parse_limit(text)


def test_a_chain_begins_each_job_after_the_one_before(project, fake, capsys):
    assert (
        main(["submit", "my.yaml", "--nodes", "2", "--gpus-per-node", "8", "--time", "12:00:00", "--json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert [(one["stage"], one["id"], one["after"]) for one in said["jobs"]] == [
        ("tokenize", "41", None),
        ("pretrain", "42", "41"),
        ("eval", "43", "42"),
    ]
    sent = calls(fake, "sbatch")
    assert [words[1:-1] for words in sent] == [
        [],
        ["--dependency=afterok:41", "--kill-on-invalid-dep=yes"],
        ["--dependency=afterok:42", "--kill-on-invalid-dep=yes"],
    ]
    scripts = {one["stage"]: Path(one["script"]).read_text() for one in said["jobs"]}
    nodes = {
        stage: re.findall("#SBATCH --(?:nodes|gpus-per-node)=([0-9]+)", text)
        for stage, text in scripts.items()
    }
    assert nodes == {"tokenize": ["1"], "pretrain": ["2", "8"], "eval": ["1", "1"]}
    assert json.loads((project / "runs/tiny/submit/jobs.json").read_bytes())["jobs"] == said["jobs"]


def test_numbers_of_jobs_are_the_result(project, fake, capsys):
    assert main(["submit", "my.yaml", "--command", "pretrain", "--time", "1h"]) == 0
    said = capsys.readouterr()
    assert said.out == "41\n"
    assert re.fullmatch("next: .*llmkit runs", said.err.splitlines()[-1])


def test_a_refused_job_takes_those_before_it_along(project, fake, capsys):
    (fake / "closed").write_text("#SBATCH --job-name=tiny-pretrain")
    assert main(["submit", "my.yaml"]) == 1
    assert "Invalid account specified" in capsys.readouterr().err
    assert calls(fake, "scancel") == [["41"]]
    assert json.loads((project / "runs/tiny/submit/jobs.json").read_bytes())["jobs"] == []


def test_a_run_that_is_in_the_queue_is_not_submitted_again(project, fake, capsys):
    assert main(["submit", "my.yaml", "--command", "pretrain"]) == 0
    (fake / "squeue.out").write_text("41|tiny-pretrain|PENDING|Priority\n")
    assert main(["submit", "my.yaml", "--command", "pretrain"]) == 1
    assert "scancel 41" in capsys.readouterr().err
    (fake / "squeue.out").write_text("41|another-job|RUNNING|None\n")
    assert main(["submit", "my.yaml", "--command", "pretrain"]) == 0


def test_without_slurm_the_answer_is_3_and_nothing_is_written(project, monkeypatch, capsys, tmp_path_factory):
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
    assert main(["submit", "my.yaml"]) == 3
    assert "sbatch" in capsys.readouterr().err
    assert not (project / "runs").exists()


def test_a_dry_run_needs_no_slurm_and_writes_nothing(project, monkeypatch, capsys, tmp_path_factory):
    bash = shutil.which("bash")
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
    assert main(["submit", "my.yaml", "--nodes", "2", "--dry-run"]) == 0
    made = capsys.readouterr().out
    assert made.count("#!/bin/bash") == 3
    assert subprocess.run([str(bash), "-n"], input=made, text=True, timeout=60).returncode == 0
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["my.yaml", "--time", "60s"], "too short: a job needs about 60 s to start and"),
        (["my.yaml", "pretrain.objective=clmm"], "clm"),
        (["my.yaml", "--command", "finetune"], "it has tokenize, pretrain, eval"),
        (["my.yaml", "--processes-per-node", "3"], "cannot be shared"),
        (["my.yaml", "--on", "H100"], "--gpus-per-node"),
        (["my.yaml", "--gpus-per-node", "8", "--on", "H10"], "H100"),
        (["my.yaml", "--sbatch", "time=5"], "llmkit sets this itself"),
        (["my.yaml", "seed=1..9"], "sweep"),
        (["-"], "stdin"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_told_before_anything_is_sent(words, said, project, fake, capsys):
    assert main(["submit", *words]) == 2
    assert said in capsys.readouterr().err
    assert calls(fake, "sbatch") == []
    assert not (project / "runs").exists()


def test_the_lead_is_the_longest_step_and_what_a_run_keeps_for_saving(project):
    """At 200 MB a second, one save under way and the last one, half as long again."""
    loaded = load_recipe("my.yaml")
    made = replace(plan(loaded, Options()), checkpoint_bytes=0, step_seconds={})
    assert lead_of(None) == 30
    assert lead_of(made) == 40
    large = replace(made, checkpoint_bytes=24 * 10**9)
    assert lead_of(large) == 400
    keeps = Saver(None, Keep(2), background=True, expected_bytes=large.checkpoint_bytes).seconds
    assert 30 + keeps <= lead_of(large) < 30 + keeps + 10
    assert lead_of(replace(made, step_seconds={"compute": (5.0, 11.0), "optimizer": (1.0, 1.0)})) == 50


def test_who_says_how_long_saving_takes_is_told_by_the_signal_alone(project, fake, capsys):
    for lead, told in (([], 1), (["--lead", "2m"], 0)):
        assert main(["submit", "my.yaml", "--command", "pretrain", "--time", "1h", "-n", *lead]) == 0
        script = capsys.readouterr().out
        assert script.count("--max-time") == told
        assert ("B:USR1@120" in script) == (not told)


def tuned(project, **more):
    """A recipe that fine-tunes a model that is here already."""
    section = {
        "task": "cls",
        "model": {"name": tuning.model("bert"), "context": 32},
        "data": {"files": str(tuning.rows_file(project, "cls"))},
        "train": {"length": "4 steps", "batch": "16 samples"},
        **more,
    }
    (project / "tuned.yaml").write_text(json.dumps({"llmkit": 1, "name": "tuned", "finetune": section}))
    return "tuned.yaml"


def test_fine_tuning_is_planned_before_it_is_sent(project, fake, capsys):
    [one] = plans_of(load_recipe(tuned(project)), Wanted("tuned.yaml"))
    assert one.checkpoint_bytes == 12 * one.num_parameters  # weights and AdamW's moments
    assert one.rows_per_step == 16
    assert main(["submit", "tuned.yaml", "--processes-per-node", "3"]) == 2
    assert "cannot be shared" in capsys.readouterr().err
    tuned(project, data={"files": "-"})
    assert main(["submit", "tuned.yaml"]) == 2
    assert "finetune.data.files: a job cannot read stdin" in capsys.readouterr().err
    tuned(project, model={"name": "./nowhere", "context": 32})
    assert main(["submit", "tuned.yaml"]) == 3
    assert "nowhere" in capsys.readouterr().err
    assert calls(fake, "sbatch") == []


def test_a_model_that_an_earlier_job_makes_is_planned_as_that_job_is(project):
    (project / "both.yaml").write_text(
        RECIPE.replace("name: tiny", "name: both")
        + f"finetune: {{task: cls, data: {{files: {tuning.rows_file(project, 'cls')}}}}}\n"
    )
    loaded = load_recipe("both.yaml")
    [one] = plans_of(loaded, Wanted("both.yaml"))
    assert [one] == plans_of(loaded, Wanted("both.yaml", command="pretrain"))
    assert plans_of(loaded, Wanted("both.yaml", command="eval")) == []
    assert list(prepare(Wanted("both.yaml")).jobs) == ["tokenize", "pretrain", "finetune", "eval"]


def test_settings_with_several_values_are_an_array_of_runs(project):
    found = prepare(Wanted("my.yaml", ("seed=1|2", "pretrain.train.optim.lr=1e-3|3e-4|1e-4"))).jobs
    assert list(found) == ["run"]
    tasks = found["run"].tasks
    assert len(tasks) == 6
    assert tasks[5].words == ("seed=2", "pretrain.train.optim.lr=1e-4", "name=tiny/grid-6")
    assert tasks[5].run == project / "runs/tiny/grid-6"


def test_variants_are_an_array(project):
    (project / "two.yaml").write_text(
        RECIPE.replace("name: tiny", "name: two")
        + "variants: {a: {}, b: {pretrain: {train: {length: 8 steps}}}}\n"
    )
    found = prepare(Wanted("two.yaml")).jobs
    assert [task.words for task in found["run"].tasks] == [("variant=a",), ("variant=b",)]
    assert [task.run for task in found["run"].tasks] == [project / "runs/two/a", project / "runs/two/b"]


def test_runs_shows_what_slurm_says(project, fake, capsys):
    assert main(["submit", "my.yaml"]) == 0
    capsys.readouterr()
    (fake / "squeue.out").write_text("42|tiny-pretrain|RUNNING|None\n43|tiny-eval|PENDING|Dependency\n")
    (fake / "sacct.out").write_text("41|tiny-tokenize|COMPLETED\n")
    assert main(["runs", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert [(one["id"], one["state"], one["reason"]) for one in run["jobs"]] == [
        ("41", "COMPLETED", ""),
        ("42", "RUNNING", ""),
        ("43", "PENDING", "Dependency"),
    ]
    assert main(["runs"]) == 0
    said = capsys.readouterr()
    assert "42 pretrain RUNNING, 43 eval PENDING (Dependency)" in said.out
    assert said.err.splitlines()[-1] == f"next: tail -F {project}/runs/tiny/submit/pretrain-42.log"


def test_runs_says_nothing_of_slurm_where_there_is_none(project, fake, monkeypatch, capsys, tmp_path_factory):
    assert main(["submit", "my.yaml", "--command", "pretrain"]) == 0
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
    capsys.readouterr()
    assert main(["runs"]) == 0
    assert "41" not in capsys.readouterr().out
