"""Where sentences end, as a vocabulary spells it."""

import numpy as np
import numpy.typing as npt

from llmkit.data.tokenizers.vocabulary import Vocabulary

_MARKS = tuple(mark.encode() for mark in ".!?。！？…\n")
_CLOSING = tuple(mark.encode() for mark in "\"')]”’」』）")


def ends_sentence(vocabulary: Vocabulary) -> npt.NDArray[np.bool_]:
    """[V]: whether an entry's text ends with a mark that ends sentences; blanks and closing quotes may stand behind it.

    A line end is such a mark, so that code and verse have sentences too.
    """
    return np.array(
        [_without_closing(spelling).endswith(_MARKS) for spelling in vocabulary.spellings], dtype=np.bool_
    )


def _without_closing(spelling: bytes) -> bytes:
    stripped = spelling.rstrip(b" \t")
    closing = next((mark for mark in _CLOSING if stripped.endswith(mark)), b"")
    return _without_closing(stripped[: -len(closing)]) if closing else stripped
