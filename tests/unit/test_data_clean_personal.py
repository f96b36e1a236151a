"""Personal data: published examples, planted data counted, what must stay, a detector of one's own, linear time."""

import random
import string
import sys
import types
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.clean import checksums
from llmkit.data.clean.finds import Find, resolve
from llmkit.data.clean.personal import PersonalDataMarker
from llmkit.errors import DataError, RecipeError
from llmkit.recipe.preparation import PersonalData

ALL = PersonalDataMarker(PersonalData())


def marked(text: str) -> str:
    return ALL(text)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # mail
        ("Write to john.doe+news@mail.example.co.uk, please.", "Write to [MAIL], please."),
        ("<a_b@c-d.org> and mailto:x@y.io.", "<[MAIL]> and mailto:[MAIL]."),
        ("邮箱zhang_san@qq.com。谢谢", "邮箱[MAIL]。谢谢"),
        ("O@163.com", "[MAIL]"),
        # phone
        ("Call (212) 555-0199 or 212-555-0199 or 1-800-555-0199.", "Call [PHONE] or [PHONE] or [PHONE]."),
        ("+49 151 12345678, +4915112345678, +1 (212) 555-0199", "[PHONE], [PHONE], [PHONE]"),
        ("0049 30 1234567; 001-212-555-0199", "[PHONE]; [PHONE]"),
        ("手机13800138000，或138-0013-8000、138 0013 8000", "手机[PHONE]，或[PHONE]、[PHONE]"),
        ("+86 13800138000 008613800138000", "[PHONE] [PHONE]"),
        ("010-12345678转8001", "010-12345678转8001"),
        ("010-62345678，(0755)-23456789", "[PHONE]，[PHONE]"),
        ("Tel.: 030 1234567, Fax 020 7946 0958", "Tel.: [PHONE], Fax [PHONE]"),
        ("电话：87654321", "电话：[PHONE]"),
        # national ids
        ("身份证号11010519491231002X。", "身份证号[ID]。"),
        ("SSN 123-45-6789,", "SSN [ID],"),
        ("Steuer-ID 86 095 742 719 oder 86095742719", "Steuer-ID [ID] oder [ID]"),
        ("NIR 2 55 08 14 168 025 38 et 255081416802538", "NIR [ID] et [ID]"),
        ("1 84 12 2A 451 089 33", "[ID]"),
        ("DNI 12345678Z, 12345678-Z, NIE X1234567L", "DNI [ID], [ID], NIE [ID]"),
        ("codice fiscale MRTMTT91D08F205J", "codice fiscale [ID]"),
        # cards
        ("4111 1111 1111 1111, 4111-1111-1111-1111 4111111111111111", "[CARD], [CARD] [CARD]"),
        ("378282246310005 and 3782 822463 10005", "[CARD] and [CARD]"),
        ("5555555555554444 2223003122003222 6011111111111117 3530111333300000", "[CARD] [CARD] [CARD] [CARD]"),
        ("30569309025904", "[CARD]"),
        # accounts
        ("DE89370400440532013000, DE89 3704 0044 0532 0130 00", "[IBAN], [IBAN]"),
        ("IBAN: GB29 NWBK 6016 1331 9268 19 BIC NWBKGB2L", "IBAN: [IBAN] BIC NWBKGB2L"),
        ("NO93 8601 1117 947. MT84MALT011000012345MTLCAST001S", "[IBAN]. [IBAN]"),
        # addresses
        ("from 203.0.112.77:8080 and 8.8.4.200", "from [IP]:8080 and [IP]"),
        ("[2a00:1450:4001:81b::200e]:443 2606:4700:4700::1111", "[[IP]]:443 [IP]"),
        # secrets
        ("AKIAIOSFODNN7EXAMPLE", "[SECRET]"),
        ("token ghp_" + "aB3" * 12, "token [SECRET]"),
        ("github_pat_11ABCDEFG0123456789abcdefghij", "[SECRET]"),
        ("glpat-abcdEFGH1234ijkl5678", "[SECRET]"),
        ("xoxb-123456789012-abcdefghijkl", "[SECRET]"),
        ("sk_" + "live_4eC39HqLyjWDarjtT1zdp7dc", "[SECRET]"),
        ("AIza" + "SyA1234567890abcdefghijklmnopqrstuv", "[SECRET]"),
        ("sk-proj-Ab1Cd2Ef3Gh4Ij5Kl6Mn7", "[SECRET]"),
        ("hf_" + "abcdefGHIJ" * 3 + "kl12", "[SECRET]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0", "[SECRET]"),
        ("postgres://admin:s3cr3t@db.example.com:5432/x", "postgres://[SECRET]:5432/x"),
        ("PASSWORD=hunter2x\nnext", "PASSWORD=[SECRET]\nnext"),
        ('api_key = "a8f5f167f44f4964e6c9"', 'api_key = "[SECRET]"'),
        ('{"client_secret": "Zq81-xyTT0"}', '{"client_secret": "[SECRET]"}'),
        ("密码：abc12345，请", "密码：[SECRET]，请"),
        ("a\n-----BEGIN RSA PRIVATE KEY-----\nMIIEow==\n-----END RSA PRIVATE KEY-----\nb", "a\n[SECRET]\nb"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE\nabc+/=\n\n(cut off)", "[SECRET]\n\n(cut off)"),
    ],
)  # fmt: skip
def test_found(text: str, expected: str) -> None:
    assert marked(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "icon@2x.png @decorator user@ @host a@b git@github.com:owner/repo.git a..b@@c",
        "lodash@4.17.21 and 5 @ 3.50",
        "In 2020-2021, 1,234,567.89 of 3.14159265358979 on 2024-01-15 10:20:30.123456",
        "ISBN 978-3-16-148410-0, ISSN 2049-3630, pages 100-200, 1 2 3 4 5 6 7 8 9 10 11 12",
        "0x12345678901234567 4111111111111112 4111 1111 1111 1112 1234567890123456",
        "0.13800138000 13800138000.5 x13800138000 113800138000 138001380001 12800138000",
        "110105194912310021 110105194913310028 99010519491231002X",
        "000-12-3456 666-12-3456 912-12-3456 123-00-4567 123-45-0000 123-45-67890 1-123-45-6789",
        "86095742718 00000000000 12345678901 12345678A X1234567A RSSMRA85T10A562T",
        "DE89370400440532013001 DE8937040044053201300 XX89370400440532013000 GB29 NWBK 6016 1331 9268 18",
        "10.0.0.1 192.168.255.1 127.0.0.1 169.254.1.200 255.255.255.0 224.0.0.251 192.0.2.200 0.0.0.0",
        "1.2.3.4 2.6.18.53 256.100.1.1 01.200.3.4 1.200.3.4.5 v1.200.3.4 version 1.200.3.4",
        "12:34:56 std::vector a::b ::1 fe80::1 2001:db8::1 2001:zz::1 20:01:20:01:20:01",
        "sk-loading-indicator-wrapper-large AKIA AKIAIOSFODNN7EXAMPLEX ghp_short eyJhbGci.x.y",
        'password = getpass.getpass() token = tokens[i] secret: str = "" api_key=${API_KEY} password: ********',
        "The password is changed. Your token is here. secret = secret_name token = table2",
        "https://example.com:8080/a@b http://host/path:x@y",
        "-----BEGIN PUBLIC KEY-----\nMIIE\n-----END PUBLIC KEY-----",
        "+1234567 x+12345678901 1+49 a++25112345678",
        "[MAIL] [PHONE] [ID] [CARD] [IBAN] [IP] [SECRET]",
    ],
)
def test_left_alone(text: str) -> None:
    assert ALL(text) == (text, {})


