"""The Reporter's faces: what reaches stderr, byte by byte."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.errors import DataError, RecipeError
from llmkit.report.console import (
    JsonReporter,
    Pace,
    PlainReporter,
    QuietReporter,
    Throttle,
    is_live,
    make_reporter,
    progress_text,
)

NASTY = "[bold]Once[/bold] \x1b[31mred\x1b[0m \r8.1k [auto]\u202e"
ROOT = Path(__file__).resolve().parents[2]

SCRIPT = r"""
import sys
from llmkit.report.console import make_reporter
from llmkit.errors import RecipeError
r = make_reporter(json="--json" in sys.argv, quiet="-q" in sys.argv)
r.phase("pretrain", "gpt-mini [auto] 8.1k")
for step in range(0, 601, 20):
    r.progress("pretrain", step, 600, {"train/loss": 4.21, "lr": 5.9e-4, "tokens_per_s": 12345.0})
r.note("a note [auto] 8.1k")
r.sample(600, "[bold]Once", "\x1b[31mred\r[/bold] 8.1k")
r.warn("careful")
r.table("Plan [x]", [("device", "cpu"), ("rows", 8)])
r.error(RecipeError("1 problem", hint="fix it", problems=["a.yaml:1:2 [k]"]))
r.close()
print("rich" in sys.modules)
"""


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_piped(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *flags],
        env={**clean, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


def run_on_terminal(**env: str) -> str:
    """What the script writes to stderr when that is a terminal."""
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "FORCE_COLOR")}
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={**clean, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "100", **env},
        stdout=subprocess.DEVNULL,
        stderr=follower,
    )
    os.close(follower)
    output = b""
    try:
        while chunk := os.read(leader, 65536):
            output += chunk
    except OSError:  # EIO: the other side is closed, the Linux way to say end of file
        pass
    os.close(leader)
    assert process.wait(timeout=60) == 0
    return output.decode()


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1"}, {"TERM": "xterm"}])
def test_a_pipe_gets_plain_lines_and_no_rich(env: dict[str, str]) -> None:
    done = run_piped(**env)
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    assert done.stdout == "False\n"
    assert done.stderr.splitlines() == [
        "pretrain: gpt-mini [auto] 8.1k",
        "pretrain step 0/600 0% loss 4.21 lr 5.9e-04 12.3k tok/s",
        "pretrain step 600/600 100% loss 4.21 lr 5.9e-04 12.3k tok/s",
        "a note [auto] 8.1k",
        r"sample step 600: [bold]Once|\x1b[31mred\x0d[/bold] 8.1k",
        "warning: careful",
        "Plan [x]",
        "  device  cpu",
        "  rows    8",
        "a.yaml:1:2 [k]",
        "error: 1 problem",
        "hint: fix it",
    ]


def test_json_lines_parse_and_go_to_stderr() -> None:
    done = run_piped("--json")
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [e["event"] for e in events] == [
        "phase", "progress", "progress", "note", "sample", "warning", "table", "error",
    ]  # fmt: skip
    assert events[2]["values"] == {"train/loss": 4.21, "lr": 5.9e-4, "tokens_per_s": 12345.0}
    assert events[4]["text"] == "\x1b[31mred\r[/bold] 8.1k"
    assert (events[-1]["exit_code"], events[-1]["problems"]) == (2, ["a.yaml:1:2 [k]"])
    assert done.stdout == "False\n"


def test_quiet_leaves_warnings_and_errors() -> None:
    assert run_piped("-q").stderr.splitlines() == [
        "warning: careful", "a.yaml:1:2 [k]", "error: 1 problem", "hint: fix it",
    ]  # fmt: skip
    events = [json.loads(line)["event"] for line in run_piped("-q", "--json").stderr.splitlines()]
    assert events == ["warning", "error"]


def test_a_terminal_gets_colours_and_text_as_it_is() -> None:
    shown = run_on_terminal()
    assert re.search(r"\x1b\[[0-9;]+m", shown)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "gpt-mini [auto] 8.1k" in plain
    assert r"[bold]Once\x1b[31mred\x0d[/bold] 8.1k" in plain
    assert "a note [auto] 8.1k" in plain
    assert "600 steps · loss 4.21" in plain
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h"), "the cursor is given back"


def test_no_color_leaves_no_style_at_all_on_a_terminal() -> None:
    shown = run_on_terminal(NO_COLOR="1", FORCE_COLOR="1")
    assert re.search(r"\x1b\[[0-9;]*m", shown) is None, "neither colour nor bold nor dim"
    assert "step 600/600 100%" in shown, "it still redraws"


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"CI": "true"}])
def test_dumb_terminals_and_ci_get_plain_lines(env: dict[str, str]) -> None:
    assert "\x1b" not in run_on_terminal(**env)


def test_is_live_needs_a_terminal_that_redraws() -> None:
    assert is_live(Tty(), {"TERM": "xterm"})
    assert is_live(Tty(), {"TERM": "xterm", "CI": "false"})
    assert not is_live(Tty(), {"TERM": "xterm", "CI": "1"})
    assert not is_live(Tty(), {})
    assert not is_live(io.StringIO(), {"TERM": "xterm"})


def test_nasty_text_never_reaches_a_log_raw() -> None:
    out = io.StringIO()
    reporter = PlainReporter(out)
    reporter.phase(NASTY, NASTY)
    reporter.progress(NASTY, 1, 2, {NASTY: NASTY})
    reporter.note(NASTY)
    reporter.warn(NASTY)
    reporter.sample(1, NASTY, "a\nb")
    reporter.table(NASTY, [(NASTY, NASTY)])
    reporter.error(DataError(NASTY, hint=NASTY))
    assert not re.search("[\x1b\r\u202e]", out.getvalue())
    assert r"\x1b[31mred" in out.getvalue()
    assert "|a\\nb\n" in out.getvalue(), "a sample stands on one line"


def test_plain_progress_is_one_line_every_ten_seconds_with_an_eta() -> None:
    clock, out = Clock(), io.StringIO()
    reporter = PlainReporter(out, clock=clock)
    for step in range(61):
        reporter.progress("pretrain", step, 60, {"loss": 2.0})
        clock.now += 1.0
    lines = out.getvalue().splitlines()
    assert lines[0] == "pretrain step 0/60 0% loss 2"
    assert lines[1] == "pretrain step 10/60 16% loss 2 eta 50s"
    assert lines[-1] == "pretrain step 60/60 100% loss 2"
    assert len(lines) == 7


def test_the_last_progress_is_shown_once() -> None:
    clock = Clock()
    throttle = Throttle(clock, 10.0)
    assert throttle.lets("a", 1, 2)
    assert throttle.lets("a", 2, 2)
    clock.now += 100
    assert not throttle.lets("a", 2, 2)
    assert throttle.lets("b", 0, 2)


def test_a_resumed_run_is_paced_by_its_own_steps() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.eta("pretrain", 500, 600) is None
    clock.now += 20
    assert pace.eta("pretrain", 510, 600) == pytest.approx(180.0)
    assert pace.eta("pretrain", 600, 600) is None
    assert pace.eta("pretrain", 10, None) is None


def test_the_next_variants_run_is_paced_by_its_own_steps() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.eta("pretrain", 1, 600) is None
    clock.now += 1000
    assert pace.eta("pretrain", 600, 600) is None
    assert pace.eta("pretrain", 4, 600) is None
    clock.now += 10
    assert pace.eta("pretrain", 14, 600) == pytest.approx(586.0)


def test_progress_words() -> None:
    values = {"train/loss": 4.2134, "lr": 5.9e-4, "tokens_per_s": 12345.0, "eta_s": 190.0}
    assert progress_text(120, 600, values, 190.0, "step") == (
        "step 120/600 20% loss 4.213 lr 5.9e-04 12.3k tok/s eta 3m10s"
    )
    assert progress_text(1_500_000, 3_000_000, {}, None, "bytes") == "1.5 MB/3 MB 50%"
    assert progress_text(7, None, {}, None, "document") == "document 7"
    assert progress_text(1, 2, {"loss": float("nan")}, None, "step") == "step 1/2 50% loss nan"


def test_nan_in_json_is_null() -> None:
    out = io.StringIO()
    JsonReporter(out).progress("pretrain", 1, 2, {"loss": float("nan"), "x": float("inf")})
    event = json.loads(out.getvalue(), parse_constant=lambda name: pytest.fail(name))
    assert event["values"] == {"loss": None, "x": None}


def test_a_reader_that_left_does_not_end_the_run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115
    reporter = make_reporter(stderr=stream, env={})
    reporter.note("one")
    reporter.note("two")
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_an_ascii_log_does_not_break_on_other_text() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    PlainReporter(stream).note("从前 ok")
    assert raw.getvalue() == b"\\u4ece\\u524d ok\n"


def test_wide_characters_align() -> None:
    out = io.StringIO()
    PlainReporter(out).table("t", [("名称", "a"), ("abcd", "b")])
    assert out.getvalue() == "t\n  名称  a\n  abcd  b\n"


def test_faces_are_chosen_by_flags() -> None:
    assert isinstance(make_reporter(stderr=io.StringIO(), env={}), PlainReporter)
    assert isinstance(make_reporter(json=True, stderr=Tty(), env={"TERM": "xterm"}), JsonReporter)
    assert isinstance(make_reporter(quiet=True, stderr=Tty(), env={"TERM": "xterm"}), QuietReporter)


def test_a_recipe_error_shows_every_problem() -> None:
    out = io.StringIO()
    PlainReporter(out).error(RecipeError("2 problems", problems=["a.yaml:1:1\n  ^", "a.yaml:2:1"]))
    assert out.getvalue() == "a.yaml:1:1\n  ^\na.yaml:2:1\nerror: 2 problems\n"
