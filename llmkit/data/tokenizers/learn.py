"""Learn a tokenizer from text and write it as plain `AutoTokenizer` loads it, with figures that say how good it is."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.data.text import utf8_size
from llmkit.data.tokenizers.algorithms import Room, learner, normalizer_of, smallest_size
from llmkit.data.tokenizers.load import LightTokenizer
from llmkit.data.tokenizers.measure import measure_tokenizer
from llmkit.data.tokenizers.special import (
    add_specials,
    chat_template,
    special_roles,
    special_tokens,
    write_tokenizer,
)
from llmkit.errors import DataError, RecipeError
from llmkit.recipe.schema import Tokenize

_RUN = re.compile(r"[^\W\d_]+")

MEASURED_CHARS = 2_000_000
"""Text a tokenizer is measured on where nothing is held out, at most."""

MAX_DISTINCT_BYTES = 10_000_000
"""UTF-8 bytes of different words that are learnt from, at most: the trainers need some 120 bytes of memory each.

English has that many in hundreds of megabytes; Chinese, whose runs between two punctuation marks hardly ever come
twice, in fifteen."""

_COUNT_ONLY = ("chars", "words")
"""Algorithms that count words and do no more, which takes little memory for each."""

MAX_SAMPLE_BYTES = 2_000_000_000
"""The trainers count pairs of pieces in 32 bits with a sign; no count exceeds the number of bytes."""


def learn(
    sample: Sequence[str],
    measure: Sequence[str],
    spec: Tokenize,
    folder: Path,
    max_length: int | None = None,
    *,
    base: Path = Path(),
) -> dict[str, Any]:
    """Learn a tokenizer from texts and write it into `folder`: tokenizer.json and tokenizer_config.json.

    Args:
        sample: The texts to learn from; their order does not matter, unless they are too many for the memory
            (`within_memory`).
        measure: Other texts, on which the result is measured; the sample serves where there are none.
        spec: The recipe's `tokenize` section.
        folder: An existing folder.
        max_length: The longest input of the model it is made for, if known.
        base: The recipe's folder, where the file of a chat template is looked for.

    Returns:
        The figures of `report.json`: `algorithm`; `documents`, `bytes`, `chars` learnt from; `vocab_size`,
        `asked_vocab_size`; `note` (empty unless something differs from what was asked); `measured_on` and what
        `measure.measure_tokenizer` gives; `seconds`.

    Raises:
        RecipeError: `vocab_size` is too small or `sample` too large, a special token could be text, the chat
            template is broken.
        DataError: There is no text.
        MissingError: The algorithm needs a package, or the chat template's file does not exist.
    """
    started = time.perf_counter()
    refuse_impossible(spec)
    if not any(sample):
        raise DataError(
            "no text to learn a tokenizer from", hint="check `tokenize.data`, or lower `held_out`"
        )
    given = len(sample)
    if spec.algorithm not in _COUNT_ONLY:
        sample = within_memory(sample)
    template = chat_template(spec, base)
    specials = special_tokens(spec)
    # In one order whatever order they come in, since ties may be broken by what comes first.
    tokenizer = learner(spec.algorithm)(sorted(sample), Room(specials, spec.vocab_size), spec)
    normalizer = normalizer_of(spec.normalise)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    add_specials(tokenizer, specials)
    roles = special_roles(spec)
    write_tokenizer(
        tokenizer, folder, roles=roles, specials=specials, template=template, max_length=max_length
    )
    made = tokenizer.get_vocab_size()
    measured = measure if any(measure) else _first(sample, MEASURED_CHARS)
    light = LightTokenizer(tokenizer, str(folder), roles)
    figures = measure_tokenizer(light, measured, words=spec.algorithm == "words")
    return {
        "algorithm": spec.algorithm,
        "documents": len(sample),
        "bytes": sum(map(utf8_size, sample)),
        "chars": sum(map(len, sample)),
        "asked_vocab_size": spec.vocab_size,
        "vocab_size": made,
        "note": "; ".join(_notes(made, spec.vocab_size, len(sample), given, figures)),
        "measured_on": "held-out documents" if any(measure) else "the sample",
        **figures,
        "seconds": round(time.perf_counter() - started, 3),
    }


def refuse_impossible(spec: Tokenize) -> None:
    """Refuse what no text can make work, before any is read.

    Raises:
        RecipeError: `vocab_size` is smaller than the alphabet and the special tokens, or `sample` larger than can
            be counted.
    """
    specials = special_tokens(spec)
    smallest = smallest_size(spec, len(specials))
    if spec.vocab_size < smallest:
        alphabet = smallest - len(specials)
        what = (
            f"{alphabet} bytes" if alphabet == 256 else f"{alphabet} bytes as beginnings and as continuations"
        )
        raise RecipeError(
            f"vocab_size {spec.vocab_size} is smaller than the byte alphabet: {what} and "
            f"{len(specials)} special tokens need {smallest}",
            hint="use `vocab_size: 8k`, or more for more text",
        )
    if spec.sample > MAX_SAMPLE_BYTES:
        raise RecipeError(
            f"sample: {spec.sample:,} bytes are more than can be counted without overflow ({MAX_SAMPLE_BYTES:,})",
            hint="use `sample: 2GB` or less; 100MB is enough for most vocabularies",
        )


def _first(texts: Sequence[str], most_chars: int) -> list[str]:
    chosen: list[str] = []
    total = 0
    for text in texts:
        if chosen and total + len(text) > most_chars:
            break
        chosen.append(text[:most_chars])
        total += len(text)
    return chosen


def within_memory(texts: Sequence[str], most: int = MAX_DISTINCT_BYTES) -> Sequence[str]:
    """The first of the texts, as many as have at most `most` bytes of different words between them."""
    seen: set[str] = set()
    size = 0
    for number, text in enumerate(texts):
        new = {*_RUN.findall(text)} - seen
        size += sum(map(utf8_size, new))
        if size > most and number > 0:
            return texts[:number]
        seen |= new
    return texts


def _notes(made: int, asked: int, used: int, given: int, figures: Mapping[str, Any]) -> Iterator[str]:
    if used < given:
        yield (
            f"learnt from {used:,} of the sample's {given:,} documents, for they hold as many different words as "
            "fit into memory"
        )
    if made < asked:
        yield f"the text holds {made:,} entries worth learning, fewer than the {asked:,} asked for: made {made:,}"
    if figures["unknown_ratio"]:
        yield f"{figures['unknown_ratio']:.2%} of the tokens are unknown characters, which are lost"
    elif not figures["round_trip"]:
        yield f"{figures['round_trip_failures']:,} documents do not come back as they were"
