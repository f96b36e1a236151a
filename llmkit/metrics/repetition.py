"""How varied a model's texts are, and how much they repeat themselves, 0 to 1."""

from collections import Counter
from collections.abc import Sequence

from llmkit.metrics.rouge import cutter, ngrams


def distinct(texts: Sequence[str], n: int, *, language: str = "en") -> float:
    """Different n-grams of all texts together, as a share of all of their n-grams; 0 where there are none.

    Args:
        texts: What the model wrote.
        n: Tokens of a run.
        language: Decides what a token is, as for ROUGE.

    **Source**: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016, section 5.
    """
    cut = cutter(language)
    counts = sum((ngrams(cut(text), n) for text in texts), Counter[tuple[str, ...]]())
    return len(counts) / counts.total() if counts else 0.0


def repetition(texts: Sequence[str], n: int = 4, *, language: str = "en") -> float:
    """The share of a text's n-grams that it has had before, as the mean over texts; one without n-grams counts as 0.

    Args:
        texts: What the model wrote.
        n: Tokens of a run.
        language: Decides what a token is, as for ROUGE.

    **Source**: Welleck et al., "Neural Text Generation with Unlikelihood Training", 2020, section 6 (seq-rep-n).
    """
    cut = cutter(language)
    counts = [ngrams(cut(text), n) for text in texts]
    shares = [1 - len(count) / count.total() if count else 0.0 for count in counts]
    return sum(shares) / len(shares) if shares else 0.0
