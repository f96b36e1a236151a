"""Values with units: what they mean, how they are written back, and what is proposed for a wrong one."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from llmkit.recipe.units import (
    BATCH,
    EVERY,
    LENGTH,
    WARMUP,
    Amount,
    Batch,
    Count,
    Duration,
    Every,
    Grammar,
    Length,
    Part,
    Ratio,
    Several,
    Size,
    Warmup,
    format_count,
    format_duration,
    format_size,
)


@pytest.mark.parametrize(
    ("kind", "text", "value", "unit"),
    [
        (Length, "50M tokens", 50_000_000, "tokens"),
        (Length, "2B tokens", 2_000_000_000, "tokens"),
        (Length, "64Ki tokens", 65_536, "tokens"),
        (Length, "1.5Gi tokens", 1_610_612_736, "tokens"),
        (Length, "1e9 tokens", 1_000_000_000, "tokens"),
        (Length, "3 epochs", 3, "epochs"),
        (Length, "0.5 epochs", 0.5, "epochs"),
        (Length, "1 epoch", 1, "epochs"),
        (Length, "20k steps", 20_000, "steps"),
        (Length, "1h30m", 5400, "seconds"),
        (Length, "1h 30m", 5400, "seconds"),
        (Length, "1.5h", 5400, "seconds"),
        (Length, "2d", 172_800, "seconds"),
        (Every, "500 steps", 500, "steps"),
        (Every, "5%", 5, "percent"),
        (Every, "0.5 %", 0.5, "percent"),
        (Every, "10m", 600, "seconds"),
        (Every, "never", 0, "never"),
        (Warmup, "2%", 2, "percent"),
        (Warmup, "0 steps", 0, "steps"),
        (Warmup, "never", 0, "steps"),
        (Batch, "32 samples", 32, "samples"),
        (Batch, "32K tokens", 32_000, "tokens"),
    ],
)
def test_an_amount_means_its_number_in_the_plain_unit(kind: type, text: str, value: float, unit: str) -> None:
    assert TypeAdapter(kind).validate_python(text) == Amount(value, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "value", "message", "hint"),
    [
        (Length, 3, "`3`: say what it counts: `3 epochs`, `3 steps` or `3 tokens`", ""),
        (Length, "3", "`3`: say what it counts: `3 epochs`, `3 steps` or `3 tokens`", ""),
        (Length, "5k", "`5k`: say what it counts: `5k steps` or `5k tokens`", ""),
        (Batch, 32, "`32`: say what it counts: `32 samples` or `32 tokens`", ""),
        (Warmup, 100, "`100`: say what it counts: `100 steps`, `100%` or `100 tokens`", ""),
        (Batch, "32 rows", "`32 rows` is not a batch", "did you mean `32 samples`?"),
        (Batch, "3 epochs", "`3 epochs` is not a batch", "write `32 samples` or `64Ki tokens`"),
        (Length, "3 eopchs", "`3 eopchs` is not a length", "did you mean `3 epochs`?"),
        (Length, "50m tokens", "`50m tokens` is not a length", "did you mean `50M tokens`?"),
        (Length, "2 hours", "`2 hours` is not a length", "did you mean `2h`?"),
        (Every, "off", "`off` is not an interval", "did you mean `never`?"),
        (Length, True, "`true` is not a length", "write `50M tokens`, `3 epochs`, `20k steps` or `1h30m`"),
        (Size, "10 bananas", "`10 bananas` is not a size", "write `512MB`, `4KiB` or a number of bytes"),
        (Duration, 90, "`90`: say what it counts: `90s` or `90m`", ""),
        (Ratio, 1.5, "`1.5` is not a share from 0 to 1", "write `0.02` or `2%`"),
        (Part, 1, "`1` is not a share from 0 to below 1", "write `0.02` or `2%`"),
        (Several, 1, "`1` is below 2, the least that makes sense here", ""),
        (Count, "8000", "`8000` is not a whole number", "write `8000`, `8k` (8,000) or `8Ki` (8,192)"),
    ],
)
def test_a_wrong_value_is_answered_with_what_would_work(
    kind: type, value: object, message: str, hint: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(value)
    (error,) = caught.value.errors()
    assert (error["ctx"]["message"], error["ctx"]["hint"]) == (message, hint)


@pytest.mark.parametrize(
    "text", ["0 steps", "0 tokens", "0%", "0s", "-3 steps", "1.5 steps", "101%", "", "m", "3 M tokens"]
)
def test_nothing_negative_zero_or_fractional_passes_for_an_interval(text: str) -> None:
    assert EVERY.match(text) is None


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Count, 8000, 8000),
        (Count, 8000.0, 8000),
        (Count, "8k", 8000),
        (Count, "8Ki", 8192),
        (Count, "1.5M", 1_500_000),
        (Size, "512MB", 512_000_000),
        (Size, "4 KiB", 4096),
        (Size, "7B", 7),
        (Size, 1000, 1000),
        (Duration, "90s", 90),
        (Ratio, "2%", 0.02),
        (Ratio, 0.02, 0.02),
        (Ratio, "100%", 1.0),
        (Part, "99.5%", 0.995),
    ],
)
def test_plain_numbers(kind: type, text: object, value: float) -> None:
    assert TypeAdapter(kind).validate_python(text) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (32_000, "32k"),
        (32_768, "32Ki"),
        (1_500_000, "1.5M"),
        (1001, "1001"),
        (0, "0"),
        (2**40, "1Ti"),
        (999, "999"),
    ],
)
def test_counts_are_written_in_their_shortest_exact_form(value: int, text: str) -> None:
    assert format_count(value) == text


def test_sizes_and_durations_are_written_in_their_shortest_exact_form() -> None:
    assert [format_size(100_000_000), format_size(4096), format_size(7)] == ["100MB", "4KiB", "7B"]
    assert [format_duration(s) for s in (5400, 90, 0.5, 90_061)] == ["1h30m", "1m30s", "0.5s", "25h1m1s"]


_WHOLE = st.integers(1, 10**18) | st.integers(1, 10**6).map(lambda n: n * 10**6)
_AMOUNTS = st.one_of(
    st.builds(Amount, _WHOLE, st.sampled_from(["tokens", "samples", "steps"])),
    st.builds(Amount, st.integers(1, 10**6).map(lambda n: n / 100), st.just("epochs")),
    st.builds(Amount, st.integers(1, 10_000).map(lambda n: n / 100), st.just("percent")),
    st.builds(Amount, st.integers(1, 10**8).map(lambda n: n / 10), st.just("seconds")),
    st.just(Amount(0, "never")),
)


@settings(max_examples=200, deadline=None)
@given(_AMOUNTS)
def test_every_amount_reads_back_from_its_text(amount: Amount) -> None:
    everything = Grammar(
        "anything", ("tokens", "samples", "steps", "epochs", "percent", "seconds", "never"), ()
    )
    assert everything.match(str(amount)) == amount


@settings(max_examples=300, deadline=None)
@given(
    st.from_regex(LENGTH.json_schema()["pattern"], fullmatch=True)
    | st.from_regex(EVERY.json_schema()["pattern"], fullmatch=True)
)
def test_whatever_is_accepted_has_a_canonical_spelling_of_the_same_value(text: str) -> None:
    for grammar in (LENGTH, EVERY):
        amount = grammar.match(text)
        if amount is not None:
            assert amount.value > 0 or amount.unit == "never"
            assert grammar.match(str(amount)) == amount


@settings(max_examples=300, deadline=None)
@given(
    st.from_regex(
        r"[0-9.]{0,4} ?(k|M|Ki|e3|)?( ?(tokens?|steps?|epochs?|samples?|%|h|m|s|never))?", fullmatch=True
    )
)
def test_the_json_schema_accepts_exactly_what_the_parser_accepts(text: str) -> None:
    for grammar in (LENGTH, EVERY, WARMUP, BATCH):
        by_schema = re.search(grammar.json_schema()["pattern"], text) is not None
        assert by_schema == (grammar.match(text) is not None), (grammar.kind, text)
