"""Tokenizers for tests: learnt from a list of texts, with the sample chosen as `llmkit tokenize` chooses it."""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llmkit.data.pipeline import Engine
from llmkit.data.sample import choose_sample
from llmkit.data.tokenizers import learn
from llmkit.recipe.schema import Tokenize


@dataclass(frozen=True)
class ListTexts:
    """Texts of a list, as one part."""

    texts: tuple[str, ...]
    name: str = "list"

    @property
    def identity(self):
        return hashlib.sha256(repr(self.texts).encode()).hexdigest()

    @property
    def sizes(self):
        return [sum(len(text.encode()) for text in self.texts)]

    @property
    def cut(self):
        return ""

    def read(self, number, tally):
        yield from self.texts

    def check(self, tally):
        pass


def train_tokenizer(documents, spec, *, folder, held_out_below=0, max_length=None, base=Path()):
    """Choose a sample of the documents and learn a tokenizer from it; returns the figures."""
    with tempfile.TemporaryDirectory() as cache:
        sample = choose_sample(
            [ListTexts(tuple(documents))],
            limit=spec.sample,
            held_out_below=held_out_below,
            cache=Path(cache),
            engine=Engine(),
        )
    return learn(sample.learn, sample.measure, spec, folder, max_length, base=base)


def train_bpe(documents, *, vocab_size, folder, special_tokens=(), sample_bytes=100_000_000, **options):
    """The same with the settings of a BPE one by one."""
    spec = Tokenize(vocab_size=vocab_size, special_tokens=list(special_tokens), sample=sample_bytes)
    return train_tokenizer(documents, spec, folder=folder, **options)
