"""The settings of each objective, and how many tokens of text its rows take: blocks of the `pretrain` section."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmkit.errors import UsageError
from llmkit.recipe.block import Block
from llmkit.recipe.units import Count, Part, Ratio, unit_error
from llmkit.registry import BERT_ROLES, OBJECTIVES, SENTINELS

BERT_LIKE = ("wordpiece", "chars")
"""Algorithms whose vocabularies have `[CLS]`, `[SEP]` and `[MASK]`."""


@dataclass(frozen=True)
class RowLayout:
    """What a row takes of a stream of tokens.

    Attributes:
        stride: Tokens that it takes for itself.
        overlap: Tokens of the next row that it sees too.
        decoder: Positions of the decoder at most; 0 where the model has none of its own.
    """

    stride: int
    overlap: int = 0
    decoder: int = 0


class ObjectiveSettings(Block):
    """What the settings of every objective have."""

    def layout(self, context: int) -> RowLayout:
        """What a row of `context` positions takes: as many tokens."""
        return RowLayout(context)


class Masked(ObjectiveSettings):
    """What is hidden of a text, and how."""

    ratio: Ratio = 0.15
    """Hidden tokens of a row, as a share of those that are not special; at least one is hidden."""
    mask_ratio: Ratio = 0.8
    """The share of the hidden tokens in whose place the mask stands."""
    random_ratio: Ratio = 0.1
    """The share in whose place a random token stands; the others stay as they are, and are learned too."""
    whole_words: bool = False
    """Hide all tokens of a word or none: words by the tokenizer's own pieces, Chinese ones as jieba's dictionary cuts
    them. The ratio still counts tokens."""

    @model_validator(mode="after")
    def _within_one(self) -> Self:
        """What is neither masked nor random stays as it is, and there cannot be less than nothing of it."""
        if self.mask_ratio + self.random_ratio > 1 + 1e-9:
            raise unit_error(
                f"`mask_ratio` and `random_ratio` are shares of the same tokens, and {self.mask_ratio:g} and "
                f"{self.random_ratio:g} are more than all of them",
                "Devlin 2019 has 80% and 10%",
            )
        return self

    def layout(self, context: int) -> RowLayout:
        """A row is `[CLS] text [SEP]`."""
        return RowLayout(context - 2)


class Pairs(ObjectiveSettings):
    """How pairs of texts are made."""

    other_ratio: Ratio = 0.5
    """The share of pairs whose second text is from another document."""

    def layout(self, context: int) -> RowLayout:
        """A row is `[CLS] one text [SEP] another [SEP]`."""
        return RowLayout(context - 3)


class ReplacedTokens(ObjectiveSettings):
    """The generator that replaces tokens, and how much finding them counts."""

    ratio: Ratio = 0.15
    """Replaced tokens of a row, as a share of those that are not special."""
    whole_words: bool = False
    """Replace all tokens of a word or none; see `mlm.whole_words`."""
    generator_ratio: Annotated[float, Field(gt=0, le=1)] = 0.25
    """The generator's width as a share of the model's, by whole attention heads; it has as many layers."""
    weight: Annotated[float, Field(gt=0)] = 50.0
    """How much the loss of finding replaced tokens counts beside the generator's own."""

    def layout(self, context: int) -> RowLayout:
        """A row is `[CLS] text [SEP]`."""
        return RowLayout(context - 2)


class Teaching(Block):
    """How a model learns from another one, besides the objective's own targets."""

    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The share of the loss that is the teacher's; the rest is the objective's own."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Both distributions are taken at this temperature, and their divergence times its square."""
    direction: Literal["forward", "reverse"] = "forward"
    """Which divergence: `forward` covers all that the teacher holds for possible, `reverse` keeps to what it holds for
    likely."""
    hidden: Annotated[float, Field(ge=0)] = 0.0
    """The weight of the distance between what layers of both compute; 0 leaves it out. Widths that differ are bridged
    by a learned projection."""
    attention: Annotated[float, Field(ge=0)] = 0.0
    """The weight of the divergence between the attention of layers of both; 0 leaves it out. The numbers of heads must
    be the same."""
    layers: Literal["last", "uniform"] = "uniform"
    """Which layers are compared: each of the student's with one of the teacher's at the same relative depth
    (`uniform`), or the last ones only."""


class Cache(Block):
    """What a teacher says, kept on disk."""

    top_k: Count = 32
    """How many outputs are kept of each position, the likeliest; all others count as one. As many as there are, or
    more, keeps everything."""