DIGITS = string.digits


def _digits(rng: random.Random, n: int) -> str:
    return "".join(rng.choice(DIGITS) for _ in range(n))


def _mail(rng: random.Random) -> str:
    name, host = ("".join(rng.choices(string.ascii_lowercase, k=n)) for n in (6, 5))
    return f"{name}.{_digits(rng, 2)}@{host}.com"


def _phone(rng: random.Random) -> str:
    return rng.choice(
        [
            f"1{rng.randint(3, 9)}{_digits(rng, 9)}",
            f"+44 20 {_digits(rng, 4)} {_digits(rng, 4)}",
            f"(312) 555-{_digits(rng, 4)}",
        ]
    )


def _resident(rng: random.Random) -> str:
    born = f"{rng.randint(1940, 2010)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
    body = f"44030{rng.randint(1, 9)}{born}{_digits(rng, 3)}"
    # The weights of GB 11643 are 2 to the place, modulo 11.
    total = sum(int(d) * (2 ** (17 - i) % 11) for i, d in enumerate(body))
    return body + "0123456789X"[(12 - total % 11) % 11]


def _card(rng: random.Random) -> str:
    body = "4" + _digits(rng, 14)
    doubled = [int(d) * 2 if i % 2 == 0 else int(d) for i, d in enumerate(body)]
    number = body + str(-sum(v // 10 + v % 10 for v in doubled) % 10)
    return " ".join(number[i : i + 4] for i in range(0, 16, 4)) if rng.random() < 0.5 else number


def _iban(rng: random.Random) -> str:
    account = _digits(rng, 18)
    check = 98 - int(account + "131400") % 97  # D is 13, E is 14
    number = f"DE{check:02}{account}"
    return " ".join(number[i : i + 4] for i in range(0, 22, 4)) if rng.random() < 0.5 else number


def _ip(rng: random.Random) -> str:
    return f"{rng.randint(101, 126)}.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}"


def _secret(rng: random.Random) -> str:
    letters = string.ascii_letters + string.digits
    return rng.choice(
        [
            f"AKIA{''.join(rng.choices(string.ascii_uppercase, k=16))}",
            f"ghp_{''.join(rng.choices(letters, k=36))}",
        ]
    )


MAKERS: dict[str, Callable[[random.Random], str]] = {
    "mail": _mail, "phone": _phone, "id": _resident, "card": _card, "iban": _iban, "ip": _ip, "secret": _secret,
}  # fmt: skip
FILLERS = [
    "Ann met Bob at 10:30 on 2024-05-06, room 1204, for $1,234.56.",
    "见第3章第12节，共128页，价格99.5元。",
    "Order 2024-000123 weighs 12.5 kg; see RFC 2119, section 4.1.2.",
    "版本为3.11.4，发布于2023年6月6日。",
]


@pytest.mark.parametrize("kind", list(MAKERS))
def test_planted_data_is_found_and_nothing_else(kind: str) -> None:
    rng = random.Random(7)
    planted = [MAKERS[kind](rng) for _ in range(300)]
    text = "\n".join(f"{rng.choice(FILLERS)} {item} {rng.choice(FILLERS)}" for item in planted)
    found = [text[f.start : f.stop] for f in resolve(ALL.finds(text)) if f.kind == kind]
    hits = sum((Counter(found) & Counter(planted)).values())
    assert hits / len(planted) >= 0.97  # an address may be private, a number's form may be two kinds at once
    assert hits == len(found)
    after, counts = ALL(text)
    assert counts[kind] >= hits
    assert not any(item in after for item in planted if item in found)


@pytest.mark.parametrize("kind", ["id", "card", "iban"])
def test_wrong_check_digits_are_left_alone(kind: str) -> None:
    rng = random.Random(11)
    marker = PersonalDataMarker(PersonalData(kinds=[kind]))  # type: ignore[list-item]
    wrong = []
    for _ in range(300):
        item = MAKERS[kind](rng)
        place = item.rindex(rng.choice([c for c in item[-3:] if c.isdigit()]))
        other = rng.choice([d for d in DIGITS if d != item[place]])
        wrong.append(item[:place] + other + item[place + 1 :])
    assert sum(marker(f"no {item}.")[1].get(kind, 0) for item in wrong) == 0


def test_checksums_of_published_examples() -> None:
    assert checksums.chinese_resident("34052419800101001X")
    assert checksums.luhn("79927398713")
    assert not checksums.luhn("79927398710")
    assert checksums.german_tax("47036892816")
    assert checksums.french_insee("255081416802538")
    assert checksums.spanish_identity("12345678Z")
    assert checksums.italian_fiscal("RSSMRA85T10A562S")
    assert checksums.iban("GB82WEST12345698765432")


def test_kinds_can_be_chosen() -> None:
    text = "a@b.com 13800138000 8.8.4.200"
    assert PersonalDataMarker(PersonalData(kinds=["ip"]))(text) == ("a@b.com 13800138000 [IP]", {"ip": 1})
    assert PersonalDataMarker(PersonalData(kinds=[]))(text) == (text, {})


def test_counts_are_of_marks_set() -> None:
    assert ALL("a@b.com, c@d.org 13800138000")[1] == {"mail": 2, "phone": 1}


def test_overlapping_finds_become_one_that_covers_all() -> None:
    finds = [
        Find(0, 5, "phone"),
        Find(3, 9, "card"),
        Find(8, 10, "id"),
        Find(10, 12, "mail"),
        Find(10, 12, "secret"),
    ]
    assert resolve(finds) == [Find(0, 10, "card"), Find(10, 12, "secret")]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda a, n, k: Find(a, a + n, k),
            st.integers(0, 30),
            st.integers(1, 9),
            st.sampled_from(["id", "ip", "x", "y"]),
        ),
        max_size=12,
    ),
    st.randoms(),
)
def test_the_order_of_finds_does_not_matter(finds: list[Find], rng: random.Random) -> None:
    shuffled = finds.copy()
    rng.shuffle(shuffled)
    result = resolve(finds)
    assert result == resolve(shuffled)
    assert {i for f in result for i in range(f.start, f.stop)} == {
        i for f in finds for i in range(f.start, f.stop)
    }
    assert all(a.stop <= b.start for a, b in pairwise(result))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab.@:/=-+ ()019AZ我\n", max_size=60))
