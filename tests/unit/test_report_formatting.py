"""Numbers as people read them."""

import math

import pytest

from llmkit.report.formatting import (
    cell_width,
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_percent,
    format_rate,
    format_value,
    jsonable,
    labelled,
    one_line,
    visible,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (7, "7"), (999, "999"), (999.6, "1k"), (8123, "8.1k"), (8000, "8k"), (12_345, "12.3k"),
        (99_960, "100k"), (999_499, "999k"), (999_500, "1M"), (4_213_000, "4.2M"), (1.5e9, "1.5B"), (2e12, "2T"),
        (5e15, "5000T"), (-8123, "-8.1k"), (-0.01, "0"), (math.nan, "?"), (math.inf, "?"),
    ],
)  # fmt: skip
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


def test_bytes_and_rates() -> None:
    assert [format_bytes(v) for v in (0, 512, 1000, 1_234_567_890)] == ["0 B", "512 B", "1 kB", "1.2 GB"]
    assert format_rate(12_345) == "12.3k tok/s"
    assert format_rate(3, "documents") == "3 documents/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.12, "120ms"), (0.9996, "1s"), (3.44, "3.4s"), (9.96, "10s"), (45, "45s"), (59.6, "1m00s"),
        (190, "3m10s"), (3599.7, "1h00m"), (3900, "1h05m"), (86_400 * 2 + 3 * 3600, "2d03h"), (-1, "?"),
        (math.nan, "?"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_numbers_and_percent() -> None:
    shown = [
        format_number(v) for v in (4.21345, 0.01234, 1234.4, 5.9e-4, 0, 2_500_000.0, math.nan, -math.inf)
    ]
    assert shown == ["4.213", "0.01234", "1,234", "5.9e-04", "0", "2.500e+06", "nan", "-inf"]
    assert [format_percent(v) for v in (0.2, 0.034, 1, math.nan)] == ["20%", "3.4%", "100%", "?"]


def test_a_value_is_written_as_its_name_says() -> None:
    cases = {
        "train/lr": (5.9e-4, "5.9e-04"), "tokens_per_s": (12345, "12.3k tok/s"), "memory_bytes": (2e9, "2 GB"),
        "elapsed_s": (190, "3m10s"), "mfu": (0.41, "41%"), "num_targets": (131072, "131,072"), "flag": (True, "yes"),
        "eval/loss": (3.1184, "3.118"), "word": ("bf16", "bf16"),
    }  # fmt: skip
    assert {k: format_value(k, v) for k, (v, _) in cases.items()} == {
        k: text for k, (_, text) in cases.items()
    }
    assert labelled("train/loss", 4.21) == "loss 4.21"
    assert labelled("memory_bytes", 2e9) == "memory 2 GB"


def test_control_characters_are_written_out() -> None:
    assert one_line("a\n\tb\x1b[0m\r\u202e\ud800") == r"a\n\tb\x1b[0m\x0d\u202e\ud800"
    assert visible("a\n\tb\x07") == "a\n\tb\\x07"
    assert visible("日本 e\u0301 👩\u200d🔬") == "日本 e\u0301 👩\u200d🔬"


def test_cell_width() -> None:
    assert [cell_width(t) for t in ("abc", "中文", "e\u0301")] == [3, 4, 1]


def test_jsonable() -> None:
    class Odd:
        def __str__(self) -> str:
            return "odd"

    value = {"a": math.nan, 1: (1.5, -math.inf), "c": Odd(), "d": None, "e": b"x", "f": True}
    assert jsonable(value) == {"a": None, "1": [1.5, None], "c": "odd", "d": None, "e": "b'x'", "f": True}
