"""The shell's contract: streams, exit codes, suggestions, and that what the README says can be typed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = [
    "run",
    "tokenize",
    "pretrain",
    "eval",
    "finetune",
    "compress",
    "generate",
    "fill",
    "show",
    "plan",
    "predict",
    "merge",
    "explain",
    "sweep",
    "submit",
    "demo",
    "init",
    "doctor",
    "recipe",
    "runs",
    "report",
]
RECIPE_COMMANDS = ["check", "show", "schema", "explain", "diff"]
README = Path(__file__).resolve().parents[2] / "README.md"

MISTAKES = """\
llmkit: 1
nmae: x
seed: -1
tokenize: {vocab_size: 8q}
pretrain:
  objective: clmm
  train:
    length: 100
    optim: {shedule: cosine, lr: 0}
eval: {metrics: [perplexty]}
"""


def test_help_starts_with_examples_and_lists_every_command(llmkit, tmp_path):
    done = llmkit("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.index("Examples:") < done.stdout.index("Options:")
    listed = re.findall(r"^  (\w+) ", done.stdout.split("Commands:")[1], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize(
    "words",
    [[c] for c in COMMANDS] + [["recipe", c] for c in RECIPE_COMMANDS] + [["runs", "diff"]],
    ids=" ".join,
)
def test_every_command_has_help_with_examples(words, capsys):
    from llmkit.cli import main

    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"  llmkit {' '.join(words)}" in shown
    assert shown.index("Examples:") < shown.index("Options:")


def test_no_command_shows_the_help_as_an_error(llmkit, tmp_path):
    done = llmkit(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Commands:" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretran", "x.yaml"], "Did you mean 'pretrain'"),
        (["recipe", "chek"], "Did you mean 'check'"),
        (["run", "x.yaml", "--smok"], "--smoke"),
        (["run"], "Missing argument"),
        (["run", "x.yaml", "--processes", "two"], "--processes"),
        (["init", "gtp", "-"], "gpt"),
        (["run", "quikstart"], "quickstart"),
        (["run", "no/such.yaml"], "no/such.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_word_is_answered_with_the_right_one(words, said, llmkit, tmp_path):
    done = llmkit(*words, cwd=tmp_path)
    assert done.returncode in (2, 3), done.stderr
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_mistake_of_a_recipe_at_once(llmkit, tmp_path):
    (tmp_path / "bad.yaml").write_text(MISTAKES)
    done = llmkit("recipe", "check", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [int(n) for n in re.findall(r"^bad\.yaml:(\d+):\d+: ", done.stderr, re.MULTILINE)]
    assert lines == sorted(lines)
    assert set(lines) == {2, 3, 4, 5, 6, 8, 9, 10}
    for right in ("name", "clm", "schedule", "perplexity", "100 steps"):
        assert right in done.stderr


def test_errors_are_json_when_asked(llmkit, tmp_path):
    (tmp_path / "bad.yaml").write_text(MISTAKES)
    done = llmkit("recipe", "check", "bad.yaml", "--json", cwd=tmp_path)
    event = json.loads(done.stderr)
    assert event["event"] == "error"
    assert (event["type"], event["exit_code"], done.returncode) == ("RecipeError", 2, 2)
    assert len(event["problems"]) >= 7


def test_a_bug_says_so_and_debug_shows_where(monkeypatch, capsys):
    from llmkit.cli import doctor, main

    def broken(runs):
        raise ZeroDivisionError("no such luck")

    monkeypatch.setattr(doctor, "examine", broken)
    assert main(["doctor"]) == 1
    told = capsys.readouterr().err
    assert "ZeroDivisionError: no such luck" in told
    assert "bug in llmkit" in told
    assert "Traceback" not in told
    assert main(["doctor", "--debug"]) == 1
    assert "in broken" in capsys.readouterr().err


GOES_ON = "The same command goes on from there."


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("PermissionError(13, 'Permission denied', 'runs')", 1, "error: Permission denied: runs"),
        ("OSError(28, 'No space left on device')", 1, "error: No space left on device"),
        ("KeyboardInterrupt()", 130, f"error: stopped by Ctrl-C; what was complete is kept\nhint: {GOES_ON}"),
        ("MissingError('no gpu', hint='get one')", 3, "error: no gpu\nhint: get one"),
        ("GateError('worse')", 4, "error: worse"),
        ("InterruptedRunError('saved')", 75, "error: saved"),
    ],
)
def test_exit_codes_by_error(error, code, said, monkeypatch, capsys):
    from llmkit import errors
    from llmkit.cli import doctor, main

    def failing(runs):
        raise eval(error, vars(errors))

    monkeypatch.setattr(doctor, "examine", failing)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err.strip() == said


def test_a_closed_pipe_is_no_error(tmp_path):
    command = f"{sys.executable} -m llmkit recipe schema | head -c 10 >/dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "1")


def test_init_writes_a_recipe_that_holds_and_never_overwrites(llmkit, tmp_path):
    first = llmkit("init", "gpt", "my.yaml", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stderr.splitlines()[-1].startswith("next: ")
    assert llmkit("recipe", "check", "my.yaml", cwd=tmp_path).returncode == 0
    (tmp_path / "my.yaml").write_text("mine")
    again = llmkit("init", "gpt", "my.yaml", cwd=tmp_path)
    assert again.returncode == 2
    assert "my.yaml exists" in again.stderr
    assert (tmp_path / "my.yaml").read_text() == "mine"


def test_init_to_stdout_is_a_recipe_on_stdin(llmkit, tmp_path):
    text = llmkit("init", "gpt", "-", cwd=tmp_path).stdout
    done = llmkit("recipe", "check", "-", cwd=tmp_path, text=text)
    assert done.returncode == 0, done.stderr


def test_doctor_as_json(llmkit, tmp_path):
    done = llmkit("doctor", "--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert {"python", "torch", "transformers", "processor", "compiler", "runs"} <= set(found)
    assert report["ok"] == (done.returncode == 0)
    assert all(check["remedy"] for check in report["checks"] if check["state"] != "ok")


def test_the_words_of_the_readme_are_commands(capsys):
    """Every `llmkit ...` of the README names a command, and every option in it is one of that command."""
    from llmkit.cli import main

    said = re.findall(
        r"llmkit ((?:recipe )?[a-z]+(?:-[a-z]+)*)\b([^`\n#]*)", _code(README.read_text(encoding="utf-8"))
    )
    assert len(said) > 15
    for command, rest in said:
        assert main([*command.split(), "--help"]) == 0, command
        help_page = capsys.readouterr().out
        for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest):
            assert re.search(rf"{option}\b", help_page), f"{command}: {option}"


def _code(markdown: str) -> str:
    fences = re.findall(r"```sh\n(.*?)```", markdown, re.DOTALL)
    spans = re.findall(r"`(llmkit [^`]*)`", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL))
    return "\n".join([*fences, *spans])
