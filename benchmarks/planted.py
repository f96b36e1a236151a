"""Documents whose right treatment is known: what preparation should drop, repair or mark, and what it should leave.

`make_planted` strews them among clean documents. Each has a label, which says what it is:

| `kind` | what | further entries |
|---|---|---|
| `exact copy` | the same text again | `of`: the original's id |
| `near copy` | 2 to 15 % of the words replaced | `of`, `edits` (share), `how`: scattered, block, cut |
| `foreign` | French, German, Russian, Japanese, Chinese | `language` |
| `boilerplate` | menus, cookie banners, filler text, link lists | `sort` |
| `damaged` | decoded wrongly, control characters, HTML's marks | `sort`, `repaired`: the text as it should be |
| `personal` | prose with personal data | `values`: (kind, value) pairs |
| `decoy` | prose with what only looks like personal data | `values`: (sort, value) pairs |
| `evaluation` | prose with a passage of `evaluation_texts` | `words`: how many of it in a row |

Everything is made from a seed; no number, mail address or key belongs to anyone.
"""

import ast
import random
import re
import string
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PER_KIND = 40
EDITS = (0.02, 0.05, 0.1, 0.15)
_SENTENCE = re.compile(r"[A-Z][a-z]+(?: [a-z]{1,20},?| [A-Z][a-z]{1,20}){5,40}\.")
_ALNUM = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Document:
    """A text, its number, and its label; clean ones have none."""

    id: int
    text: str
    label: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        """What it is: `clean` or the label's kind."""
        return self.label["kind"] if self.label else "clean"


# --- clean text ---------------------------------------------------------------------------------------------


@cache
def sentences() -> tuple[str, ...]:
    """English sentences, from the docstrings of the Python standard library."""
    found: dict[str, None] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")):
        try:
            nodes = ast.walk(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for text in (ast.get_docstring(node) for node in nodes if isinstance(node, kinds)):
            found.update(dict.fromkeys(_SENTENCE.findall(" ".join((text or "").split()))))
    return tuple(found)


def prose(count: int, seed: int = 0) -> list[str]:
    """`count` English documents of 8 to 30 sentences in paragraphs."""
    rng = random.Random(f"prose {seed}")
    documents = []
    for _ in range(count):
        chosen = rng.sample(sentences(), rng.randint(8, 30))
        paragraphs = [" ".join(chosen[i : i + 5]) for i in range(0, len(chosen), 5)]
        documents.append("\n\n".join(paragraphs))
    return documents


@cache
def evaluation_texts(count: int = 20, seed: int = 0) -> tuple[str, ...]:
    """Questions of an imagined evaluation set; their words stand in no clean document in this order."""
    rng = random.Random(f"evaluation {seed}")
    words = sorted({word for sentence in sentences() for word in re.findall(r"[a-z]{3,}", sentence)})
    return tuple(" ".join(rng.sample(words, 40)) + "?" for _ in range(count))


# --- text in other languages, boilerplate, damage -----------------------------------------------------------

_FOREIGN: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str]] = {
    "fr": (
        ("Le vieux jardinier", "Notre voisine", "La petite école du village", "Un marchand de tissus"),
        (
            "arrosait chaque matin",
            "regardait depuis la fenêtre",
            "décrivait avec patience",
            "aurait voulu revoir",
        ),
        ("les pommiers de la vallée", "une lettre arrivée trop tard", "le marché près de la rivière"),
        " {} {} {}, mais personne ne s'en souvenait.",
    ),
    "de": (
        ("Der alte Gärtner", "Unsere Nachbarin", "Die kleine Schule im Dorf", "Ein Händler aus der Stadt"),
        (
            "beobachtete jeden Morgen",
            "beschrieb sehr geduldig",
            "wollte noch einmal sehen",
            "verkaufte schließlich",
        ),
        ("die Apfelbäume im Tal", "einen Brief, der zu spät kam", "den Markt am Fluss"),
        " {} {} {}, aber niemand erinnerte sich daran.",
    ),
    "ru": (
        ("Старый садовник", "Наша соседка", "Учитель из деревни", "Торговец из города"),
        ("каждое утро видел", "терпеливо описывал", "хотел снова увидеть", "наконец продал"),
        ("яблони в долине", "письмо, пришедшее слишком поздно", "рынок у реки"),
        " {} {} {}, но никто об этом не помнил.",
    ),
    "ja": (
        ("年老いた庭師は", "隣の奥さんは", "村の先生は", "町の商人は"),
        ("毎朝", "窓から静かに", "何度も丁寧に", "もう一度だけ"),
        (
            "谷の林檎の木を眺めていました",
            "遅れて届いた手紙を読み返していました",
            "川沿いの市場について話していました",
        ),
        "{}{}{}が、誰もそれを覚えていませんでした。",
    ),
    "zh": (
        ("年老的园丁", "我们的邻居", "村里的老师", "城里的商人"),
        ("每天早上都", "从窗口静静地", "非常耐心地", "总想再一次"),
        ("看着山谷里的苹果树", "读那封来得太晚的信", "谈起河边的集市"),
        "{}{}{}，可是没有人记得这件事。",
    ),
}
_MENU = (
    *("Home", "Products", "Services", "About us", "Contact", "Log in", "Sign up", "Cart (0)", "Help", "FAQ"),
    *("Careers", "Press", "Blog", "Imprint", "Terms of use", "Privacy policy", "Newsletter", "Follow us"),
    *("Share on Facebook", "Share on Twitter", "Next »", "« Previous", "Read more...", "Back to top"),
)
_COOKIES = (
    "We use cookies to give you the best experience on our website.",
    "By clicking Accept all cookies you agree to the storing of cookies on your device.",
    "Please enable JavaScript in your browser to view this page.",
    "Manage your cookie settings or read our privacy policy.",
)
_FILLER = (
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore et dolore "
    "magna aliqua. Ut enim ad minim veniam, quis nostrud exercitation ullamco laboris nisi ut aliquip ex ea commodo "
    "consequat."
)


