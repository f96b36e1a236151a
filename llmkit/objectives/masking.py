"""Which tokens of a row are hidden, and what stands in their place: BERT's corruption.

Shape suffixes: T positions of a row.

**Source**: Devlin et al., "BERT", 2019, section 3.1 and appendix A.1; whole words: the authors' repository, May 2019;
Cui et al., "Pre-Training with Whole Word Masking for Chinese BERT", 2021.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.objectives.base import NOT_LEARNED
from llmkit.objectives.words import Words

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Masking:
    """Hides tokens of rows, never special ones.

    Attributes:
        is_special: [V], by id.
        mask_id: What stands for a hidden token.
        ratio: Hidden tokens of a row, as a share of those that are not special: the nearest whole number, and at least
            one.
        mask_ratio: The share of the hidden ones in whose place the mask stands.
        random_ratio: The share in whose place any ordinary token stands; the others are as they were.
        words: Finds whole words, to hide all of a word or nothing; None hides single tokens.
    """

    is_special: Flags
    mask_id: int
    ratio: float = 0.15
    mask_ratio: float = 0.8
    random_ratio: float = 0.1
    words: Words | None = None

    @classmethod
    def of(
        cls,
        vocabulary: Vocabulary,
        *,
        ratio: float,
        mask_ratio: float = 1.0,
        random_ratio: float = 0.0,
        whole_words: bool = False,
    ) -> "Masking":
        """The masking for a vocabulary.

        Raises:
            UsageError: It has no mask token.
            MissingError: Chinese words are wanted, and rjieba is not installed.
        """
        words = Words(vocabulary) if whole_words else None
        mask_id = vocabulary.role("mask_token")
        return cls(vocabulary.is_special, mask_id, ratio, mask_ratio, random_ratio, words)

    def hide(self, ids_T: Ints, draw: np.random.Generator) -> tuple[Ints, Ints]:
        """A row with gaps, and what belongs into them.

        Args:
            ids_T: The row.
            draw: Where chance comes from.

        Returns:
            The row to read, and its targets: the hidden tokens, `NOT_LEARNED` elsewhere.
        """
        hidden_T = self._choose(ids_T, draw)
        read_T = ids_T.copy()
        fate_T = draw.random(len(ids_T))
        read_T[hidden_T & (fate_T < self.mask_ratio)] = self.mask_id
        random_T = hidden_T & (fate_T >= self.mask_ratio) & (fate_T < self.mask_ratio + self.random_ratio)
        ordinary = np.flatnonzero(~self.is_special)
        read_T[random_T] = draw.choice(ordinary, int(random_T.sum()))
        return read_T, np.where(hidden_T, ids_T, NOT_LEARNED)

    def _choose(self, ids_T: Ints, draw: np.random.Generator) -> Flags:
        hidden_T = np.zeros(len(ids_T), dtype=np.bool_)
        candidates = np.flatnonzero(~self.is_special[ids_T])
        if len(candidates):
            wanted = max(1, round(self.ratio * len(candidates)))
            if self.words is None:
                hidden_T[draw.choice(candidates, wanted, replace=False)] = True
            else:
                groups = self.words.groups(ids_T)
                hidden_T[np.isin(groups, _chosen_words(groups[candidates], wanted, draw))] = True
        return hidden_T


def _chosen_words(groups: Ints, wanted: int, draw: np.random.Generator) -> list[int]:
    """Words in a random order, leaving out those too long for the tokens that are left; at least the shortest one."""
    names, lengths = np.unique(groups, return_counts=True)
    chosen: list[int] = []
    left = wanted
    for place in draw.permutation(len(names)).tolist():
        if lengths[place] <= left:
            chosen.append(int(names[place]))
            left -= int(lengths[place])
        if not left:
            break
    return chosen or [int(names[lengths.argmin()])]