def test_marking_twice_is_marking_once(text: str) -> None:
    once, _ = ALL(text)
    again, counts = ALL(once)
    assert (again, counts) == (once, {}) or len(again) <= len(once) + 9


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "piece",
    ["a", "1", "1.", "1 ", "1-", "+1", "(1", "00 ", "@", "a@", "a.a@a.", "0123456789abcdef", "2abc:", "://a:", "a:",
     "password=", "password: a1", "token ", "-----BEGIN RSA PRIVATE KEY-----", "eyJ", "eyJaaaaaaaaa.", "sk-", "xoxb-",
     "AKIA", "DE89", "DE89 3704 ", "AB12", "ABCDEF12", "tel 1234567 ", "version 1.1.1.", "我", " "],
)  # fmt: skip
def test_a_megabyte_of_anything_takes_linear_time(piece: str) -> None:
    after, counts = ALL(piece * (1_000_000 // len(piece)))
    assert after.count("[") >= sum(counts.values())


def names(text: str) -> list[tuple[int, int, str]]:
    """A detector: every `Ann` is a name."""
    return [(i, i + 3, "Name") for i in range(len(text)) if text.startswith("Ann", i)]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("my_recogniser")
    monkeypatch.setitem(sys.modules, "my_recogniser", module)
    return module


def test_a_detector_of_ones_own(plugin: types.ModuleType) -> None:
    plugin.find = names  # type: ignore[attr-defined]
    marker = PersonalDataMarker(PersonalData(kinds=["mail"], detector="my_recogniser:find"))
    assert marker("Ann (ann@b.com) and Ann@b.com") == ("[NAME] ([MAIL]) and [MAIL]", {"name": 1, "mail": 2})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "gave None"),
        ([(0, 1)], r"gave \(0, 1\)"),
        (["abc"], "gave 'abc'"),
        ([(0, 99, "name")], "gave the place 0 to 99 in a text of 5 characters"),
        ([(3, 3, "name")], "place 3 to 3"),
        ([(-1, 2, "name")], "place -1 to 2"),
        ([(0.0, 2, "name")], "place 0.0"),
        ([(0, 2, "two words")], "kind 'two words'"),
        ([(0, 2, 7)], "kind 7"),
    ],
)
def test_a_wrong_detector_is_named(given: object, message: str, plugin: types.ModuleType) -> None:
    plugin.find = lambda text: given  # type: ignore[attr-defined]
    marker = PersonalDataMarker(PersonalData(detector="my_recogniser:find"))
    with pytest.raises(DataError, match=message) as caught:
        marker("hello")
    assert "my_recogniser:find" in caught.value.message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_recogniser", "names no function"),
        ("my_recogniser:", "names no function"),
        ("no_such_package_x:find", "cannot be imported"),
        ("my_recogniser:absent", "has no function 'absent'"),
    ],
)
def test_a_detector_that_is_not_there(name: str, message: str, plugin: types.ModuleType) -> None:
    with pytest.raises(RecipeError, match=message):
        PersonalDataMarker(PersonalData(detector=name))
