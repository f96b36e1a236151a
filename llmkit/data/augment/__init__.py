"""Rows changed while they are learned from: the same row otherwise each time, and the same way in every run."""

from llmkit.data.augment.rows import Augmented
from llmkit.data.augment.thesaurus import fingerprint

__all__ = ["Augmented", "fingerprint"]