def foreign(language: str, rng: random.Random) -> str:
    """A text of some 600 characters in one of the languages of `_FOREIGN`."""
    who, does, what, form = _FOREIGN[language]
    lines = [
        form.format(rng.choice(who), rng.choice(does), rng.choice(what)).strip()
        for _ in range(18 if language in ("ja", "zh") else 9)
    ]
    return ("" if language in ("ja", "zh") else " ").join(lines)


def boilerplate(sort: str, rng: random.Random) -> str:
    """A page without content: `menu`, `cookies`, `filler`, `links` or `repeated`."""
    if sort == "menu":
        return "\n".join(rng.choices(_MENU, k=rng.randint(60, 120)))
    if sort == "cookies":
        return "\n".join(rng.choices(_COOKIES, k=rng.randint(12, 25)))
    if sort == "filler":
        return "\n\n".join([_FILLER] * rng.randint(2, 5))
    if sort == "links":
        return "\n".join(
            f"• {rng.choice(_MENU)} | {rng.choice(_MENU)} ..." for _ in range(rng.randint(40, 80))
        )
    return "\n".join([rng.choice(sentences())] * rng.randint(8, 20))


BOILERPLATE = ("menu", "cookies", "filler", "links", "repeated")


def damaged(sort: str, text: str) -> tuple[str, str]:
    """The text damaged, and as it should be after repair."""
    accented = text.replace("e ", "é ").replace("o ", "ö ")
    if sort == "mojibake":
        return accented.encode().decode("latin-1"), accented
    if sort == "decomposed":
        return accented.replace("é", "e\u0301").replace("ö", "o\u0308"), accented
    if sort == "control":
        return text.replace("a", "a\u200b", 5).replace("t", "t\x00", 5) + "\ufeff", text
    return "\ufeff" + text.replace("\n", "  \n\n\n\n"), text  # blanks at line ends and empty lines


DAMAGE = ("mojibake", "decomposed", "control", "blanks")


# --- personal data and what looks like it -------------------------------------------------------------------


def luhn_digit(digits: str) -> str:
    """The digit that makes the number pass the Luhn check (ISO/IEC 7812-1, annex B)."""
    total = sum(int(d) if i % 2 else sum(divmod(2 * int(d), 10)) for i, d in enumerate(reversed(digits)))
    return str(-total % 10)


def chinese_id_digit(digits: str) -> str:
    """The last character of an 18-character resident number (GB 11643-1999: ISO 7064 mod 11-2)."""
    return "10X98765432"[sum(int(d) * pow(2, 17 - i, 11) for i, d in enumerate(digits)) % 11]


def iban_of(country: str, account: str) -> str:
    """An IBAN with its check digits (ISO 13616: mod 97)."""
    number = "".join(str(int(c, 36)) for c in f"{account}{country}00")
    return f"{country}{98 - int(number) % 97:02d}{account}"


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def _mail(rng: random.Random) -> str:
    name = rng.choice(("anna.meier", "j_smith", "li-wei", "office+news", "r.d.jones", "kontakt", "zhang88"))
    host = rng.choice(("firma-nord.de", "mail.uni-west.edu", "post.co.uk", "bluebird.io", "qq.com"))
    return f"{name}{rng.randint(1, 999)}@{host}"


