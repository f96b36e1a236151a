"""Normalising: what changes, what must not, and that doing it twice changes nothing more."""

import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.clean import normalise
from llmkit.data.clean.normalise import Normaliser
from llmkit.errors import MissingError
from llmkit.recipe.preparation import Normalise

OFF: dict[str, Any] = {"fix": False, "unicode": "keep", "control": False, "whitespace": False}


def only(**wanted: Any) -> Normaliser:
    return Normaliser(Normalise(**{**OFF, **wanted}))


def test_with_all_off_a_text_stays_as_it_is() -> None:
    text = "\ufeffschÃ¶n\u200b \r\n\n\n\n e\u0301 Ａ\x07 "
    assert only()(text) == text


@pytest.mark.parametrize(
    ("damaged", "repaired"),
    [
        ("schÃ¶n und grÃ¼n", "schön und grün"),
        ("â€œquotedâ€\x9d", "“quoted”"),
        ("voilÃ le travail", "voilà le travail"),
        ("The MonaÂ\xa0Lisa", "The Mona\xa0Lisa"),
        ("l\u2019Ã©tude", "l\u2019étude"),
        ("sound line\nschÃ¶n\nsound “line”", "sound line\nschön\nsound “line”"),
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚", "Привет"),
        ("it\x92s", "it’s"),
        ("\ud83d\ude00", "😀"),
        ("æ¬¢è¿Žä½\xa0", "欢迎你"),
    ],
)
def test_fix_repairs_encoding_damage(damaged: str, repaired: str) -> None:
    assert only(fix=True)(damaged) == repaired


@pytest.mark.parametrize(
    "sound",
    [
        "“curly” ‘quotes’ — and … dots",
        "他说：“你好！”……——（一）；Ａ１％　",
        "ﬁ ﬂ ligatures, ½ and ①, x² and 10³",
        "if a < b && c > d: print('&amp; &lt;')",
        "├── src\n│   └── main.py",
        "café, naïve, Ångström, Žižek, été à l’école",
        "Всё хорошо, καλημέρα, שלום, مرحبا, สวัสดี, 안녕, こんにちは",
        "👩‍👩‍👧 and 🏳️‍🌈",
        "\x1b[31mred\x1b[0m\r\n",
        "e\u0301",
    ],
)
def test_fix_leaves_sound_text_alone(sound: str) -> None:
    assert only(fix=True)(sound) == sound


def test_unicode_forms() -> None:
    text = "e\u0301 ﬁ Ａ ，①"
    assert only(unicode="nfc")(text) == "é ﬁ Ａ ，①"
    assert only(unicode="nfkc")(text) == "é fi A ,1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\nd\te", "a\nb\nc\nd\te"),
        ("a\x00\x07\x7f\x9fb", "ab"),
        ("page one\x0cpage two\x0bx\u2028y\x85z", "page one\npage two\nx\ny\nz"),
        ("\ufeffa\u200bb\u2060c\u00add", "abcd"),
        ("\u202eabc\u202c \u200fd\u200e", "abc d"),
        ("\x1b[1;31mred\x1b[0m \x1b[2Kplain\x1b", "red plain"),
        ("x\u200dy \u200c z\u200c", "xy  z"),
        ("hidden\U000e0068\U000e0069 text", "hidden text"),
    ],
)
def test_control_takes_out_what_is_not_seen(text: str, expected: str) -> None:
    assert only(control=True)(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم",
        "क्\u200dष और क्\u200cष",
        "👨\u200d👩\u200d👧",
        "❤\ufe0f\u200d🔥",
        "🏴\U000e0067\U000e0062\U000e007f",
        "葛\U000e0100",
    ],
)
def test_control_keeps_what_spells_words_and_emoji(text: str) -> None:
    assert only(control=True)(text) == text


