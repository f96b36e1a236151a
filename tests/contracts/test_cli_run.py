"""What a pipe sees of a whole run: one path, one object, plain lines; and the next command to type."""

import io
import json
import re
import shlex

import pytest
from conftest import write_tiny_project

from llmkit.cli import main

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x1b]")


@pytest.fixture(scope="module")
def trained(llmkit, tmp_path_factory):
    """A folder in which the tiny recipe was run, and what that printed."""
    folder = write_tiny_project(tmp_path_factory.mktemp("run"))
    return folder, llmkit("run", "tiny.yaml", cwd=folder)


def test_a_run_prints_plain_lines_and_the_next_command(trained, monkeypatch, capsys):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not CONTROL.search(done.stderr)
    program, *words = shlex.split(done.stderr.splitlines()[-1].removeprefix("next: "))
    assert words[:2] == ["-m", "llmkit"], program
    monkeypatch.chdir(folder)
    assert main([*words[2:], "--max-new-tokens", "3"]) == 0
    written = capsys.readouterr().out
    assert written.count("\n---\n") == 2
    assert written.startswith("the ")


def test_quiet_prints_one_path_and_nothing_else(trained, llmkit):
    folder, _ = trained
    done = llmkit("run", "tiny.yaml", "-q", cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs/tiny\n", "")
    assert (folder / "runs/tiny/pretrain/model/config.json").is_file()


def test_json_gives_one_object_and_lines_of_events(trained, llmkit):
    folder, _ = trained
    done = llmkit("eval", "runs/tiny", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert {"folder", "metrics", "next"} <= set(result)
    assert 0 < result["metrics"]["loss"] < 7
    events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert "phase" in events


def test_generate_takes_lines_of_stdin_and_repeats_itself(trained, monkeypatch, capsys):
    folder, _ = trained
    monkeypatch.chdir(folder)
    outputs = []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat\na bird\n"))
        words = ["generate", "runs/tiny", "--json", "-n", "2", "--max-new-tokens", "3", "--seed", "1"]
        assert main(words) == 0
        outputs.append(json.loads(capsys.readouterr().out)["samples"])
    assert [sample["prompt"] for sample in outputs[0]] == ["the cat", "the cat", "a bird", "a bird"]
    assert outputs[0] == outputs[1]


def test_a_dry_run_shows_the_plan_and_writes_nothing(llmkit, tmp_path):
    folder = write_tiny_project(tmp_path)
    before = sorted(folder.rglob("*"))
    done = llmkit("run", "tiny.yaml", "-n", "--json", cwd=folder)
    plan = json.loads(done.stdout)
    assert (plan["num_steps"], plan["tokens_per_step"]) == (4, 128)
    assert sorted(folder.rglob("*")) == before


def test_no_model_is_answered_with_the_runs_that_have_one(trained, monkeypatch, capsys):
    folder, _ = trained
    monkeypatch.chdir(folder)
    assert main(["generate", "runs/tny", "the"]) == 3
    assert "tiny" in capsys.readouterr().err


def test_tokenizing_again_says_that_all_is_done(llmkit, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {number} of some text\n" for number in range(300)))
    words = ("tokenize", "a.txt", "tokenize.vocab_size=300", "tokenize.data.documents=line")
    first, again, fresh = (llmkit(*words, *more, cwd=tmp_path) for more in ((), (), ("--fresh",)))
    assert (first.returncode, again.returncode, fresh.returncode) == (0, 0, 0)
    assert "already done" not in first.stderr
    assert "already done" in again.stderr
    assert "already done" not in fresh.stderr
    assert "bytes a token; held out:" in first.stderr
    assert "report: runs/a/tokenize/report.html" in again.stderr


def test_text_without_a_recipe_from_files_and_from_stdin(llmkit, tmp_path):
    (tmp_path / "a.txt").write_text("first file\n" * 50)
    (tmp_path / "b.txt").write_text("second file\n" * 50)
    words = ("tokenize.vocab_size=300", "tokenize.held_out=0", "--json")
    both = json.loads(llmkit("tokenize", "a.txt", "b.txt", *words, cwd=tmp_path).stdout)
    assert both["documents"] == 2
    made = "runs/a/tokenize/tokenizer"
    piped = llmkit("tokenize", "-", "--tokenizer", made, "--json", cwd=tmp_path, text="first file\n" * 50)
    assert json.loads(piped.stdout)["documents"] == 1
    named = llmkit("tokenize", "-", "--tokenizer", "a", "--json", cwd=tmp_path, text="first file\n")
    assert json.loads(named.stdout)["tokens"] == 3 + 1


def test_what_preparation_did_is_told_and_nothing_empty_is(llmkit, tmp_path):
    texts = [f"number {number} writes to n{number}@example.org today" for number in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = {
        "llmkit": 1,
        "name": "told",
        "tokenize": {
            "vocab_size": 300,
            "data": {"files": "a.jsonl"},
            "prepare": {"personal_data": {}, "duplicates": {"lines": 5}},
        },
    }
    (tmp_path / "told.json").write_text(json.dumps(recipe))
    said = llmkit("tokenize", "told.json", cwd=tmp_path).stderr.splitlines()
    assert "personal_data: 30 mail replaced by marks" in said
    assert "kept 30 of 30 documents" in said
    assert all(line.strip() for line in said)
    assert not any(line.startswith("lines: 0") for line in said)
