"""`llmkit tokenize --show`: pieces in colours on a terminal, JSON in a pipe."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizing import train_tokenizer

from llmkit.cli.show import (
    FIRST_BYTES,
    Terminal,
    as_object,
    coloured,
    counted,
    read_text,
    separated,
    show_pieces,
    terminal_of,
)
from llmkit.errors import DataError, UsageError
from llmkit.recipe.schema import Tokenize
from llmkit.report.formatting import cell_width

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"The cat {i} sat on the mat.\n从前有座山，山里有座庙。{i * 7}" for i in range(200)]
AB = Terminal(40, ("A", "B"))


def piece(content, number=1, token="t", start=0):
    from llmkit.data.tokenizers.pieces import Piece

    raw = content.encode() if isinstance(content, str) else content
    return Piece(content, number, token, start, start + len(raw))


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, Tokenize(vocab_size=400), folder=folder)
    return str(folder)


def shown(subject, tokenizer, stream=None, **options):
    stream = stream or io.StringIO()
    show_pieces(subject, tokenizer, stream=stream, **options)
    return stream.getvalue()


def test_colours_alternate_and_bytes_are_underlined() -> None:
    lines = coloured([piece("ab"), piece(b"\xe4\xbd"), piece(" "), piece("c")], AB)
    assert lines == ["\x1b[Amab\x1b[0m\x1b[4;Bm<E4><BD>\x1b[0m\x1b[Am \x1b[0m\x1b[Bmc\x1b[0m"]


def test_text_in_no_token_has_no_colour_and_takes_no_turn() -> None:
    assert coloured([piece("a"), piece(" ", None, ""), piece("b")], AB) == ["\x1b[Ama\x1b[0m \x1b[Bmb\x1b[0m"]


def test_line_ends_and_tabs_are_seen_and_colours_end_with_the_line() -> None:
    assert coloured([piece("a\n\n\tb"), piece("c\n")], AB) == [
        "\x1b[Ama⏎\x1b[0m",
        "\x1b[Am⏎\x1b[0m",
        "\x1b[Am⇥b\x1b[0m\x1b[Bmc⏎\x1b[0m",
    ]
    assert coloured([], AB) == []
    assert coloured([piece("")], AB) == ["\x1b[Am∅\x1b[0m"], "a token that stands for nothing is seen"


@pytest.mark.parametrize("columns", [20, 21, 33])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    text = "有座山 abc e\u0301 😀 x" * 9
    lines = coloured([piece(text), piece("山" * 50)], Terminal(columns, ("A", "B")))
    bare = [re.sub("\x1b\\[[^m]*m", "", line) for line in lines]
    assert max(map(cell_width, bare)) <= columns
    assert min(map(cell_width, bare[:-1])) >= columns - 1
    assert "".join(bare) == text + "山" * 50


def test_nothing_in_the_text_can_steer_the_terminal() -> None:
    nasty = [piece("\x1b[31mred\r\x07\u202e"), piece("\x9b")]
    assert separated(nasty) == ["\\x1b[31mred\\x0d\\x07\\u202e|\\x9b"]
    assert coloured(nasty[1:], AB) == ["\x1b[Am\\x9b\x1b[0m"]


def test_without_colours_a_mark_stands_between_pieces() -> None:
    assert separated([piece("a"), piece("b\n"), piece("c")]) == ["a|b⏎", "|c"]
    assert separated([piece("a"), piece("\nb")]) == ["a|⏎", "b"], "no mark where a piece goes on"
    assert separated([piece("a|"), piece(b"\xff")]) == ["a|¦<FF>"], "a mark that the text does not hold"
    assert separated([]) == []


def test_the_last_line_counts() -> None:
    found = [piece("有座"), piece(" ", None, ""), piece("b")]
    assert counted("有座 b", found) == (
        "2 tokens, 4 characters, 8 bytes, 4.00 bytes per token, 1 stretches in no token"
    )
    assert counted("", []) == "0 tokens, 0 characters, 0 bytes"
    assert counted("ab", [piece("ab")], is_all=False).endswith("; the first 2 B only, in a pipe all of it")


def test_json_has_one_entry_a_token() -> None:
    found = [
        piece("有", 7, "x"),
        piece(" ", None, "", 3),
        piece(b"\xe4\xbd", 8, "y", 4),
        piece(b"\xa0", 9, "z", 6),
    ]
    assert as_object("有 你", found) == {
        "text": "有 你", "tokens": ["x", "y", "z"], "ids": [7, 8, 9], "pieces": ["有", "<E4><BD>", "<A0>"],
        "offsets": [[0, 3], [4, 6], [6, 7]], "characters": 3, "bytes": 7,
    }  # fmt: skip


def test_what_a_terminal_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "57")
    assert terminal_of(io.StringIO(), {"TERM": "xterm-256color"}) is None
    many, few = terminal_of(Tty(), {"TERM": "xterm-256color"}), terminal_of(Tty(), {"TERM": "linux"})
    assert many is not None
    assert few is not None
    assert many.columns == 57
    assert len(many.tints) == len(few.tints) == 4
    assert all("48;5;" in tint for tint in many.tints)
    assert not any("48;5;" in tint for tint in few.tints)
    for env in ({"TERM": "dumb"}, {}, {"TERM": "xterm", "NO_COLOR": "1"}):
        assert terminal_of(Tty(), env) == Terminal(57)
    assert terminal_of(Tty(), {"TERM": "xterm", "NO_COLOR": ""}) == Terminal(57, few.tints)


def test_text_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_text("cat.txt", None) == ("cat.txt", True), "no such file: it is the text"
    (tmp_path / "cat.txt").write_bytes("\ufeff从前\r\nb".encode())
    assert read_text("cat.txt", None) == ("从前\nb", True), "as reading for training takes it"
    assert read_text("cat.txt", 5) == ("从", False), "no half characters"
    assert read_text("cat.txt", 8) == ("从前\nb", True)
    assert read_text("a" * 5000, 10) == ("a" * 5000, True), "too long for a path; the limit is for files"
    assert read_text(".", None) == (".", True), "a folder is no file"
    assert read_text("a\0b", None) == ("a\0b", True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("有".encode())))
    assert read_text("-", None) == ("有", True)


def test_what_cannot_be_shown_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gb.txt").write_bytes("从前有座山，山里有座庙".encode("gb18030"))
    with pytest.raises(DataError, match=r"gb\.txt"):
        read_text(str(tmp_path / "gb.txt"), None)
    with pytest.raises(UsageError, match="half a character"):
        read_text("a\udce4", None)
    monkeypatch.setattr("llmkit.data.tokenizers.open_tokenizer", lambda name: object())
    with pytest.raises(UsageError, match="x/y is written in Python"):
        shown("a", "x/y")


def test_a_pipe_gets_one_object(tokenizer: str) -> None:
    out = shown("The cat 从前有座山 \U00020000", tokenizer)
    (line,) = out.splitlines()
    found = json.loads(line)
    assert found["text"] == "The cat 从前有座山 \U00020000"
    assert (found["characters"], found["bytes"]) == (15, 28)
    data = found["text"].encode()
    ends = [end for _, end in found["offsets"]]
    assert [start for start, _ in found["offsets"]] == [0, *ends[:-1]]
    assert ends[-1] == len(data)
    assert b"".join(data[a:b] for a, b in found["offsets"]) == data
    assert found["pieces"][-1].endswith("<80>"), "a rare character is spelt by its bytes"
    from tokenizers import Tokenizer

    assert found["ids"] == Tokenizer.from_file(f"{tokenizer}/tokenizer.json").encode(found["text"]).ids
    assert shown("cat", tokenizer, Tty(), as_json=True).startswith('{"text": "cat"')


def test_a_file_is_cut_on_a_terminal_and_whole_in_a_pipe(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "long.txt"
    path.write_text("The cat sat. " * 2000)
    found = json.loads(shown(str(path), tokenizer))
    assert found["bytes"] == 26_000
    out = shown(str(path), tokenizer, Tty(), env={"TERM": "dumb"})
    assert "\x1b" not in out
    assert re.fullmatch(
        r"[\d,]+ tokens, 10,000 characters, 10,000 bytes, \d\.\d\d bytes per token; "
        "the first 10 kB only, in a pipe all of it",
        out.splitlines()[-1],
    )
    assert out.splitlines()[0].replace("|", "") == ("The cat sat. " * 2000)[:FIRST_BYTES]


def test_a_stream_that_knows_no_unicode_gets_valid_json(tokenizer: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show_pieces("从前", tokenizer, stream=stream)
    assert json.loads(stream.buffer.getvalue())["text"] == "从前"


SCRIPT = "import sys; from llmkit.cli.show import show_pieces; show_pieces(*sys.argv[1:])"


def test_on_a_real_terminal(tokenizer: str) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLORTERM")}
    leader, follower = pty.openpty()
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, "The cat\n从前有座山", tokenizer],
        env={**clean, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "60"},
        stdout=follower,
        stderr=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    os.close(follower)
    out = os.read(leader, 65536).decode()
    os.close(leader)
    assert process.stderr == b""
    assert re.sub("\x1b\\[[^m]*m", "", out).split("\r\n")[:2] == ["The cat⏎", "从前有座山"]
    assert out.count("48;5;") >= 3