def _phone(rng: random.Random) -> str:
    d = _digits(rng, 11)
    return rng.choice(
        (
            f"+49 170 {rng.randint(2, 9)}{d[:6]}",
            f"(4{rng.randint(10, 79)}) {rng.randint(2, 9)}{d[:2]}-{d[2:6]}",
            f"+1-212-{rng.randint(2, 9)}{d[:2]}-{d[2:6]}",
            f"13{rng.choice('56789')}{d[:8]}",
            f"+86 15{rng.choice('012356789')} {d[:4]} {d[4:8]}",
            f"+44 20 7{d[:3]} {d[3:7]}",
        )
    )


def _chinese_id(rng: random.Random) -> str:
    area = rng.choice(("110101", "310104", "440305", "510107", "330106"))
    date = f"{rng.randint(1950, 2005)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}"
    digits = f"{area}{date}{_digits(rng, 3)}"
    return digits + chinese_id_digit(digits)


def _card_digits(rng: random.Random) -> str:
    front = rng.choice(("4", "51", "53", "4539"))
    digits = front + _digits(rng, 15 - len(front))
    return digits + luhn_digit(digits)


def _grouped(number: str, by: str) -> str:
    return by.join(number[i : i + 4] for i in range(0, len(number), 4))


def _card(rng: random.Random) -> str:
    return _grouped(_card_digits(rng), rng.choice(("", " ", "-")))


def _iban(rng: random.Random) -> str:
    country, account = rng.choice(
        (
            ("DE", _digits(rng, 18)),
            ("GB", "NWBK" + _digits(rng, 14)),
            ("NL", "ABNA" + _digits(rng, 10)),
            ("FR", _digits(rng, 23)),
        )
    )
    return _grouped(iban_of(country, account), rng.choice(("", " ")))