def test_half_width_keeps_chinese_punctuation() -> None:
    assert (
        only(half_width=True)("Ａｂｃ１２３％＋＝＠．／　x，！？：；（）～。、【】")
        == "Abc123%+=@./ x，！？：；（）～。、【】"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a  \nb\t\n\n\n\n\nc\n\n", "a\nb\n\nc"),
        ("def f():\n\tif x:\n        return  1   # why\n", "def f():\n\tif x:\n        return  1   # why"),
        ("\n \n    indented\n    code\n", "    indented\n    code"),
        ("   one line  ", "one line"),
        ("　　第一段。　\n　　第二段。", "　　第一段。\n　　第二段。"),
        (" \n\t\n ", ""),
        ("", ""),
    ],
)
def test_whitespace_tidies_and_keeps_indentation(text: str, expected: str) -> None:
    assert only(whitespace=True)(text) == expected


PAGE = """<!doctype html><html><head><title>T</title><style>p{color:red}</style><script>var a = 1;</script></head>
<body><nav><ul><li><a href="/">Home</a><li><a href="/x">About us</a></ul></nav><main><h1>Heading</h1>
<p>First paragraph &amp; more of it, which is long enough to be content.</p><pre>
def f(x):
    return x
</pre><p>第二段：“中文”内容。</p></main><footer>Copyright 2020</footer></body></html>"""


def test_html_keeps_the_main_text() -> None:
    text = Normaliser(Normalise(html=True))(PAGE)
    assert text.split("\n\n") == [
        "Heading",
        "First paragraph & more of it, which is long enough to be content.",
        "def f(x):\n    return x",
        "第二段：“中文”内容。",
    ]


def test_html_leaves_a_text_without_tags_alone() -> None:
    text = "a < b\n\n    and c > d &amp;\n\nend"
    assert Normaliser(Normalise(html=True))(text) == text


@pytest.mark.parametrize(("setting", "module"), [("fix", "ftfy"), ("html", "resiliparse.extract.html2text")])
def test_a_missing_package_is_named_with_its_command(
    setting: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    normalise._fixer.cache_clear()
    normalise._html_to_text.cache_clear()
    with pytest.raises(MissingError, match=f"normalise.{setting}") as caught:
        only(**{setting: True})
    assert caught.value.hint == "pip install 'llmkit[clean]'"


PIECES = st.sampled_from(
    ["a", "b ", " ", "\n", "\r", "\t", ".", "Ã", "Â", "â€", "™", "œ", "©", "ä", "\x80", "\x92", "\xa0", "é", "\u0301",
     "\u200b", "\u200c", "\u200d", "\ufeff", "\xad", "\ufe0f", "❤", "👨", "🏴", "\U000e0067", "\x1b[0m", "\x1b", "[0m",
     "\x00", "\x0c", "\x85", "\u2028", "，。", "我", "“", "”", "…", "—", "Ａ", "１", "　", "ﬁ", "½", "ﾊﾞ", "가", "ᄀ",
     "\u1161", "م", "\u0915", "\u094d", "├─", "\ufffd", "\ud83d", "\ude00", "ÐŸ", "Å“"]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.lists(PIECES, max_size=30).map("".join) | st.text(max_size=40),
    st.sampled_from(["keep", "nfc", "nfkc"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_twice_is_once(text: str, form: str, flags: tuple[bool, bool, bool, bool]) -> None:
    fix, control, half_width, whitespace = flags
    normaliser = only(unicode=form, fix=fix, control=control, half_width=half_width, whitespace=whitespace)
    once = normaliser(text)
    assert normaliser(once) == once
    if form != "keep":
        assert unicodedata.is_normalized(form.upper(), once)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=60))
def test_the_fast_way_for_ascii_gives_the_same(text: str) -> None:
    normaliser = Normaliser(Normalise())
    assert normaliser(text) == normaliser._once(text)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "piece",
    [
        "a",
        " ",
        "\n",
        "\n ",
        "\x1b[",
        "\x1b[1;",
        "\u200d",
        "👨\u200d",
        "Ã",
        "Ã©",
        "â€",
        "…",
        "a\u0301",
        "我",
        "<",
        "Ａ",
    ],
)
def test_a_megabyte_of_anything_takes_linear_time(piece: str) -> None:
    text = piece * (1_000_000 // len(piece)) + " end"
    assert Normaliser(Normalise(half_width=True))(text).endswith("nd")
