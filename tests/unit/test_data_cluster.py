"""Parts on many machines: every part once, killed workers named, a second call does only what is missing."""

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import fake_slurm
import pytest

from llmkit.data import cluster
from llmkit.data.cluster import Cluster, run_tasks
from llmkit.data.corpus import Corpus
from llmkit.data.pipeline import Engine
from llmkit.data.places import FileFault
from llmkit.data.tokenizers import learn, open_tokenizer
from llmkit.durable import write_folder
from llmkit.errors import DataError, MissingError, RunError
from llmkit.recipe.preparation import Prepare
from llmkit.recipe.schema import Source, Tokenize

QUICK = Cluster(partition="low", poll_s=0.05, settle_s=0.3, memory_gb=1, jobs_per_worker=1)


@dataclass(frozen=True)
class Toy:
    """Makes small parts; kills its process, or raises, at the part named."""

    folder: Path
    kill_at: int | None = None
    fail_at: int | None = None
    bug_at: int | None = None

    def __call__(self, number: int) -> None:
        if (self.folder / f"part-{number}").is_dir():
            return
        with (self.folder / f"executed-{number}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if number == self.fail_at:
            raise DataError("rows.jsonl:7: no text", hint="skip it")
        if number == self.bug_at:
            raise ZeroDivisionError("a bug")
        with write_folder(self.folder / f"part-{number}") as made:
            if number == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            (made / "tokens").write_bytes(bytes((number * i) % 251 for i in range(1000)))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.glob("part-*/*"))}


def executions(folder):
    return {int(p.name[9:]): len(p.read_text().split()) for p in folder.glob("executed-*")}


def missing(folder, count):
    return [n for n in range(count) if not (folder / f"part-{n}").is_dir()]


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    return folder


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    pytest.importorskip("datatrove")
    monkeypatch.setenv("PATH", fake_slurm.install(tmp_path / "bin"))
    return QUICK


@pytest.mark.parametrize("engine", ["local", "slurm"])
def test_every_part_once_and_the_bytes_of_one_machine(engine, parts, slurm, tmp_path, capfd):
    told = []
    run_tasks(
        Toy(parts),
        range(7),
        workers=2,
        logs=tmp_path / "logs",
        engine=engine,
        cluster=slurm,
        progress=lambda *a: told.append(a),
    )
    assert executions(parts) == dict.fromkeys(range(7), 1)
    assert told[-1] == (7, 7)
    alone = tmp_path / "alone"
    alone.mkdir()
    for number in range(7):
        Toy(alone)(number)
    assert contents(parts) == contents(alone)
    assert len(contents(parts)) == 14
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "logs" / f"{engine}-001" / "engine.log").is_file()


@pytest.mark.parametrize("engine", ["local", "slurm"])
def test_a_killed_worker_is_named_and_only_what_is_missing_is_done_again(engine, parts, slurm, tmp_path):
    one_each = replace(slurm, jobs_per_worker=6)
    with pytest.raises(RunError) as caught:
        run_tasks(
            Toy(parts, kill_at=1),
            range(4),
            workers=2,
            logs=tmp_path / "logs",
            engine=engine,
            cluster=one_each,
        )
    message = str(caught.value)
    assert "1 of 4 parts were not finished: 1" in message
    killed = (parts / "executed-1").read_text().split()[0]
    assert f"part 1 was being made by process {killed}" in message
    assert (tmp_path / "logs" / f"{engine}-001" / "logs" / "task_00001.log").is_file()
    assert missing(parts, 4) == [1]

    run_tasks(Toy(parts), missing(parts, 4), workers=2, logs=tmp_path / "logs", engine=engine, cluster=slurm)
    assert executions(parts) == {**dict.fromkeys(range(4), 1), 1: 2}
    alone = tmp_path / "alone"
    alone.mkdir()
    for number in range(4):
        Toy(alone)(number)
    assert contents(parts) == contents(alone)


def test_an_error_of_ours_comes_back_as_it_was(parts, slurm, tmp_path):
    with pytest.raises(DataError) as caught:
        run_tasks(
            Toy(parts, fail_at=1), range(4), workers=2, logs=tmp_path / "logs", engine="slurm", cluster=slurm
        )
    assert (caught.value.message, caught.value.hint) == ("rows.jsonl:7: no text", "skip it")
    assert not (tmp_path / "logs" / "slurm-001" / "job").exists()


def test_a_bug_names_its_log(parts, slurm, tmp_path):
    with pytest.raises(RunError, match="part 2 failed: ZeroDivisionError: a bug") as caught:
        run_tasks(
            Toy(parts, bug_at=2), range(3), workers=1, logs=tmp_path / "logs", engine="slurm", cluster=slurm
        )
    log = Path(caught.value.hint.removeprefix("where: "))
    assert 'raise ZeroDivisionError("a bug")' in log.read_text()