def _ip(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return "2001:" + ":".join(f"{rng.randint(0x100, 0xFFFF):x}" for _ in range(7))
    return f"{rng.choice((23, 81, 104, 185, 203))}.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}"


def _secret(rng: random.Random) -> str:
    def some(count: int, of: str = _ALNUM) -> str:
        return "".join(rng.choices(of, k=count))

    return rng.choice(
        (
            "AKIA" + some(16, string.ascii_uppercase + "234567"),
            "ghp_" + some(36),
            "sk-" + some(48),
            "xoxb-" + _digits(rng, 12) + "-" + _digits(rng, 12) + "-" + some(24),
            f"eyJ{some(20)}.eyJ{some(40)}.{some(43)}",
            "AIza" + some(35),
            f"-----BEGIN RSA PRIVATE KEY-----\n{some(64)}\n{some(64)}\n-----END RSA PRIVATE KEY-----",
        )
    )


PERSONAL: dict[str, Callable[[random.Random], str]] = {
    "mail": _mail,
    "phone": _phone,
    "id": _chinese_id,
    "card": _card,
    "iban": _iban,
    "ip": _ip,
    "secret": _secret,
}


def _wrong(number: str) -> str:
    """The number with another last digit, so that its check fails."""
    return number[:-1] + str((int(number[-1], 11) + 3) % 10 if number[-1] != "X" else 5)


def _id_wrong(rng: random.Random) -> str:
    return _wrong(_chinese_id(rng))


def _card_wrong(rng: random.Random) -> str:
    return _grouped(_wrong(_card_digits(rng)), rng.choice(("", " ", "-")))


def _iban_wrong(rng: random.Random) -> str:
    return _wrong(iban_of("DE", _digits(rng, 18)))


def _version(rng: random.Random) -> str:
    return f"{rng.randint(0, 12)}.{rng.randint(0, 40)}.{rng.randint(0, 30)}"


def _not_an_ip(rng: random.Random) -> str:
    return rng.choice(("256.1.2.3", "300.400.1.1", "1.2.3.4.5", "12:34:56", "std::vector", "x[::2]", "10:45"))


def _not_a_mail(rng: random.Random) -> str:
    return rng.choice(("@property", "git@", "a @ b", "foo(at)bar", "weights@inputs", "v@1", "@mention"))


def _number(rng: random.Random) -> str:
    return rng.choice(
        (
            f"{rng.randint(1900, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
            f"{rng.randint(1, 9)},{_digits(rng, 3)},{_digits(rng, 3)}",
            f"0.{_digits(rng, 8)}",
            f"{rng.randint(1000, 9999)}-{rng.randint(1000, 9999)}",
            f"3.{_digits(rng, 15)}",
        )
    )


def _not_a_secret(rng: random.Random) -> str:
    return rng.choice(
        (
            "".join(rng.choices("0123456789abcdef", k=40)),
            "sk-learn",
            "AKIAshort",
            "the password field",
            "xoxo-hugs",
            "scikit-learn-intelligence-extension",
        )
    )


DECOYS: dict[str, Callable[[random.Random], str]] = {
    "id, wrong check": _id_wrong,
    "card, wrong check": _card_wrong,
    "iban, wrong check": _iban_wrong,
    "version": _version,
    "no ip": _not_an_ip,
    "no mail": _not_a_mail,
    "number": _number,
    "no secret": _not_a_secret,
}
_CARRIERS = (
    "As noted in the margin, the entry read {} and nothing else was said about it.",
    "They wrote down {} before the meeting came to an end.",
    "The second column holds {}, which was copied by hand.",
    "请在表格中填写{}，然后交给老师。",
)


def _with_values(
    text: str, sorts: dict[str, Callable[[random.Random], str]], rng: random.Random
) -> tuple[str, list[tuple[str, str]]]:
    """The text with three sentences that hold values."""
    values = [(sort, sorts[sort](rng)) for sort in rng.sample(sorted(sorts), 3)]
    added = "\n\n".join(rng.choice(_CARRIERS).format(value) for _, value in values)
    return f"{text}\n\n{added}", values


# --- copies -------------------------------------------------------------------------------------------------


def edited(text: str, share: float, how: str, vocabulary: Sequence[str], rng: random.Random) -> str:
    """The text with `share` of its words replaced at random places, in one block, or cut off at the end."""
    pieces = re.split(r"(\s+)", text)
    places = list(range(0, len(pieces), 2))
    count = max(1, round(share * len(places)))
    if how == "cut":
        return "".join(pieces[: places[-count]]).rstrip()
    start = rng.randrange(len(places) - count + 1)
    for place in rng.sample(places, count) if how == "scattered" else places[start : start + count]:
        pieces[place] = rng.choice([word for word in rng.choices(vocabulary, k=4) if word != pieces[place]])
    return "".join(pieces)


# --- all together -------------------------------------------------------------------------------------------


def make_planted(clean: Sequence[str], *, seed: int = 0, per_kind: int = PER_KIND) -> list[Document]:
    """The clean documents, numbered as they come, and `per_kind` planted ones of each kind, all shuffled.

    Args:
        clean: Distinct texts of more than 100 words, at least `per_kind`.
        seed: Decides everything.
        per_kind: Planted documents of each kind.
    """
    rng = random.Random(f"planted {seed}")
    vocabulary = sorted({word for text in clean[:200] for word in text.split()})
    texts: list[tuple[str, dict[str, Any]]] = []
    # No document is copied twice, so that of each pair it is plain which is near to which.
    originals = zip(*(rng.sample(range(len(clean)), per_kind) for _ in range(2)), strict=True)
    for number, (exact_of, near_of) in enumerate(originals):
        texts += [
            (clean[exact_of], {"kind": "exact copy", "of": exact_of}),
            _near_copy(number, near_of, clean[near_of], vocabulary, rng),
            *_plant_others(number, rng, seed),
        ]
    documents = [Document(i, text) for i, text in enumerate(clean)]
    documents += [Document(len(clean) + i, text, label) for i, (text, label) in enumerate(texts)]
    rng.shuffle(documents)
    return documents


def _near_copy(
    number: int, of: int, text: str, vocabulary: Sequence[str], rng: random.Random
) -> tuple[str, dict[str, Any]]:
    share, how = EDITS[number % len(EDITS)], ("scattered", "block", "cut")[number % 3]
    label = {"kind": "near copy", "of": of, "edits": share, "how": how}
    return edited(text, share, how, vocabulary, rng), label


def _plant_others(number: int, rng: random.Random, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """One document of each kind that is no copy, made of new text: to find it as a copy is always wrong."""
    language = sorted(_FOREIGN)[number % len(_FOREIGN)]
    sort, damage = BOILERPLATE[number % len(BOILERPLATE)], DAMAGE[number % len(DAMAGE)]
    new = prose(4, seed=seed * 1_000_003 + number + 1)
    broken, repaired = damaged(damage, new[0])
    personal, values = _with_values(new[1], PERSONAL, rng)
    decoy, looks = _with_values(new[2], DECOYS, rng)
    passage = rng.choice(evaluation_texts()).split()
    words = (12, 13, 20, 30)[number % 4]
    start = rng.randrange(len(passage) - words)
    quoted = f"{new[3]}\n\n{' '.join(passage[start : start + words])} {rng.choice(sentences())}"
    return [
        (foreign(language, rng), {"kind": "foreign", "language": language}),
        (boilerplate(sort, rng), {"kind": "boilerplate", "sort": sort}),
        (broken, {"kind": "damaged", "sort": damage, "repaired": repaired}),
        (personal, {"kind": "personal", "values": values}),
        (decoy, {"kind": "decoy", "values": looks}),
        (quoted, {"kind": "evaluation", "words": words}),
    ]