class Distil(Teaching):
    """Learn from a frozen model, the teacher, besides the objective's own targets."""

    teacher: str
    """The model to learn from: a run, its folder, a model folder or a Hub name; of the same kind and with the same
    tokenizer."""
    cache: Cache | None = None
    """Ask the teacher once, before training, and keep what it says on disk, for this run and later ones: `{top_k: 32}`.
    Training then does without its weights. By default it is asked at every step."""

    @model_validator(mode="after")
    def _what_is_kept(self) -> Self:
        """Probabilities are kept, and of those that are not among the likeliest only the sum."""
        if self.cache is None:
            return self
        if self.direction == "reverse":
            raise unit_error(
                "`direction: reverse` asks what the teacher says of all that the model holds for possible, and `cache` "
                "keeps the teacher's likeliest outputs",
                "`direction: forward`, or leave `cache` out",
            )
        for name in ("hidden", "attention"):
            if getattr(self, name):
                raise unit_error(
                    f"`{name}` compares layers of both models at every step, and `cache` keeps probabilities only",
                    f"leave `{name}` out, or leave `cache` out",
                )
        return self


class _Spans(ObjectiveSettings):
    """Spans of text that are taken out and written by the model."""

    ratio: Part = 0.15
    """The share of a row's tokens that is taken out."""
    mean_length: Annotated[float, Field(ge=1)] = 3.0
    """Tokens of a span on average."""

    def counts(self, num_tokens: int) -> tuple[int, int]:
        """How many of so many tokens are taken out, at least one, and in how many spans.

        **Source**: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
        Transformer", section 3.3.4; numbers are rounded as there.
        """
        taken = max(1, min(round(num_tokens * self.ratio), num_tokens - 1))
        return taken, max(1, min(round(taken / self.mean_length), num_tokens - taken))

    @abstractmethod
    def widths(self, num_tokens: int) -> tuple[int, int]:
        """Positions that so many tokens of text become: the model's (an encoder's) input, and a decoder's."""

    def layout(self, context: int) -> RowLayout:
        """As many tokens of text as fill `context` positions when spans are taken out.

        Raises:
            UsageError: That takes more spans than there are marks to tell them apart.
        """
        num_tokens = 0
        while self.widths(num_tokens + 1)[0] <= context:
            num_tokens += 1
        taken, spans = self.counts(max(1, num_tokens))
        if spans > len(SENTINELS):
            raise UsageError(
                f"a row of {context:,} positions has {spans} spans, and there are {len(SENTINELS)} marks for them",
                hint=f"a `mean_length` of {-(-taken // len(SENTINELS))} or more, or a smaller `model.context`",
            )
        return RowLayout(num_tokens, decoder=self.widths(max(1, num_tokens))[1])


class Span(_Spans):
    """Span corruption: the encoder reads text with spans replaced by marks, the decoder writes what they held."""

    def widths(self, num_tokens: int) -> tuple[int, int]:
        """What is kept, a mark a span and the end; what is taken out, a mark a span and the end."""
        taken, spans = self.counts(num_tokens)
        return num_tokens - taken + spans + 1, taken + spans + 1


class Infill(_Spans):
    """Blank infilling: a decoder reads text with spans replaced by marks, then writes the spans in a random order."""

    def widths(self, num_tokens: int) -> tuple[int, int]:
        """The text with a mark a span, and each span behind its mark."""
        return num_tokens + 2 * self.counts(num_tokens)[1], 0


class Denoise(ObjectiveSettings):
    """Text infilling and shuffled sentences: the encoder reads damaged text, the decoder writes it as it was."""

    ratio: Part = 0.3
    """The share of a row's tokens that is masked."""
    mean_length: Annotated[float, Field(gt=0)] = 3.0
    """Tokens of a masked span on average; one `<|mask|>` stands for each, also for those of no token."""
    shuffle_sentences: bool = True
    """Put the sentences of each document in a random order."""

    def layout(self, context: int) -> RowLayout:
        """The text and its end, on both sides."""
        return RowLayout(context - 1, decoder=context)


class Fim(ObjectiveSettings):
    """Fill in the middle: documents cut in three at random characters, the middle moved to the end."""

    ratio: Ratio = 0.5
    """The share of documents (or of their parts in a row) that are rearranged."""
    suffix_first_ratio: Ratio = 0.5
    """Of those, the share in which the suffix stands before the prefix (SPM), rather than behind it (PSM)."""

    def layout(self, context: int) -> RowLayout:
        """As a causal language model's: one token of the next row is the last target."""
        return RowLayout(context, overlap=1)


def other_sections(objective: str) -> set[str]:
    """The blocks of the `pretrain` section that are settings of other objectives only."""
    return {name for goal in OBJECTIVES.values() for name in goal.sections} - set(
        OBJECTIVES[objective].sections
    )


def tokens_for(objective: str, algorithm: str, given: Sequence[str]) -> list[str]:
    """The special tokens of a tokenizer that a recipe learns for an objective, after the algorithm's own.

    Args:
        objective: The recipe's.
        algorithm: How the vocabulary is learnt.
        given: The recipe's `special_tokens`.
    """
    has = BERT_ROLES if algorithm in BERT_LIKE else ()
    needed = [token for token in OBJECTIVES[objective].tokens if token not in has]
    return list(dict.fromkeys([*given, *needed]))