def test_jobs_of_a_killed_call_are_ended_first(parts, slurm, tmp_path):
    """A note of a job that still runs: it is cancelled before the new one begins."""
    logs = tmp_path / "logs"
    old = logs / "slurm-004"
    old.mkdir(parents=True)
    (old / "job").write_text("llmkit-old")
    sleeper = tmp_path / "bin" / "sleeper.sh"
    sleeper.write_text("#SBATCH --job-name=llmkit-old\n#SBATCH --partition=low\n#SBATCH --array=0-0%1\n")
    sleeper.write_text(sleeper.read_text() + f"#SBATCH --output={tmp_path}/old.out\nsleep 100\n")
    assert os.system(f"sbatch --export=ALL,RUN_OFFSET=0 {sleeper} > {tmp_path}/said") == 0
    keeper = int((tmp_path / "bin" / "state" / "llmkit-old").read_text())
    assert Path(f"/proc/{keeper}").is_dir()

    run_tasks(Toy(parts), range(2), workers=1, logs=logs, engine="slurm", cluster=slurm)
    assert not list(logs.glob("slurm-*/job"))
    assert (logs / "slurm-005").is_dir()
    assert sys.executable.encode() not in _command_line(keeper)


def _command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_what_slurm_refuses(parts, slurm, tmp_path, capfd):
    closed = Cluster(partition="closed", poll_s=0.05)
    with pytest.raises(RunError, match="Slurm did not take the job"):
        run_tasks(Toy(parts), range(2), workers=1, logs=tmp_path / "logs", engine="slurm", cluster=closed)
    assert "invalid partition" in capfd.readouterr().err


def test_what_is_missing_is_said(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="no Slurm: there is no sbatch, squeue, scancel"):
        run_tasks(Toy(parts), range(2), workers=1, logs=tmp_path / "logs", engine="slurm", cluster=QUICK)
    monkeypatch.setenv("PATH", fake_slurm.install(tmp_path / "bin"))
    monkeypatch.setitem(sys.modules, "datatrove.executor.slurm", None)
    with pytest.raises(MissingError) as caught:
        run_tasks(Toy(parts), range(2), workers=1, logs=tmp_path / "logs", engine="slurm", cluster=QUICK)
    assert caught.value.hint == "pip install 'llmkit[cluster]'"
    run_tasks(
        Toy(parts), [], workers=1, logs=tmp_path / "logs", engine="slurm", cluster=QUICK
    )  # nothing to do needs nothing


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("sbatch") is None or "SLURM_CONF" not in os.environ, reason="needs Slurm and SLURM_CONF"
)
def test_a_real_slurm(parts, tmp_path):
    pytest.importorskip("datatrove")
    real = Cluster(partition="low", poll_s=0.5, settle_s=2, memory_gb=1, time="10")
    with pytest.raises(RunError, match="1 of 6 parts were not finished: 2"):
        run_tasks(
            Toy(parts, kill_at=2), range(6), workers=2, logs=tmp_path / "logs", engine="slurm", cluster=real
        )
    run_tasks(Toy(parts), missing(parts, 6), workers=2, logs=tmp_path / "logs", engine="slurm", cluster=real)
    assert executions(parts) == {**dict.fromkeys(range(6), 1), 2: 2}


def test_a_corpus_that_an_engine_carries_gives_the_same_bytes(tmp_path):
    """The real work, not a toy: texts cleaned, compared and encoded by the processes of an engine."""
    text = tmp_path / "text.jsonl"
    rows = [{"text": f"document {number} of {number % 40} with some words in it"} for number in range(200)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:20]))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    learn([row["text"] for row in rows], [], Tokenize(vocab_size=300), folder)
    prepare = Prepare.model_validate({"normalise": {}, "duplicates": {}})
    found = []
    for name, engine in (("here", Engine()), ("carried", Engine(2, "local", Cluster()))):
        cache = tmp_path / name
        source = Source(files=[str(text)])
        [shards] = Corpus([source], prepare, 0.1, tmp_path, cache, engine).shards(open_tokenizer(str(folder)))
        assert shards.manifest["splits"]["train"]["documents"] > 150
        found.append({path.name: path.read_bytes() for path in sorted(shards.folder.glob("*.npy"))})
    assert found[0] == found[1]


def test_an_error_that_only_its_module_knows_comes_back_as_its_base():
    facts = cluster._described(FileFault("a.gz: damaged", hint="copy it again", reason="damaged"))
    assert facts == {"type": "DataError", "message": "a.gz: damaged", "hint": "copy it again"}
    assert cluster._described(RunError("gone"))["type"] == "RunError"
